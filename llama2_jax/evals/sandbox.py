"""Runs a program that a model wrote: a process of its own without network, that writes nowhere but in a folder of its own.

Several locks lie over each other (`sandbox_child`): namespaces with a root directory of nothing but the interpreter, another
user, resource limits, Landlock, seccomp, audit hooks. They need Linux and no root, but a machine may forbid some of them:
`weaknesses` says what is then not enforced. It is a fence against a model's mistakes and mischief, not against an expert with a
new bug of the kernel.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from llama2_jax.config import UserError

CHILD = Path(__file__).with_name('sandbox_child.py')
USERS = itertools.cycle(range(200_000, 260_000))  # of nobody; one for each program, as limits on processes go by the user
ANSWER = 4096  # bytes of the outcome, at most


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
      seconds: of the clock; of computing, one more.
      memory: bytes of each process.
      processes: at a time, threads too.
    """

    seconds: float = 10.0
    memory: int = 2**30
    processes: int = 8


def run_program(code: str, limits: Limits = Limits()) -> str:
    """Runs a Python program to its end.

    Returns:
      'passed', or what went wrong: 'AssertionError: …', 'timed out', 'killed'.

    Raises:
      UserError: this system has no such fence at all.
    """
    return attempt(code, limits)[0]


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
    if 'namespaces' in missing:
        found.append(f'processes that a program starts could outlive it ({without("namespaces")})')
    if 'limits' in missing:
        found.append(f'memory and processes are not limited ({without("limits")})')
    if 'privileges' in missing:
        found.append(f'programs keep the rights of this user ({without("privileges")})')
    return found


@cache
def _probe() -> dict[str, str]:
    outcome, missing = attempt('pass', Limits(seconds=30))
    if outcome != 'passed':
        raise UserError(f'The sandbox does not work on this machine: an empty program ends with {outcome!r}.')
    return missing


def attempt(code: str, limits: Limits, off: tuple[str, ...] = ()) -> tuple[str, dict[str, str]]:
    """As `run_program`: the outcome, and which locks could not be had, and why; locks in `off` are left open, for tests."""
    if sys.platform != 'linux':
        raise UserError(f'Generated programs are run in a sandbox that needs Linux, and this is {sys.platform}.')
    token, uid = secrets.token_hex(16), next(USERS)
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix='program-') as folder:
        if os.getuid() == 0:
            os.chown(folder, uid, uid)
        settings = dataclasses.asdict(limits) | {
            'folder': folder, 'uid': uid, 'token': token, 'result': writing, 'readable': _readable(),
            'seconds': int(limits.seconds) + 1, 'off': off,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, '-I', '-B', CHILD, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd='/',
            env={'LANG': 'C.UTF-8', 'OPENBLAS_NUM_THREADS': '1'},
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        try:
            answer = _talk(process, reading, code.encode(errors='replace'), limits.seconds)
        finally:
            os.close(reading)
            _end(process)
    if answer is None:
        return 'timed out', {}
    first, _, outcome = answer.decode(errors='replace').partition('\n')
    missing = json.loads(first) if outcome else {}
    if outcome.startswith('passed'):
        outcome = 'passed' if outcome == f'passed {token}' else 'forged'
    return outcome or 'killed', missing


def _talk(process: subprocess.Popen, reading: int, code: bytes, seconds: float) -> bytes | None:
    """What comes back over the pipe; None after too long."""
    deadline, answer = time.monotonic() + seconds, b''
    try:
        process.stdin.write(code)
        process.stdin.close()
    except BrokenPipeError:
        return answer
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            piece = os.read(reading, ANSWER)
            answer += piece
            if not piece or len(answer) >= ANSWER or b'\n' in answer and answer.split(b'\n', 1)[1]:
                return answer
    return None


def _end(process: subprocess.Popen) -> None:
    """Kills it; the first process of its namespace dies with it, and so all others there do."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@cache
def _readable() -> tuple[str, ...]:
    """What a Python program needs to read."""
    roots = ['/usr', '/lib', '/lib64', '/lib32', '/bin', sys.base_prefix, sys.prefix]
    kept = [path for path in dict.fromkeys(roots) if os.path.isdir(path)]
    return tuple(path for path in kept if not any(path != other and path.startswith(other + '/') for other in kept))
