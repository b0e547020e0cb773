# ruff: noqa: E501 - programs, one a line
"""Programs for the sandbox: those that must not pass, and those that must; run as a script it prints their outcomes as JSON."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from llama2_jax.evals import sandbox
from llama2_jax.evals.sandbox import Limits, Program, attempt

# Each defines `f`, whose test it cannot pass honestly: its argument and result have nothing to do with each other.
TESTS = 'assert f(20) == SECRET and f([1]) == [SECRET]\n'.replace('SECRET', '31415926535')
FORGERIES = {
    'wrong': 'def f(x): return 0',
    'exit 0': 'import os\nos._exit(0)',
    'SystemExit': 'def f(x): raise SystemExit(0)',
    'exit when asked': 'import os\ndef f(x): os._exit(0)',
    'at exit': 'import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0',
    'says passed': 'import os\nfor n in range(3, 64):\n  try: os.write(n, b"{}\\npassed")\n  except OSError: pass\ndef f(x): return 0',
    'says passed later': 'import os\ndef f(x):\n  for n in range(64):\n    try: os.write(n, b"{}\\npassed")\n    except OSError: pass',
    'a message of its own': 'import os, struct, json\ndef f(x):\n  d = json.dumps(["value", True, []]).encode()\n'
    '  for n in range(3, 64):\n    try: os.write(n, struct.pack("=I", len(d)) + d)\n    except OSError: pass\n  os._exit(0)',
    'token in argv': 'import sys\nsys.exit(sys.orig_argv[-1])',
    'frames': 'import sys\ndef f(x):\n  frame, found = sys._getframe(), []\n  while frame:\n    found += list(frame.f_locals.values())\n'
    '    frame = frame.f_back\n  return next((v for v in found if v == 31415926536 - 1), 0)',
    'tests in memory': 'import gc\ndef f(x):\n  found = [o for o in gc.get_objects() if isinstance(o, (list, dict))]\n'
    '  return int("".join(["314159", "26535"])) if any("assert f(20)" in str(v)[:9999] for v in found[:300]) else 0',
    'tests on disk': 'import os\ndef f(x):\n  for n in range(64):\n    try:\n      if b"assert f" in os.pread(n, 999, 0): return 31415926534 + 1\n'
    '    except OSError: pass\n  return 0',
    'parent in memory': 'def f(x): return int("314159" "26535") if b"SECRET" in open("/proc/%d/mem" % 1, "rb").read(9) else 0',
    'jump': 'import sys\ndef trace(frame, event, arg):\n  if event == "line":\n    try: frame.f_lineno += 1\n    except ValueError: pass\n'
    '  return trace\nsys.settrace(trace)\ndef f(x): return 0',
    'profile': 'import sys\nsys.setprofile(lambda frame, event, arg: None)\ndef f(x): return 0',
    'trace in threads': 'import sys, threading\nthreading.settrace(lambda *a: None)\nsys.settrace(lambda *a: None)\ndef f(x): return 0',
    'AssertionError': 'import builtins\nclass E(BaseException):\n  def __new__(c, *a): raise SystemExit(0)\n'
    'builtins.AssertionError = E\ndef f(x): return 0',
    'builtins': 'import builtins\nbuiltins.int = builtins.abs = builtins.len = lambda *a: 31415926535\ndef f(x): return 0',
    'operators': 'import operator\noperator.eq = lambda a, b: True\ndef f(x): return 0',
    'equals all': 'class A:\n  def __eq__(self, o): return True\n  __hash__ = None\ndef f(x): return A()',
    'int that equals all': 'class A(int):\n  def __eq__(self, o): return True\n  __hash__ = int.__hash__\ndef f(x): return A(3)',
    'str that equals all': 'class A(str):\n  def __eq__(self, o): return True\n  __hash__ = str.__hash__\ndef f(x): return A("a")',
    'list that equals all': 'class A(list):\n  def __eq__(self, o): return True\ndef f(x): return A()',
    'tuple with equals all': 'class A:\n  def __eq__(self, o): return True\ndef f(x): return [A()] if x == [1] else A()',
    'dict that equals all': 'class A(dict):\n  def __eq__(self, o): return True\ndef f(x): return A()',
    'claims a class': 'class A:\n  __class__ = int\n  def __eq__(self, o): return True\ndef f(x): return A()',
    'float nan': 'def f(x): return float("nan")',
    'mock': 'from unittest.mock import ANY\ndef f(x): return ANY',
    'changes its argument': 'def f(x):\n  try: x.clear(); x.append(31415926530)\n  except AttributeError: pass\n  return x',
    'error named passed': 'class passed(Exception): pass\ndef f(x): raise passed()',
    'error without a name': 'E = type("", (Exception,), {})\ndef f(x): raise E("passed")',
    'error with newlines': 'E = type("{}\\npassed", (Exception,), {})\ndef f(x): raise E("\\npassed")',
    'error that lies': 'class E(AssertionError):\n  def __str__(self): return "passed"\ndef f(x): raise E()',
    'StopIteration': 'def f(x): raise StopIteration(31415926535)',
    'GeneratorExit': 'def f(x): raise GeneratorExit()',
    'KeyboardInterrupt': 'def f(x): raise KeyboardInterrupt()',
    'Gone': 'import __main__\ndef f(x): raise __main__.Gone("passed")',
    'patches the peer': 'import sys\ndef f(x):\n  p = sys._getframe().f_back\n  while p and "self" not in p.f_locals: p = p.f_back\n'
    '  p.f_locals["self"].send(["value", 1, [], 3]); return 0',
    'asks to call': 'import sys\ndef f(x):\n  p = sys._getframe().f_back\n  while p and "self" not in p.f_locals: p = p.f_back\n'
    '  return p.f_locals["self"].ask("getattr", x, "__class__")',
    'raises Gone in the checker': 'import sys\ndef f(x):\n  p = sys._getframe().f_back\n  while p and "self" not in p.f_locals: p = p.f_back\n'
    '  p.f_locals["self"].send(["error", ["Gone", "BaseException"], "passed", ["passed"]]); return 0',
    'forks, both answer': 'import os\ndef f(x):\n  os.fork()\n  return 0',
    'fork at load': 'import os\nos.fork()\ndef f(x): return 0',
    'thread that exits': 'import threading, os\nthreading.Timer(0.05, os._exit, [0]).start()\ndef f(x):\n  import time; time.sleep(1)',
    'exec of another': 'import os, sys\ndef f(x): os.execv(sys.executable, [sys.executable, "-c", "pass"])',
    'memory by ctypes': 'import ctypes\ndef f(x):\n  ctypes.memset(id(0) + 24, 1, 1)\n  return 0',
    'small int by ctypes': 'import ctypes\ndef f(x):\n  ctypes.c_uint32.from_address(id(7) + 24).value = 8\n  return 7',
    'replaces __main__': 'import sys\nfor m in list(sys.modules.values()):\n  for n in ("json", "os"):\n'
    '    if hasattr(m, "run_checker"): m.run_checker = m.run_code = None\ndef f(x): return 0',
    'json that lies': 'import json\njson.dumps = lambda *a, **k: "true"\ndef f(x): return 0',
    'deep answer': 'def f(x):\n  r = []\n  for _ in range(100000): r = [r]\n  return r',
    'cyclic answer': 'def f(x):\n  r = []\n  r.append(r)\n  return r',
    'huge answer': 'def f(x): return "a" * 10**8',
    'module of its own': 'import sys, types\nsys.modules["math"] = types.SimpleNamespace(isclose=lambda *a: True)\ndef f(x): return 0',
}  # fmt: skip

# Each comes to its end only if the attack works.
ESCAPES = {
    'IPv4': 'import socket\ntry: socket.create_connection(("127.0.0.1", 22), 2)\nexcept ConnectionRefusedError: pass',
    'IPv6': 'import socket\nsocket.socket(socket.AF_INET6)',
    'UNIX socket': 'import socket\nsocket.socket(socket.AF_UNIX).bind("/tmp/s")',
    'netlink': 'import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)',
    'reads passwords': 'open("/etc/shadow").read()',
    'reads users': 'open("/etc/passwd").read()',
    'reads /proc/1': 'open("/proc/1/environ").read()',
    'reads memory': 'open("/proc/self/mem", "r+b")',
    'writes to /usr': 'open("/usr/lib/evil", "w")',
    'writes to /dev': 'open("/dev/evil", "w")',
    'writes to /': 'open("/evil", "w")',
    'changes a library': 'import os\nos.chmod(os.__file__, 0o777)',
    'mounts': 'import ctypes\nif ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None): raise OSError',
    'unmounts': 'import ctypes\nif ctypes.CDLL(None).umount2(b"/tmp", 2): raise OSError',
    'chroot': 'import os\nos.mkdir("d"); os.chroot("d")',
    'setuid': 'import os\nassert os.getuid()\nos.setuid(0)',
    'new user namespace': 'import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError',
    'clone into a user namespace': 'import ctypes, platform\nn = {"x86_64": 56, "aarch64": 220}[platform.machine()]\n'
    'if ctypes.CDLL(None).syscall(n, 0x10000011, 0, 0, 0, 0) < 0: raise OSError',
    'clone3': 'import ctypes, struct\na = struct.pack("Q7Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0)\n'
    'if ctypes.CDLL(None).syscall(435, a, 64) < 0: raise OSError',
    'joins a namespace': 'import ctypes, os\nif ctypes.CDLL(None).setns(0, 0): raise OSError',
    'ptrace': 'import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0): raise OSError',
    'attaches to the checker': 'import ctypes\nif all(ctypes.CDLL(None).ptrace(16, n, 0, 0) for n in range(1, 99)): raise OSError',
    'reads the checker': 'import ctypes, platform\nn = {"x86_64": 310, "aarch64": 270}[platform.machine()]\nb = ctypes.create_string_buffer(32)\n'
    'if all(ctypes.CDLL(None).syscall(n, p, b, 1, b, 1, 0) < 0 for p in range(1, 99)): raise OSError',
    'takes a descriptor': 'import ctypes, os\nl = ctypes.CDLL(None)\n'
    'if all(l.syscall(438, l.syscall(434, p, 0), n, 0) < 0 for p in range(1, 60) for n in range(3, 16)): raise OSError',
    'keyring': 'import ctypes, platform\nn = {"x86_64": 250, "aarch64": 219}[platform.machine()]\n'
    'if ctypes.CDLL(None).syscall(n, 0, -3, 1) < 0: raise OSError',
    'io_uring': 'import ctypes\nif ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) < 0: raise OSError',
    'shared memory': 'import ctypes\nif ctypes.CDLL(None).shmget(0, 2**20, 0o1600) < 0: raise OSError',
    'memory file': 'import os\nos.memfd_create("m")',
    'message queue': 'import ctypes\nif ctypes.CDLL(None).msgget(0, 0o1600) < 0: raise OSError',
    'bpf': 'import ctypes, platform\nn = {"x86_64": 321, "aarch64": 280}[platform.machine()]\n'
    'if ctypes.CDLL(None).syscall(n, 0, ctypes.create_string_buffer(120), 120) < 0: raise OSError',
    'raises its limits': 'import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))',
    'device': 'import os, stat\nos.mknod("/tmp/sda", stat.S_IFBLK | 0o666, os.makedev(8, 0))',
}  # fmt: skip

HOG = (
    'import os, time\nchildren = []\nfor _ in range(6):\n  children.append(os.fork())\n  if children[-1] == 0:\n    {}\n'
    '    time.sleep(20)\n    os._exit(0)\ntime.sleep(3)\nassert not any(os.waitpid(child, os.WNOHANG)[0] for child in children)'
)
FILL = 'm = bytearray(100 * 2**20)\n    for i in range(0, len(m), 4096): m[i] = 1'
# With 256 MB of memory and 20 processes; each comes to its end only where it gets more.
EXCESSES = {
    'memory': 'm = bytearray(300 * 2**20)',
    'memory of children': HOG.format(FILL),
    'shared mappings': 'import mmap\nm = [mmap.mmap(-1, 100 * 2**20) for _ in range(6)]\nfor x in m: x.write(b"a" * len(x))',
    'shared mappings of children': HOG.format('import mmap; m = mmap.mmap(-1, 100 * 2**20); m.write(b"a" * len(m))'),
    'one file': 'open("x", "wb").write(bytes(10**8))',
    'all files': 'for n in range(20): open(f"x{n}", "wb").write(bytes(2**23))',
    'empty files': 'for n in range(10000): open(f"x{n}", "w").close()',
    'folders': 'import os\nfor n in range(10000): os.mkdir(f"x{n}")',
    'processes': 'import os, time\nfor _ in range(60):\n  if os.fork() == 0: time.sleep(20); os._exit(0)\ntime.sleep(1)',
    'threads': 'import threading, time\nfor _ in range(60): threading.Thread(target=time.sleep, args=[20], daemon=True).start()\ntime.sleep(1)',
    'descriptors': 'x = [open("/dev/null") for _ in range(100)]',
    'sessions': 'import os, time\nfor _ in range(60):\n  if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n    time.sleep(20)\ntime.sleep(1)',
}  # fmt: skip

# Code, tests, the names that they use.
HONEST = {
    'nothing': ('pass', '', ()),
    'environment': ('import os\nos.environ["A"] = "1"\nassert os.environ["A"] == "1"', '', ()),
    'temporary files': ('import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b"a")\n'
                        'with tempfile.TemporaryDirectory() as d: open(d + "/x", "w").close()', '', ()),
    'own files': ('import os\nopen("x", "w").close()\nos.chmod("x", 0o600)\nos.symlink("x", "y")\nos.link("x", "z")\nos.rename("z", "w")', '', ()),
    'asyncio': ('import asyncio\nasync def a():\n  await asyncio.sleep(0.01)\n  return 3\ndef f(): return asyncio.run(a())', 'assert f() == 3', ('f',)),
    'threads': ('from concurrent.futures import ThreadPoolExecutor as T\nimport time\nwith T(12) as p: list(p.map(time.sleep, [0.05] * 24))', '', ()),
    'processes': ('import multiprocessing as m\ndef g(x): return x * x\ndef f(x):\n  with m.get_context("fork").Pool(3) as p: return p.map(g, x)',
                  'assert f([1, 2, 3]) == [1, 4, 9]', ('f',)),
    'a command': ('import subprocess\nassert subprocess.run(["/usr/bin/env", "echo", "a"], capture_output=True).stdout == b"a\\n"', '', ()),
    'numpy': ('try: import numpy as np\nexcept ModuleNotFoundError: np = None\ndef f(x): return np.arange(x).sum() if np else x * (x - 1) // 2',
              'assert f(4) == 6 and isinstance(f(4), int)', ('f',)),
    'ctypes': ('import ctypes\nassert ctypes.CDLL(None).abs(-3) == 3', '', ()),
    'argument changed': ('def f(x): x["a"].append(1); x["b"] = x["a"]', 'x = {"a": []}\nassert f(x) is None and x == {"a": [1], "b": [1]}\n'
                         'assert x["a"] is x["b"]', ('f',)),
    'argument sorted': ('def f(x): x.sort(); return x', 'x = [3, 1]\nassert f(x) is x and x == [1, 3]', ('f',)),
    'types': ('def f(x): return x', 'for x in [None, True, 1, -2**70, 10**5000 > 0, 1.5, -0.0, 1j, "é\\ud800", b"a", (1, [2]), [(), {}], {1, 2}, '
              'frozenset([(1,)]), {(1, 2): {"a": None}}, bytearray(b"x"), range(3), float("inf")]:\n'
              '  assert f(x) == x and type(f(x)) is type(x) and repr(f(x)) == repr(x), x', ('f',)),
    'subclasses': ('from collections import *\nfrom fractions import Fraction\nfrom decimal import Decimal\ndef f(n): return [Counter("aab"), '
                   'OrderedDict(a=1), deque([1]), defaultdict(int, a=1), namedtuple("P", "x y")(1, 2), Fraction(1, 3), Decimal("1.10"), {}.keys()][n]',
                   'from collections import deque\nfrom fractions import Fraction\nfrom decimal import Decimal\nassert f(0) == {"a": 2, "b": 1}\n'
                   'assert f(1) == f(3) == {"a": 1} and f(2) == deque([1])\nassert f(4) == (1, 2) and f(5) == Fraction(1, 3) '
                   'and f(6) == Decimal("1.1") and f(7) == set()', ('f',)),
    'NaN': ('def f(): return float("nan")', 'x = f()\nassert x != x', ('f',)),
    'generator': ('def f(n):\n  for i in range(n): yield i, [i]', 'assert list(f(2)) == [(0, [0]), (1, [1])] and not isinstance(f(1), list)', ('f',)),
    'function as argument': ('def f(g, x): return sorted(x, key=g)', 'assert f(lambda v: -v, [1, 3, 2]) == [3, 2, 1]', ('f',)),
    'function as result': ('def f(n): return lambda x: x + n', 'assert f(2)(3) == 5', ('f',)),
    'named arguments': ('def f(a, *b, c=0, **d): return a, b, c, d', 'assert f(1, 2, c=3, e=4) == (1, (2,), 3, {"e": 4})', ('f',)),
    'exceptions': ('def f(x):\n  if x: raise ValueError("no", x)\n  return {}[x]', 'try: f(1)\nexcept ValueError as e: assert e.args == ("no", 1)\n'
                   'else: raise AssertionError\ntry: f(0)\nexcept KeyError: pass', ('f',)),
    'own exception': ('class E(ValueError): pass\ndef f(): raise E("x")', 'try: f()\nexcept ValueError as e: assert type(e).__name__ == "E"', ('f',)),
    'class': ('class Node:\n  def __init__(self, v): self.v, self.left = v, None\n  def __len__(self): return 0\n'
              'def f(n): return n.v + (f(n.left) if n.left is not None else 0)',
              'root = Node(1)\nroot.left = Node(2)\nassert f(root) == 3 and root.left.v == 2 and len(root) == 0 and not root', ('f', 'Node')),
    'state': ('n = 0\ndef f():\n  global n\n  n += 1\n  return n', 'assert [f(), f(), f()] == [1, 2, 3]', ('f',)),
    'a module that tests expect': ('import math\ndef f(): return 0.1 + 0.2', 'assert math.isclose(f(), 0.3)', ('f',)),
    'a name of a module': ('def bisect(x): return x + 1', 'assert bisect(1) == 2', ('bisect',)),
    'prints': ('def f(): print("x" * 10**6); return 1', 'assert f() == 1', ('f',)),
    'match': ('import re\ndef f(x): return re.search("a", x)', 'assert f("ba") and not f("b") and f("ba").start() == 1', ('f',)),
    'cycle': ('def f(x): x.append(x); return x', 'x = [1]\ny = f(x)\nassert y is x and x[1] is x', ('f',)),
    'large': ('def f(x): return [v + 1 for v in x]', 'assert f(list(range(10**5)))[-1] == 10**5', ('f',)),
}  # fmt: skip


def main(off: tuple[str, ...]) -> None:
    """Prints {kind: {name: outcome}}, and the locks that are missing."""
    if not off and not sandbox._bubblewrap():  # it is installed and does not work for this user
        off = ('bubblewrap',)
    small = Limits(memory=2**28, processes=20)
    rows = [('forgeries', name, Program(code, TESTS, ('f',)), Limits()) for name, code in FORGERIES.items()]
    rows += [('escapes', name, Program(code), Limits()) for name, code in ESCAPES.items()]
    rows += [('excesses', name, Program(code), small) for name, code in EXCESSES.items()]
    rows += [('honest', name, Program(*parts), Limits(seconds=30)) for name, parts in HONEST.items()]
    found: dict[str, dict[str, str]] = {'forgeries': {}, 'escapes': {}, 'excesses': {}, 'honest': {}}
    with ThreadPoolExecutor(2) as pool:
        for (kind, name, *_), outcome in zip(rows, pool.map(lambda row: attempt(*row[2:], off)[0], rows), strict=True):
            found[kind][name] = outcome
    json.dump({**found, 'missing': attempt(Program('pass'), Limits(seconds=30), off)[1]}, sys.stdout)


if __name__ == '__main__':
    main(tuple(sys.argv[1:]))
