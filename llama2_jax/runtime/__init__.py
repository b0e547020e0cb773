"""Start-up: quiet libraries, several processes, chips, and the wrapper that turns a user's mistake into one sentence."""

import contextlib
import dataclasses
import glob
import importlib.util
import multiprocessing
import os
import platform
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llama2_jax.config import UserError
from llama2_jax.runtime.hosts import barrier as barrier
from llama2_jax.runtime.hosts import find_process_info, join
from llama2_jax.text.printable import printable


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as its maker publishes it.

    Attributes:
      peak_flops: dense bfloat16 FLOP/s.
      memory: bytes of device memory.
      bandwidth: bytes/s of device memory.
      link: bytes/s of one network link, one way; 0 where a step time is not predicted.
      torus: dimensions of that network.
      clock: Hz of the matrix units.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float = 0
    link: float = 0
    torus: int = 0
    clock: float = 0


# By the device kind that JAX reports.
CHIPS = {
    'TPU v3': Chip('v3 core', 61.5e12, 16e9, 4.5e11),  # JAX drives each of a chip's two cores as a device
    'TPU v4': Chip('v4', 275e12, 32 * 2**30, 1.2e12, 4.5e10, 3, 1.05e9),
    'TPU v5 lite': Chip('v5e', 197e12, 16 * 2**30, 8.1e11, 4.5e10, 2, 1.5e9),
    'TPU v5e': Chip('v5e', 197e12, 16 * 2**30, 8.1e11, 4.5e10, 2, 1.5e9),
    'TPU v5': Chip('v5p', 459e12, 95 * 2**30, 2.765e12, 9.0e10, 3, 1.75e9),
    'TPU v5p': Chip('v5p', 459e12, 95 * 2**30, 2.765e12, 9.0e10, 3, 1.75e9),
    'TPU v6 lite': Chip('v6e', 918e12, 32 * 2**30, 1.64e12, 9.0e10, 2, 1.75e9),
    'TPU v6e': Chip('v6e', 918e12, 32 * 2**30, 1.64e12, 9.0e10, 2, 1.75e9),
    'NVIDIA A100-SXM4-80GB': Chip('A100', 312e12, 80e9, 2.0e12),
    'NVIDIA H100 80GB HBM3': Chip('H100', 989e12, 80e9, 3.35e12),
    'NVIDIA H200': Chip('H200', 989e12, 141e9, 4.8e12),
}


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device's chip; None for CPUs and chips not in the table."""
    return CHIPS.get(device.device_kind)


# Weight gathers and gradient scatters run on the SparseCores of the chips that have them, beside the matrix units. Left alone the
# compiler makes synchronous all-reduces of the gathers, with twice the bytes.
SPARSE_CORES = ('v5p',)
SPARSE_CORE_OPTIONS = (
    'xla_tpu_enable_sparse_core_collective_offload_all_gather',
    'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather',
    'xla_tpu_enable_sparse_core_collective_offload_3d_all_gather',
    'xla_tpu_prefer_async_allgather_to_allreduce',
    'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter',
    'xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter',
)


def compiler_options(device: jax.Device) -> dict[str, str]:
    """For `jax.jit(…, compiler_options=…)` of a training step on such devices."""
    if device.platform != 'tpu':
        return {}
    # This pass stops with an internal error at gradients that are summed over microbatches.
    options = {'xla_disable_hlo_passes': 'while-loop-all-reduce-code-motion'}
    chip = chip_of(device)
    return options | dict.fromkeys(SPARSE_CORE_OPTIONS, 'true') if chip and chip.name in SPARSE_CORES else options


# Device files of TPUs, and of GPUs by NVIDIA (also under WSL) and AMD.
ACCELERATORS = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/dxg', '/dev/kfd')


def keep_libtpu_unloaded() -> None:
    """Tells JAX to use the CPU on a machine without an accelerator where libtpu is installed for dry runs.

    Left alone JAX starts the TPU runtime to look for chips, which prints errors about the accelerator type and host names.
    """
    if jax.config.jax_platforms or not importlib.util.find_spec('libtpu'):
        return
    if not any(glob.glob(pattern) for pattern in ACCELERATORS):
        jax.config.update('jax_platforms', 'cpu')


def start() -> None:
    """Once per process, before any array: joins the other processes of a run, where there are any.

    LLAMA2_JAX_COORDINATOR=auto, set on every host of a TPU pod or a Slurm job, lets JAX find them. Elsewhere it is
    host:port, and LLAMA2_JAX_PROCESSES and LLAMA2_JAX_PROCESS tell how many there are and which one this is.
    """
    # Two programs in flight on faked CPU devices can take each other's threads, and wait for ever for their collectives.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    keep_libtpu_unloaded()
    keep_compiled()
    if place := find_process_info():
        join(place)


def keep_compiled() -> None:
    """Has JAX keep what it compiles on disk, so that the next process does not compile it again.

    In $JAX_COMPILATION_CACHE_DIR, or beside the token caches in a directory of this kind of processor: a home directory may be
    shared by machines on which the instructions of others do not run.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    root = Path(os.environ.get('LLAMA2_JAX_CACHE') or '~/.cache/llama2_jax').expanduser()
    with contextlib.suppress(OSError, RuntimeError):  # without a home, or on a full disk, it is compiled again
        info = Path('/proc/cpuinfo')
        kinds = (
            {line for line in info.read_text().splitlines() if line.startswith(('flags', 'Features'))} if info.exists() else {''}
        )
        directory = root / 'compiled' / f'{platform.machine()}-{zlib.crc32(repr(sorted(kinds)).encode()):08x}'
        directory.mkdir(parents=True, exist_ok=True)
        jax.config.update('jax_compilation_cache_dir', str(directory))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


class Stopped(SystemExit):
    """SIGTERM, on its way up to `user_errors`."""


def _leave(code: int) -> None:
    """Ends the process without its farewell, in which XLA may crash when a call of it was interrupted."""
    for child in multiprocessing.active_children():
        child.terminate()
    with contextlib.suppress(OSError):  # a pipe whose reader is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one sentence and exit code 1 for a UserError; other errors keep their traceback.

    SIGTERM and Ctrl-C end it with 143 and 130 once open files are closed; the training loop has handlers of its own.
    One of several processes ends at once: the others may wait for it, and its farewell would wait for them.
    """
    owner, before = os.getpid(), None
    if threading.current_thread() is threading.main_thread():

        def end(number: int, _: Any) -> None:
            if os.getpid() != owner:  # a forked worker
                os._exit(128 + number)
            raise Stopped(128 + number)

        before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except UserError as error:
        if jax.distributed.is_initialized():
            print(f'Error: {printable(str(error))}', file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(f'Error: {printable(str(error))}')
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except Stopped as stopped:
        _leave(stopped.code)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def is_main_process() -> bool:
    """Whether this process writes the logs and files that one process writes for all."""
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints text, from the main process only; control characters, which data or names may hold, are escaped."""
    if is_main_process():
        print(printable(text), flush=True)
