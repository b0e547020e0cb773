"""A bucket that is not there: the part of Cloud Storage's JSON interface that gcsfs and TensorStore use, out of a dict."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket(ThreadingHTTPServer):
    """Serves on a free port of this machine; `objects` is what it holds, name -> bytes, of the one bucket 'bucket'."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.objects, self.generations, self.uploads, self.lock = {}, {}, {}, threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, *_):
        """Clients that leave before they are answered are no error."""

    def put(self, name, content):
        with self.lock:
            self.objects[name] = bytes(content)
            self.generations[name] = self.generations.get(name, 0) + 1

    def describe(self, name):
        size, generation = str(len(self.objects[name])), str(self.generations[name])
        return {'kind': 'storage#object', 'bucket': 'bucket', 'name': name, 'size': size, 'generation': generation,
                'updated': '2024-01-01T00:00:00.000Z', 'timeCreated': '2024-01-01T00:00:00.000Z'}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, code, content=b'', **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {'Content-Type': 'application/json', **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def handle_request(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.read_body()
        if url.path.startswith('/batch'):
            return self.batch(body)
        parts = re.fullmatch(r'(/upload|/download)?/storage/v1/b/bucket(?:/o(?:/(.+))?)?', url.path)
        if not parts:
            return self.answer(404, {'error': {'code': 404, 'message': 'no such bucket'}})
        if parts[1] == '/upload':
            return self.upload(query, body)
        if parts[2]:
            return self.one(unquote(parts[2]), query)
        return self.listing(query) if url.path.rstrip('/').endswith('/o') else self.answer(200, {'name': 'bucket'})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_request

    def read_body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def one(self, name, query):
        store = self.server
        if name not in store.objects:
            return self.answer(404, {'error': {'code': 404, 'message': f'No such object: bucket/{name}'}})
        if self.command == 'DELETE':
            with store.lock:
                del store.objects[name]
            return self.answer(204)
        if query.get('alt') != 'media':
            return self.answer(200, store.describe(name))
        content, stamps = store.objects[name], {'x_goog_generation': str(store.generations[name]), 'ETag': '"1"'}
        if span := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')):
            size = len(content)
            first = int(span[1]) if span[1] else size - int(span[2])
            last = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
            if first >= size:
                return self.answer(416)
            stamps['Content_Range'] = f'bytes {first}-{last}/{size}'
            return self.answer(206, content[first : last + 1], **stamps)
        return self.answer(200, content, **stamps)

    def listing(self, query):
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
        items, prefixes = [], set()
        for name in sorted(self.server.objects):
            if name.startswith(prefix) and name >= query.get('startOffset', '') and name < query.get('endOffset', '\U0010ffff'):
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    items.append(self.server.describe(name))
        return self.answer(200, {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)})

    def upload(self, query, body):
        store, kind = self.server, query['uploadType']
        if 'upload_id' in query:  # a piece of a resumable upload
            name, content = store.uploads[query['upload_id']]
            content += body
            if self.headers['Content-Range'].endswith('/*'):
                return self.answer(308, b'', Range=f'bytes=0-{len(content) - 1}')
            store.put(name, content)
            return self.answer(200, store.describe(name))
        if kind == 'resumable':
            name = query.get('name') or json.loads(body)['name']
            number = str(len(store.uploads))
            store.uploads[number] = (name, bytearray())
            where = f'{store.url}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}'
            return self.answer(200, b'', Location=where)
        name = query.get('name')
        if kind == 'multipart':
            boundary = b'--' + re.search('boundary="?([^"]+)', self.headers['Content-Type'])[1].encode()
            head, content = (part.lstrip(b'\r\n') for part in body.split(boundary, 2)[1:])
            name = json.loads(re.split(rb'\r?\n\r?\n', head, maxsplit=1)[1])['name']
            content = re.split(rb'\r?\n\r?\n', content, maxsplit=1)[1]
            body = content[: content.rindex(b'\n' + boundary)]
        if query.get('ifGenerationMatch') == '0' and name in store.objects:
            return self.answer(412, {'error': {'code': 412, 'message': 'it is there'}})
        store.put(name, body)
        return self.answer(200, store.describe(name))

    def batch(self, body):
        boundary = re.search('boundary="?([^"]+)', self.headers['Content-Type'])[1]
        answers = ''
        for name in re.findall(rb'DELETE /storage/v1/b/bucket/o/(\S+) HTTP', body):
            with self.server.lock:
                found = self.server.objects.pop(unquote(name.decode()), None)
            answers += f'--{boundary}\r\n\r\nHTTP/1.1 {404 if found is None else 204} \r\n\r\n'
        return self.answer(200, f'{answers}--{boundary}--'.encode(), Content_Type=f'multipart/mixed; boundary={boundary}')
