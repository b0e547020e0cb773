"""The processes of a run: how they find each other, and what is said when one of them does not come.

JAX by itself waits: for a host that was never started until it aborts with a stack trace, at a barrier for ever. Here every wait
has an end, and the sentence it ends in names the host.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from llama2_jax.config import UserError
from llama2_jax.text.printable import printable

DAY = 24 * 3600.0
_barriers = itertools.count()  # every process comes to the same barriers in the same order
_names: list[str] = []  # of the hosts, by process


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """A process's place among those of its run: the address of process 0, how many there are, and which one this is."""

    address: str
    count: int
    index: int


def start_timeout() -> float:
    """Seconds that a process waits for the others: LLAMA2_JAX_TIMEOUT, by default 600."""
    text = os.environ.get('LLAMA2_JAX_TIMEOUT', '600')
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise UserError(f'LLAMA2_JAX_TIMEOUT={text} must be a number of seconds.')


def find_process_info() -> ProcessInfo | None:
    """Where LLAMA2_JAX_COORDINATOR puts this process; None: it is alone.

    Raises:
      UserError: the variables are incomplete, or 'auto' finds no TPU pod and no Slurm job.
    """
    address = os.environ.get('LLAMA2_JAX_COORDINATOR')
    if not address:
        return None
    if address == 'auto':
        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(start_timeout()))
        except Exception as error:  # of whatever kind: requests to the cloud's metadata fail in many ways
            raise UserError(f'LLAMA2_JAX_COORDINATOR=auto: {str(error).splitlines()[0]}') from None
        if None in found[:3]:
            raise UserError('LLAMA2_JAX_COORDINATOR=auto finds neither a TPU pod nor a Slurm job here; give it host:port.')
        return ProcessInfo(*found[:3])
    try:
        count, index = int(os.environ['LLAMA2_JAX_PROCESSES']), int(os.environ['LLAMA2_JAX_PROCESS'])
    except (KeyError, ValueError):
        raise UserError(
            'LLAMA2_JAX_COORDINATOR is set, so LLAMA2_JAX_PROCESSES and LLAMA2_JAX_PROCESS must be whole numbers.'
        ) from None
    if not 0 <= index < count or not address.rpartition(':')[2].isdigit():
        raise UserError(
            f'LLAMA2_JAX_COORDINATOR={address} must be host:port, and LLAMA2_JAX_PROCESS={index} one of 0 to {count - 1}.'
        )
    return ProcessInfo(address, count, index)


def join(process: ProcessInfo) -> None:
    """Connects this process with the others of its run, once all are there.

    Raises:
      UserError: some have not come in time; on process 0 it says which.
    """
    _names[:] = [facts['host'] for facts in handshake(process, {'host': socket.gethostname()}, start_timeout())]
    # JAX gives each task of a Slurm job the one GPU of its number on the node: a node's only task would use one of eight.
    tasks, nodes = os.environ.get('SLURM_NTASKS'), os.environ.get('SLURM_STEP_NUM_NODES')
    method = 'deactivate' if tasks and tasks == nodes else None
    jax.distributed.initialize(process.address, process.count, process.index, cluster_detection_method=method)
    _sigaction(None, _preemption)
    expect_preemption(False)


# JAX's handler of SIGTERM, as the C library gives it: an opaque struct, smaller than this on every system.
_preemption = ctypes.create_string_buffer(1024)


def expect_preemption(expected: bool) -> None:
    """Sets whether a SIGTERM makes all processes save and stop together, which needs a loop that polls for it.

    Elsewhere SIGTERM ends a process at once: JAX's handler would keep it alive through hours of tokenising or compiling.
    """
    if not _names:  # not joined by `join`: JAX's handler was not kept
        return
    if expected:
        _sigaction(_preemption, None)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sigaction(new: Any, old: Any) -> None:
    ctypes.CDLL(None).sigaction(signal.SIGTERM, new, old)


def code_fingerprint() -> str:
    """A checksum of the package's code as it is here."""
    root, total = Path(__file__).parents[1], 0
    for path in sorted(root.rglob('*.py')):
        total = zlib.crc32(path.read_bytes(), zlib.crc32(path.relative_to(root).as_posix().encode(), total))
    return f'{total:08x}'


def gather(text: str) -> list[str]:
    """The texts of all processes, by process; every process calls it."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array(len(content)))))
    rows = multihost_utils.process_allgather(np.pad(content, (0, longest - len(content)), constant_values=ord(' ')))
    return [bytes(row).decode().rstrip(' ') for row in rows]


def handshake(process: ProcessInfo, facts: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """What every process says of itself, by process; needs neither JAX nor its devices, which would wait for the missing.

    Raises:
      UserError: not all have come within so many seconds.
    """
    host, _, port = process.address.rpartition(':')
    until = time.monotonic() + seconds
    if process.index == 0:
        return _call(int(port), process, facts, until, seconds)
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(json.dumps([process.index, process.count, facts]).encode() + b'\n')
            connection.settimeout(max(until - time.monotonic(), 0.1) + 5)  # it is process 0 that says who is missing
            answer = _read(connection)
            if isinstance(answer, str):
                raise UserError(answer)
            return answer
        time.sleep(0.2)
    raise UserError(
        f'Process {process.index} on {socket.gethostname()} has not reached process 0 at {process.address} in {seconds:g} s.'
    )


def _call(port: int, process: ProcessInfo, facts: Mapping[str, Any], until: float, seconds: float) -> list[dict[str, Any]]:
    """The side of process 0: hears all, and answers all at once."""
    heard: dict[int, Any] = {0: facts}
    with contextlib.ExitStack() as stack, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(('', port))
        except OSError as error:
            raise UserError(f'Process 0 cannot listen at {process.address}: {error.strerror}.') from None
        server.listen(process.count)
        connections, answer = [], None
        while len(heard) < process.count and not answer and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # a connection that breaks off is made again
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                index, count, theirs = _read(connection)
                connections.append(connection)
                heard[index] = theirs
                if count != process.count:
                    answer = f'Process {index} on {theirs["host"]} counts {count} processes, process 0 counts {process.count}.'
        if missing := sorted(set(range(process.count)) - heard.keys()):
            answer = answer or f'Did not come within {seconds:g} s: {name_all(missing, expected_hosts(process.count))}.'
        answer = answer or [heard[index] for index in range(process.count)]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b'\n')
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _read(connection: socket.socket) -> Any:
    with connection.makefile() as file:
        return json.loads(file.readline())


def expected_hosts(count: int) -> list[str]:
    """Names of the hosts as a TPU pod tells them before they come; none where it does not."""
    names = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
    return names if len(names) == count and all(names) else []


def name_all(processes: Sequence[int], hosts: Sequence[str]) -> str:
    """For people: 'process 3 on host-3, process 4 on host-4 and 12 more'."""
    shown = [f'process {index}' + (f' on {hosts[index]}' if index < len(hosts) else '') for index in processes[:8]]
    return ', '.join(shown) + (f' and {len(processes) - 8} more' if len(processes) > 8 else '')


def barrier(name: str, seconds: float | None = None) -> None:
    """Waits until every process has come here; by default for as long as `start_timeout`. A tenth of that is waited in silence.

    Raises:
      UserError: some have not come; they are named.
    """
    if jax.process_count() == 1:
        return
    client, key = distributed.global_state.client, f'llama2_jax/barrier {next(_barriers)}'
    client.key_value_set(f'{key}/{jax.process_index()}', name)
    limit = start_timeout() if seconds is None else seconds

    def missing() -> tuple[set[int], str]:
        here = {int(path.rpartition('/')[2]) for path, _ in client.key_value_dir_get(key)}
        return here, name_all(sorted(set(range(jax.process_count())) - here), _names)

    def report() -> None:
        here, text = missing()
        if text and jax.process_index() == min(here):  # one speaks for all who wait
            print(printable(f'Waiting at the barrier {name!r} for {text}.'), file=sys.stderr, flush=True)

    timer = threading.Timer(start_timeout() / 10, report)
    timer.daemon = True
    timer.start()
    try:
        client.wait_at_barrier(f'{key} {name}', int(limit * 1000))
    except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
            raise
        raise UserError(
            f'Not at the barrier {name!r} within {limit:g} s: {missing()[1]}. The same command again continues.'
        ) from None
    finally:
        timer.cancel()


class Watch:
    """Reports unresponsive processes and, if all are stuck, the slowest one; never terminates them.

    A context manager: a thread publishes the step at which this process is, and process 0 looks at all of them.
    """

    def __init__(self) -> None:
        self._step, self._since = 0, time.monotonic()
        self._over = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}  # by process: what it said last, and since when it says so
        self._said: set[str] = set()

    def __enter__(self) -> 'Watch':
        if jax.process_count() > 1:
            threading.Thread(target=self._run, args=(start_timeout(), distributed.global_state.client), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def at(self, step: int) -> None:
        """This process begins a step."""
        self._step, self._since = step, time.monotonic()

    def _run(self, limit: float, client: Any) -> None:
        for beat in itertools.count():
            if self._over.wait(min(limit / 20, 10)):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service ends before the process does
                me = f'llama2_jax/beat/{jax.process_index()}'
                client.key_value_set(me, f'{self._step} {beat}', allow_overwrite=True)
                if jax.process_index() == 0:
                    self._look(client.key_value_dir_get('llama2_jax/beat'), limit)

    def _look(self, beats: list[tuple[str, str]], limit: float) -> None:
        now, quiet = time.monotonic(), min(limit / 5, 40)  # JAX ends all after a hundred seconds, and gives numbers only
        for path, value in beats:
            index = int(path.rpartition('/')[2])
            if self._heard.get(index, ('', 0))[0] != value:
                self._heard[index] = value, now
        silent = sorted(index for index, (_, since) in self._heard.items() if now - since > quiet)
        if silent:
            self._log(f'Not heard of for {quiet:g} s: {name_all(silent, _names)}.')
        elif now - self._since > limit:
            steps = {index: int(value.partition(' ')[0]) for index, (value, _) in self._heard.items()}
            least, most = min(steps.values()), max(steps.values())
            behind = name_all(sorted(index for index, step in steps.items() if step == least), _names)
            self._log(
                f'No step for {limit:g} s: ' + (f'{behind} at step {least} of {most}.' if least < most else 'all at one step.')
            )

    def _log(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(printable(text), file=sys.stderr, flush=True)
