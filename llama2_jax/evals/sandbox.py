"""Runs a program that a model wrote, and its tests: processes without network that write nowhere but in a folder of their own.

The tests run in one process and the program in another, which gets arguments and gives back values (`sandbox_values`). Only the
first can say 'passed', and the program has no way to it, so that it cannot forge its grade.

Several locks lie over each other (`sandbox_child`): namespaces with a root directory of nothing but the interpreter, another
user, resource limits, Landlock and seccomp; memory and processes of a program and its children are counted together
(`sandbox_limits`). They need Linux and no root, but a machine may forbid some of them: `weaknesses` says what is then not
enforced. It is a fence against a model's mistakes and mischief, not against an expert with a new bug of the kernel.
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import py_compile
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from llama2_jax.config import UserError
from llama2_jax.evals.sandbox_limits import Watch, grouped

MODULES = ('sandbox_child', 'sandbox_values')
START = 'import sys; sys.path.insert(0, sys.argv[1]); import sandbox_child; sandbox_child.main()'
USERS = itertools.cycle(range(200_000, 260_000, 2))  # of nobody; two for each program, as limits on processes go by the user
ANSWER = 4096  # bytes of the outcome, at most
ENVIRONMENT = {'LANG': 'C.UTF-8', 'OPENBLAS_NUM_THREADS': '1', 'MALLOC_ARENA_MAX': '2'}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and what it must do.

    Attributes:
      code: The model's.
      tests: Code that raises if the program is wrong. Run in another process, which has of the program's names only `names`.
        Without tests the program passes if it comes to its end, for which there is only its own word.
      names: Functions and classes of the program that the tests use.
    """

    code: str
    tests: str = ''
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resources of a program.

    Attributes:
      seconds: Time by the clock; CPU time: one second more.
      memory: Bytes, of each process and of all together.
      processes: Number at a time, threads included.
    """

    seconds: float = 10.0
    memory: int = 2**30
    processes: int = 32


def run_program(program: Program, limits: Limits = Limits()) -> str:
    """Runs a Python program and its tests.

    Returns:
      'passed', or what went wrong: 'AssertionError: …', 'timed out', 'killed'.

    Raises:
      UserError: This system has no such sandbox at all.
    """
    return attempt(program, limits, () if _bubblewrap() else ('bubblewrap',))[0]


def weaknesses() -> list[str]:
    """What the sandbox cannot enforce on this machine, a sentence each, with the reason."""
    missing = _probe()

    def without(*names: str) -> str:
        return '; '.join(f'{name}: {missing[name]}' for name in names)

    found = []
    if {'namespaces', 'seccomp'} <= missing.keys():
        found.append(f'programs could use the network ({without("namespaces", "seccomp")})')
    if {'root', 'landlock'} <= missing.keys():
        found.append(f'programs could read and write files of this user ({without("root", "landlock")})')
    if 'root' in missing:
        found.append(f'programs could fill the disk that {tempfile.gettempdir()} lies on ({without("root")})')
    if 'inodes' in missing:
        found.append(f'programs could make any number of empty files in memory ({without("inodes")})')
    if 'namespaces' in missing:
        found.append(f'processes that a program starts could outlive it ({without("namespaces")})')
    if 'seccomp' in missing:
        found.append(f'programs could make user namespaces and use more of the kernel ({without("seccomp")})')
    if 'limits' in missing:
        found.append(f'CPU time, file sizes and the memory of a process are not limited ({without("limits")})')
    if 'memory' in missing:
        found.append(
            f'memory of all processes of a program together is looked at now and then, not limited ({without("memory")})'
        )
    if 'processes' in missing:
        found.append(f'the number of processes is looked at now and then, not limited ({without("processes")})')
    if 'privileges' in missing:
        found.append(f'programs run as this user, without capabilities ({without("privileges")})')
    return found


@cache
def _bubblewrap() -> bool:
    """Whether bubblewrap is installed and works here."""
    return bool(shutil.which('bwrap')) and attempt(Program('pass'), Limits(seconds=30))[0] == 'passed'


@cache
def _probe() -> dict[str, str]:
    outcome, missing = attempt(Program('pass'), Limits(seconds=30), () if _bubblewrap() else ('bubblewrap',))
    if outcome != 'passed':
        raise UserError(f'The sandbox does not work on this machine: an empty program ends with {outcome!r}.')
    return missing


def attempt(program: Program, limits: Limits, off: tuple[str, ...] = ()) -> tuple[str, dict[str, str]]:
    """As `run_program`: the outcome, and which locks could not be had, and why; locks in `off` are left open, for tests."""
    if sys.platform != 'linux':
        raise UserError(f'Generated programs are run in a sandbox that needs Linux, and this is {sys.platform}.')
    uid, missing = next(USERS), {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='program-', ignore_cleanup_errors=True))
        if os.getuid() == 0:
            with contextlib.suppress(OSError):  # in a user namespace there may be no other user; see 'privileges'
                os.chown(folder, uid, uid)
        groups = stack.enter_context(grouped(limits.memory, limits.processes, off, missing))
        code, tests = (stack.enter_context(_file(text)) for text in (program.code, program.tests))
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        bubblewrap = 'bubblewrap' not in off
        settings = {
            'bubblewrap': bubblewrap, 'folder': '/tmp' if bubblewrap else folder,
            'uid': uid, 'result': writing, 'code': code, 'tests': tests, 'names': program.names, 'groups': groups,
            'readable': _readable(), 'seconds': int(limits.seconds) + 1, 'memory': limits.memory,
            'processes': limits.processes, 'off': off,
        }  # fmt: skip
        process = subprocess.Popen(
            [*(_wrapped() if bubblewrap else ()), *_child('/sandbox' if bubblewrap else _compiled()), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd='/',
            env=ENVIRONMENT,
            pass_fds=[writing, code, tests, *groups],
            start_new_session=True,
        )
        os.close(writing)
        stack.callback(_end, process)
        watch = Watch(process.pid, limits.memory, limits.processes) if missing else None
        answer = _outcome(reading, limits.seconds, watch)
    first, _, outcome = answer.partition('\n')
    if not outcome:
        return first or 'killed', {}
    return outcome, missing | json.loads(first)


@cache
def _wrapped() -> list[str]:
    """The child's command inside bubblewrap: what it needs to read, and capabilities that it drops after its own locks."""
    command = ['bwrap', '--die-with-parent', '--unshare-pid', '--unshare-net', '--unshare-ipc', '--unshare-uts']
    command += [] if os.getuid() == 0 else ['--unshare-user']
    for capability in ('SYS_ADMIN', 'SETUID', 'SETGID'):
        command += ['--cap-add', f'CAP_{capability}']
    folders = {str(parent) for path in (*_readable(), '/dev/null', '/sandbox/x') for parent in Path(path).parents}
    for path in sorted(folders - {'/'} - set(_readable())):  # which bubblewrap would make for this user alone
        command += ['--perms', '0755', '--dir', path]
    for path in _readable():
        command += ['--symlink', os.readlink(path), path] if os.path.islink(path) else ['--ro-bind', path, path]
    for name in ('null', 'zero', 'urandom'):
        command += ['--dev-bind', f'/dev/{name}', f'/dev/{name}']
    command += [
        '--ro-bind',
        _compiled(),
        '/sandbox',
        '--symlink',
        '/tmp',
        '/dev/shm',
        '--tmpfs',
        '/tmp',
        '--remount-ro',
        '/',
        '--chdir',
        '/tmp',
    ]
    return command


def _child(folder: str) -> list[str]:
    return [sys.executable, '-I', '-B', '-c', START, folder]


@cache
def _compiled() -> str:
    """A folder with the child's modules, compiled once and not for each program."""
    folder = tempfile.mkdtemp(prefix='sandbox-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chmod(folder, 0o755)
    for name in MODULES:
        py_compile.compile(str(Path(__file__).with_name(f'{name}.py')), f'{folder}/{name}.pyc', doraise=True)
        os.chmod(f'{folder}/{name}.pyc', 0o644)
    return folder


@contextlib.contextmanager
def _file(text: str):
    """The descriptor of a nameless file with this text."""
    descriptor = os.memfd_create('program')
    try:
        os.write(descriptor, text.encode(errors='replace'))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _outcome(reading: int, seconds: float, watch: Watch | None) -> str:
    """What comes back over the pipe, or why nothing does."""
    deadline, answer = time.monotonic() + seconds, b''
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], min(left, 0.02) if watch else left)[0]:
            piece = os.read(reading, ANSWER)
            answer += piece
            if not piece:
                return answer.decode(errors='replace')
        elif watch and watch.exceeded():
            return 'killed'
    return 'timed out'


def _end(process: subprocess.Popen) -> None:
    """Kills it; the first process of its namespace dies with it, and so all others there do."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@cache
def _readable() -> tuple[str, ...]:
    """What a Python program needs to read: the system's libraries, the interpreter and the packages that are installed."""
    packages = [path for path in [*sys.path, *site.getsitepackages()] if path.endswith(('site-packages', 'dist-packages'))]
    roots = ['/usr', '/lib', '/lib64', '/lib32', '/bin', sys.base_prefix, sys.prefix, *packages]
    kept = [path for path in dict.fromkeys(roots) if os.path.isdir(path)]
    return tuple(path for path in kept if not any(path != other and path.startswith(other + '/') for other in kept))
