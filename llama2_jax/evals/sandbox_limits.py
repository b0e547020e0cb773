"""Memory and processes of a program and all its children together: control groups where they can be had, else a watch."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

OVERHEAD = 2**26  # bytes of the sandbox's own processes
OWN = 6  # processes of the sandbox itself, at most
FILES = {  # of version 1 and 2
    'memory': (('memory.limit_in_bytes', 'memory.max'), ('memory.memsw.limit_in_bytes', 'memory.swap.max')),
    'processes': (('pids.max', 'pids.max'), ()),
}
PAGE = os.sysconf('SC_PAGE_SIZE')


@contextlib.contextmanager
def grouped(memory: int, processes: int, off: tuple[str, ...], missing: dict[str, str]) -> Iterator[list[int]]:
    """Control groups for one program; adds to `missing` what they cannot limit.

    Yields:
      Descriptors; a process that writes '0' to each of them is in the groups.
    """
    made: dict[Path, None] = {}
    descriptors: list[int] = []
    try:
        for kind, most in (('memory', memory + OVERHEAD), ('processes', processes + OWN)):
            try:
                if kind in off:
                    raise OSError('switched off')
                parent, version = _place(kind)
                group = next((group for group in made if group.parent == parent), parent / f'program-{uuid.uuid4().hex[:12]}')
                if group not in made:
                    group.mkdir()
                    made[group] = None
                    descriptors.append(os.open(group / 'cgroup.procs', os.O_WRONLY))
                limit, swap = FILES[kind]
                (group / limit[version]).write_text(str(most))
                if swap and (group / swap[version]).exists():
                    (group / swap[version]).write_text(str((most, 0)[version]))
            except OSError as error:
                missing[kind] = error.strerror or str(error)
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        for group in made:
            _remove(group)


def _remove(group: Path) -> None:
    """Kills what is left in a group, and deletes it."""
    for _ in range(200):
        for number in (group / 'cgroup.procs').read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        with contextlib.suppress(OSError):  # until the last process is gone
            group.rmdir()
            return
        time.sleep(0.005)


def _place(kind: str) -> tuple[Path, int]:
    """The directory in which groups can be made, and 0 or 1 for version 1 or 2; raises OSError."""
    found = _places().get(kind)
    if not found:
        raise OSError('no control group of which this user may make children')
    return found


@cache
def _places() -> dict[str, tuple[Path, int]]:
    """Where this process may make groups that limit memory and processes."""
    found: dict[str, tuple[Path, int]] = {}
    with contextlib.suppress(OSError):
        own = [line.split(':', 2) for line in Path('/proc/self/cgroup').read_text().splitlines()]
        lines = Path('/proc/self/mountinfo').read_text().splitlines()
        mounts = [line.split(' - ') for line in lines if ' - cgroup' in line]
        for kind, controller in (('memory', 'memory'), ('processes', 'pids')):
            for left, right in mounts:
                root, point = left.split()[3:5]
                version = int(right.startswith('cgroup2 '))
                controllers = '' if version else controller
                path = next((path for _, names, path in own if controllers in names.split(',')), None)
                if path is None or not version and controller not in right.split()[-1].split(','):
                    continue
                inside = Path(point) / os.path.relpath(path, root)
                here = inside if inside.is_dir() else Path(point)
                # In version 2 a group with processes has no children with limits, but it may have sisters.
                for parent in (here, here.parent) if version and here != Path(point) else (here,):
                    if _usable(parent, FILES[kind][0][version], controller, version) and kind not in found:
                        found[kind] = (parent, version)
    return found


def _usable(parent: Path, limit: str, controller: str, version: int) -> bool:
    """Whether a group can be made here whose limit holds."""
    group = parent / f'probe-{uuid.uuid4().hex[:12]}'
    try:
        if version and controller not in (parent / 'cgroup.subtree_control').read_text().split():
            return False
        group.mkdir()
        try:
            return os.access(group / limit, os.W_OK) and os.access(parent / 'cgroup.procs', os.W_OK)
        finally:
            group.rmdir()
    except OSError:
        return False


class Watch:
    """Looks at the processes of a program, where no control group counts them."""

    def __init__(self, first: int, memory: int, processes: int):
        self.first, self.memory, self.processes = first, memory + OVERHEAD, processes + OWN

    def exceeded(self) -> bool:
        """Whether the descendants of the first process hold too much memory or are too many; they are then to be killed."""
        parents: dict[int, list[tuple[int, int, int]]] = {}
        for name in os.listdir('/proc'):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    with open(f'/proc/{name}/stat', 'rb') as file:
                        fields = file.read().rpartition(b')')[2].split()
                    parents.setdefault(int(fields[1]), []).append((int(name), int(fields[17]), int(fields[21]) * PAGE))
        waiting, threads, memory = [self.first], 0, 0
        while waiting:
            for number, count, size in parents.get(waiting.pop(), ()):
                waiting.append(number)
                threads, memory = threads + count, memory + size
        return threads > self.processes or memory > self.memory
