"""Worker processes that tokenise, fed and read in order; they end with the process that started them."""

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from llama2_jax.config import UserError


def run_in_order(items: Iterable[Any], work: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """Applies `work` to items on `workers` processes, results in order; holds a few items a worker.

    Raises:
      UserError: a worker was killed.
    """
    context = multiprocessing.get_context('spawn')  # never fork: JAX may be running threads
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work,)) as pool:
        pending = collections.deque()
        try:
            for item in items:
                with _without_main():
                    pending.append(pool.submit(_work, item))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError('A tokenising process was killed, perhaps for lack of memory; run again to continue.') from None
        finally:
            for future in pending:
                future.cancel()


def _start(work: Callable[[Any], Any]) -> None:
    global _worker
    _worker = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    end_with_parent()


def _work(item: Any) -> Any:
    return _worker(item)


def end_with_parent(*_) -> None:
    """Ends this worker process when its parent is gone: one that was killed cannot tell it, and the worker would wait forever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes started inside do not import the running script first: it would load JAX, and fail without a `__main__` guard."""
    main = sys.modules['__main__']
    sys.modules['__main__'] = types.ModuleType('__main__')
    try:
        yield
    finally:
        sys.modules['__main__'] = main
