"""Importing this restarts a program of `experiments/` or `benchmarks/` with malloc settings that keep memory, in huge pages.

XLA on a CPU asks for the memory of a step in each step, and conversion for that of a tensor for each tensor. By default glibc
gives it back to the system in between, which clears it again, 4 kB at a time: a third of a training step's time, up to half of
a conversion's. It does otherwise where the environment says so when a program begins, and only then.
"""

import os
import sys
from pathlib import Path

VARIABLE = 'GLIBC_TUNABLES'
# Pages of 2 MB; all memory from one heap; of which 16 GB that are free are kept.
VALUE = ':'.join(f'glibc.malloc.{name}' for name in ('hugetlb=1', 'mmap_max=0', 'arena_max=1', 'trim_threshold=16000000000'))


def restart() -> None:
    """Runs the same command in this process's place; whatever else imports this, such as a test, goes on as it is."""
    program = Path(getattr(sys.modules['__main__'], '__file__', None) or '').absolute()
    if sys.platform == 'linux' and VARIABLE not in os.environ and program.parent.name in ('experiments', 'benchmarks'):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {VARIABLE: VALUE})


restart()
