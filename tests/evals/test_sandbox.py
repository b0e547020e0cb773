"""The sandbox: attacks tried for real, under every lock and every kind of user that this machine has."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llama2_jax.evals import sandbox
from llama2_jax.evals.sandbox import Limits, Program, attempt, run_program, weaknesses

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the sandbox needs Linux')
EVALS = Path(sandbox.__file__).parent
OWN = ('bubblewrap',)  # switched off: the sandbox's own locks
LOCKS = ('namespaces', 'root', 'landlock', 'seccomp')


@pytest.fixture(scope='module')
def missing():
    """Locks that this machine does not have, with the reasons."""
    return attempt(Program('pass'), Limits(seconds=30), OWN)[1]


def need(missing, *locks):
    for lock in locks:
        if lock in missing:
            pytest.skip(f'this machine has no {lock}: {missing[lock]}')


@pytest.fixture(scope='module')
def everybody():
    """The sandbox and the list of attacks where every user can read them; pytest closes its own folders at each start."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        (home / 'llama2_jax/evals').mkdir(parents=True)
        for path in (EVALS.parent / '__init__.py', EVALS.parent / 'config.py'):
            shutil.copy(path, home / 'llama2_jax')
        for path in (EVALS / '__init__.py', *EVALS.glob('sandbox*.py')):
            shutil.copy(path, home / 'llama2_jax/evals')
        shutil.copy(Path(__file__).with_name('attacks.py'), home)
        yield home


SYSTEM = '/usr/bin/python3'  # which every user may run
USERS = {
    'this user': [sys.executable],
    'nobody': ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', SYSTEM],
    'without CAP_SYS_ADMIN': ['setpriv', '--bounding-set=-sys_admin', SYSTEM],
    'a rootless container': ['unshare', '-Ur', SYSTEM],
}


def attacks(home, user, *off):
    """Outcomes of the whole list: kind -> name -> outcome, and the locks that are missing."""
    if user != 'this user' and (os.getuid() != 0 or not os.path.exists(SYSTEM) or not shutil.which('setpriv')):
        pytest.skip(f'to become {user} this needs root, util-linux and {SYSTEM}')
    if not off and not shutil.which('bwrap'):
        pytest.skip('bubblewrap is not installed')
    environment = {'PATH': os.environ['PATH'], 'PYTHONPATH': str(home), 'PYTHONDONTWRITEBYTECODE': '1'}
    command = [*USERS[user], home / 'attacks.py', *off]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd='/', env=environment, check=False)
    if user == 'a rootless container' and done.stderr.startswith('unshare:'):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found):
    missing = found['missing']
    assert {name for name, outcome in found['forgeries'].items() if outcome == 'passed'} == set()
    assert {name: outcome for name, outcome in found['honest'].items() if outcome != 'passed'} == {}
    assert [len(found[kind]) for kind in ('forgeries', 'escapes', 'excesses', 'honest')] >= [52, 32, 12, 29]
    if missing.keys() <= {'privileges', 'memory', 'processes'}:
        for kind in ('escapes', 'excesses'):
            assert {name for name, outcome in found[kind].items() if outcome == 'passed'} == set()


def test_attacks_fail_and_honest_programs_pass(everybody):
    check(attacks(everybody, 'this user', *OWN))


@pytest.mark.slow
@pytest.mark.parametrize('off', [OWN, ()], ids=['own locks', 'bubblewrap'])
@pytest.mark.parametrize('user', USERS)
def test_attacks_of_every_user(everybody, user, off):
    check(attacks(everybody, user, *off))


@pytest.mark.parametrize(
    'locks', [('seccomp',), ('seccomp', 'landlock'), ('namespaces', 'landlock', 'memory', 'processes')], ids='+'.join
)
def test_forgeries_fail_with_locks_missing(locks):
    """The checker is another process that no other may look into, whatever else is missing."""
    trace = (
        'import ctypes\ndef f(x):\n  l = ctypes.CDLL(None)\n  for p in range(1, 99): l.kill(p, 0)\n'
        '  return "never" if any(l.ptrace(16, p, 0, 0) == 0 for p in range(1, 99)) else 0'
    )
    memory = (
        'import os\ndef f(x):\n  for p in filter(str.isdigit, os.listdir("/proc")):\n'
        '    if p != str(os.getpid()):\n      try: return open(f"/proc/{p}/mem", "r+b") and "never"\n      except OSError: pass'
    )
    for code in (trace, memory):
        program = Program(code, 'x = f(1)\nassert x == "never"', ('f',))
        assert attempt(program, Limits(), (*OWN, *locks))[0] != 'passed'


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
    assert run_program(Program(program)) == outcome


@pytest.mark.parametrize('program', ['while True: pass', 'import time; time.sleep(1000)', '10**10**10'])
def test_endless_programs_end(program):
    began = time.monotonic()
    assert run_program(Program(program), Limits(seconds=1)) == 'timed out'
    assert run_program(Program('def f(): pass', program, ('f',)), Limits(seconds=1)) == 'timed out'
    assert time.monotonic() - began < 20


def test_limits_of_one_process(missing):
    need(missing, 'limits')
    assert run_program(Program('x = []\nwhile True: x.append(bytearray(10**7))')).startswith('MemoryError')
    assert run_program(Program('bytearray(3 * 2**30)')) == 'MemoryError: '
    assert run_program(Program('bytearray(2**30)'), Limits(memory=2 * 2**30)) == 'passed'
    assert run_program(Program('open("x", "wb").write(bytes(10**8))')) == 'OSError: [Errno 27] File too large'


@pytest.mark.parametrize('off', [OWN, (*OWN, 'limits'), (*OWN, 'memory', 'processes', 'limits')], ids='+'.join)
def test_fork_bombs_end(off):
    began = time.monotonic()
    outcome = attempt(Program('import os\nwhile True: os.fork()'), Limits(seconds=20), off)[0]
    assert outcome in ('killed', 'BlockingIOError: [Errno 11] Resource temporarily unavailable')
    assert time.monotonic() - began < 15


def test_nothing_outlives_a_program(missing):
    need(missing, 'namespaces')
    mark = f'mark{os.getpid()}x{time.monotonic_ns()}'
    program = (
        f'import os, sys, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n'
        f'    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "{mark}"])\n'
        f'  os._exit(0)\ntime.sleep(1)'
    )
    assert run_program(Program(program)) == 'passed'
    time.sleep(0.2)
    running = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            running += [path] * (mark in path.read_bytes().decode(errors='replace'))
        except OSError:
            continue
    assert running == []


SOCKET = 'import socket\ntry: socket.create_connection(("127.0.0.1", 22), 2)\nexcept ConnectionRefusedError: pass'
WRITE = 'import os\nos.close(os.open({path!r}, os.O_CREAT | os.O_WRONLY))'
READ = 'open({path!r}).read()'


def alone(program, lock, *also):
    """With one lock against files and the network, and the others open."""
    return attempt(Program(program), Limits(), (*OWN, *(name for name in LOCKS if name not in (lock, *also))))[0]


def test_sockets(missing):
    for lock, error in (('namespaces', 'OSError'), ('seccomp', 'PermissionError')):
        if lock not in missing:
            assert alone(SOCKET, lock).startswith(error), lock
    assert alone(SOCKET, '') == 'passed'  # or the test would prove nothing


@pytest.mark.parametrize('lock', ['root', 'landlock'])
def test_files(missing, tmp_path, lock):
    """Reading a secret that everybody may read, and writing where everybody may write."""
    need(missing, lock)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path('/'):
            folder.chmod(0o777)
    secret, target = tmp_path / 'secret', tmp_path / 'evil'
    secret.write_text('password')
    secret.chmod(0o644)
    read, write = READ.format(path=str(secret)), WRITE.format(path=str(target))
    assert alone(read, '') == 'passed'
    assert run_program(Program(read)) != 'passed' and run_program(Program(write)) != 'passed'
    assert alone(read, lock, 'namespaces').startswith(('FileNotFoundError', 'PermissionError'))
    assert alone(write, lock, 'namespaces').startswith(('FileNotFoundError', 'PermissionError'))
    assert list(tmp_path.iterdir()) == [secret]
    assert alone(write, '') == 'passed' and target.exists()


def test_what_a_program_sees(missing, monkeypatch):
    monkeypatch.setenv('API_KEY', 'secret')
    look = 'import os\nassert "API_KEY" not in os.environ\nassert "secret" not in repr(dict(os.environ))'
    assert run_program(Program(look)) == 'passed'
    need(missing, 'root', 'namespaces', 'privileges')
    inside = 'import os\nassert not os.path.exists("/proc/1") and not os.path.exists("/etc/passwd")\nassert os.getuid() != 0'
    assert attempt(Program(inside), Limits(), (*OWN, 'landlock'))[0] == 'passed'


def test_weaknesses_name_every_missing_lock(monkeypatch):
    locks = ('namespaces', 'root', 'landlock', 'seccomp', 'limits', 'memory', 'processes', 'privileges', 'inodes')
    monkeypatch.setattr(sandbox, '_probe', lambda: dict.fromkeys(locks, 'no'))
    found = ' '.join(weaknesses())
    for word in (
        *locks,
        'network',
        'files of this user',
        'disk',
        'outlive',
        'memory of all',
        'number of processes',
        'empty files',
    ):
        assert word in found
    monkeypatch.setattr(sandbox, '_probe', lambda: {'processes': 'no cgroup'})
    assert len(weaknesses()) == 1
    monkeypatch.setattr(sandbox, '_probe', dict)
    assert weaknesses() == []
