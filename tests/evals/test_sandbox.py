"""Attacks on the sandbox, tried for real: with all its locks, and with each lock alone where another would stop it first."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama2_jax.evals import sandbox
from llama2_jax.evals.sandbox import Limits, attempt, run_program, weaknesses

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the sandbox needs Linux')
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def missing():
    """Locks that this machine does not have, with the reasons."""
    return attempt('pass', Limits())[1]


def need(missing, *locks):
    for lock in locks:
        if lock in missing:
            pytest.skip(f'this machine has no {lock}: {missing[lock]}')


def processes_running(mark):
    """Processes with a mark in their command lines or environments."""
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if mark in path.read_bytes().decode(errors='replace'):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ('program', 'outcome'),
    [
        ('import math, re, typing, itertools, heapq, collections, random\nassert math.factorial(5) == 120', 'passed'),
        ('open("x", "w").write("hi")\nassert open("x").read() == "hi"', 'passed'),
        ('if __name__ == "__main__": raise KeyError("main")', "KeyError: 'main'"),
        ('assert 1 == 2, "no"', 'AssertionError: no'),
        ('def f(:', 'SyntaxError: invalid syntax (program.py, line 1)'),
        ('raise SystemExit(0)', 'SystemExit: 0'),
        ('import os; os._exit(0)', 'killed'),
        ('import sys; sys.stdin.read(); print("x" * 10**6); raise ValueError("é")', 'ValueError: é'),
        ('import os\nif os.fork(): os.wait(); raise ValueError("the parent fails")', 'ValueError: the parent fails'),
    ],
)
def test_outcomes(program, outcome):
    assert run_program(program) == outcome


@pytest.mark.parametrize('program', ['while True: pass', 'import time; time.sleep(1000)', '10**10**10'])
def test_endless_programs_end(program):
    began = time.monotonic()
    assert run_program(program, Limits(seconds=1)) == 'timed out'
    assert time.monotonic() - began < 20


def test_memory(missing):
    need(missing, 'limits')
    assert run_program('x = []\nwhile True: x.append(bytearray(10**7))').startswith('MemoryError')
    assert run_program('bytearray(3 * 2**30)') == 'MemoryError: '
    assert run_program('bytearray(2**30)', Limits(memory=2 * 2**30)) == 'passed'
    assert run_program('open("x", "wb").write(bytes(10**8))') == 'OSError: [Errno 27] File too large'


def test_fork_bombs(missing):
    need(missing, 'limits', 'privileges')
    assert 'Resource temporarily unavailable' in run_program('import os\nwhile True: os.fork()', Limits(seconds=20))
    count = (
        'import os, time\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: os.setsid(); time.sleep(1000)\n    n += 1\n'
        'except OSError: raise ValueError(n)'
    )
    outcome = run_program(count)
    assert outcome.startswith('ValueError: ') and int(outcome.split()[1]) <= 8


def test_nothing_outlives_a_program(missing):
    need(missing, 'namespaces')
    mark = f'mark{os.getpid()}x{time.monotonic_ns()}'
    program = (
        f'import os, sys, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n'
        f'    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "{mark}"])\n'
        f'  os._exit(0)\ntime.sleep(1)'
    )
    assert attempt(program, Limits(seconds=10), off=('audit',))[0] == 'passed'
    time.sleep(0.2)
    assert processes_running(mark) == []


SOCKET = 'import socket\ntry: socket.create_connection(("127.0.0.1", 22), 2)\nexcept ConnectionRefusedError: pass'
WRITE = 'import os\nos.close(os.open({path!r}, os.O_CREAT | os.O_WRONLY))'
READ = 'open({path!r}).read()'
LOCKS = ('namespaces', 'root', 'landlock', 'seccomp', 'audit')


def alone(program, lock, *also):
    """With one lock against files and the network, and the others open."""
    return attempt(program, Limits(), off=tuple(name for name in LOCKS if name not in (lock, *also)))[0]


def test_sockets(missing):
    assert run_program(SOCKET) != 'passed'
    assert run_program('import _socket; _socket.socket()') != 'passed'
    for lock, error in (('namespaces', 'OSError'), ('seccomp', 'PermissionError'), ('audit', 'PermissionError')):
        if lock not in missing:
            assert alone(SOCKET, lock).startswith(error), lock
    assert alone(SOCKET, '') == 'passed'  # or the test would prove nothing


@pytest.mark.parametrize('lock', ['root', 'landlock', 'audit'])
def test_files(missing, tmp_path, lock):
    """Reading a secret that everybody may read, and writing where everybody may write; only audit hooks allow reading."""
    need(missing, lock)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path('/'):
            folder.chmod(0o777)
    secret, target = tmp_path / 'secret', tmp_path / 'evil'
    secret.write_text('password')
    secret.chmod(0o644)
    read, write = READ.format(path=str(secret)), WRITE.format(path=str(target))
    assert alone(read, '') == 'passed'
    assert run_program(read) != 'passed' and run_program(write) != 'passed'
    if lock != 'audit':
        assert alone(read, lock, 'namespaces').startswith(('FileNotFoundError', 'PermissionError'))
    assert alone(write, lock, 'namespaces').startswith(('FileNotFoundError', 'PermissionError'))
    assert list(tmp_path.iterdir()) == [secret]
    assert alone(write, '') == 'passed' and target.exists()


def test_what_a_program_sees(missing, monkeypatch):
    monkeypatch.setenv('API_KEY', 'secret')
    look = 'import os\nassert "API_KEY" not in os.environ\nassert "secret" not in repr(dict(os.environ))'
    assert run_program(look) == 'passed'
    need(missing, 'root', 'namespaces', 'privileges')
    inside = 'import os\nassert not os.path.exists("/proc/1") and not os.path.exists("/etc/passwd")\nassert os.getuid() != 0'
    assert attempt(inside, Limits(), off=('landlock', 'audit'))[0] == 'passed'
    for command in ('os.kill(-1, 9)', 'os.setuid(0)', 'os.chroot("/tmp")'):
        assert attempt(f'import os; {command}', Limits(), off=('audit',))[0].startswith('PermissionError')


def test_what_is_not_enforced_is_said(monkeypatch):
    monkeypatch.setattr(
        sandbox, '_probe', lambda: {'namespaces': 'forbidden', 'seccomp': 'old', 'root': 'no', 'landlock': 'none'}
    )
    assert weaknesses() == [
        'programs could use the network (namespaces: forbidden; seccomp: old)',
        'programs could read and write files of this user (root: no; landlock: none)',
        'processes that a program starts could outlive it (namespaces: forbidden)',
    ]
    monkeypatch.setattr(sandbox, '_probe', dict)
    assert weaknesses() == []


def test_without_root():
    """Another user of this machine, with the system's Python: the same locks by way of a user namespace."""
    if os.getuid() != 0 or not os.path.exists('/usr/bin/python3'):
        pytest.skip('this needs root, to become somebody else, and a Python that everybody may run')
    program = (
        'import os, sys; sys.path.insert(0, sys.argv[1]); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n'
        'from llama2_jax.evals.sandbox import Limits, attempt, run_program\n'
        'print(sorted(attempt("pass", Limits())[1]))\n'
        'print(run_program("import os\\nwhile True: os.fork()"))\n'
        f'print(run_program({SOCKET!r}) == "passed")'
    )
    done = subprocess.run(
        ['/usr/bin/python3', '-c', program, str(ROOT)], capture_output=True, text=True, timeout=60, cwd='/', check=False
    )
    if 'PermissionError' in done.stderr or 'ModuleNotFoundError' in done.stderr:
        pytest.skip('the package lies where no other user may read it')
    locks, forks, network = done.stdout.splitlines()
    if 'namespaces' in locks:
        pytest.skip(f'other users have no namespaces here: {locks}')
    assert (locks, network) == ('[]', 'False') and 'Resource temporarily unavailable' in forks
