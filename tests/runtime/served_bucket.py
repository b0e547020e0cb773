"""As much of Google Cloud Storage as a preflight asks for: an object is written, read and removed."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


class Bucket(BaseHTTPRequestHandler):
    objects: dict[str, bytes] = {}

    def do_POST(self):
        name = parse_qs(urlparse(self.path).query)['name'][0]
        self.objects[name] = self.rfile.read(int(self.headers['Content-Length']))
        self.answer(json.dumps({'name': name, 'generation': '1', 'size': str(len(self.objects[name]))}).encode())

    def do_GET(self):
        name = unquote(urlparse(self.path).path.rpartition('/')[2])
        self.answer(self.objects.get(name), {'x-goog-generation': '1'})

    def do_DELETE(self):
        self.objects.pop(unquote(urlparse(self.path).path.rpartition('/')[2]), None)
        self.answer(b'')

    def answer(self, body, headers=()):
        self.send_response(404 if body is None else 200)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body or b'')))
        self.end_headers()
        self.wfile.write(body or b'')

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve():
    """The address of such a service."""
    with ThreadingHTTPServer(('localhost', 0), Bucket) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f'http://localhost:{server.server_address[1]}'
        finally:
            server.shutdown()
            thread.join()
