"""The loop every stage shares but PPO: it knows steps, batches and files, and nothing of models.

At any moment the process may be killed; the same command then continues from the newest sound checkpoint, and the
parameters and the loss trace come out bit for bit as if nothing had happened. That holds because batch k is a function
of k, because a checkpoint carries the step and all counters, and because lines beyond it are dropped and written again.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from llama2_jax.config import Config, UserError, between
from llama2_jax.files import locate
from llama2_jax.runtime.hosts import Watch, expect_preemption
from llama2_jax.runtime.workdir import report_disk_full
from llama2_jax.train.checkpoint import Checkpoints, Tree
from llama2_jax.train.metrics import Meter, Progress, Report, lost_metrics

HELDOUT = 'heldout/loss'  # the evaluation that decides which checkpoint is best


@dataclasses.dataclass(frozen=True)
class LoopConfig(Config):
    """How often what happens, in steps; 0 is never, and the last step does everything. No result depends on these."""

    log_every: int = between(10, 1)
    eval_every: int = 500
    sample_every: int = 500
    checkpoint_every: int = 500  # a multiple of eval_every, or there is no best checkpoint to keep
    keep_last: int = between(3, 1)
    keep_best: bool = True  # the checkpoint of the lowest held-out loss
    keep_every: int = 0
    skip_nonfinite: int = 0  # so many steps with a non-finite loss or gradient may be skipped, then the run stops
    profile: str = ''  # FIRST:LAST, the steps that are traced into WORKDIR/profile for XProf

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.profiled
        if self.profile and not 0 < first <= last:
            raise UserError(f'loop.profile={self.profile} is not FIRST:LAST, two steps such as 100:103.')

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last step to trace; (0, 0): none."""
        first, _, last = self.profile.partition(':')
        return (int(first), int(last)) if first.isdecimal() and last.isdecimal() else (0, 0)


def fit(
    workdir: str | os.PathLike,
    config: LoopConfig,
    *,
    abstract_state: Tree,
    init: Callable[[], Tree],
    step: Callable[[Tree, Any], tuple[Tree, Mapping[str, jax.Array]]],
    batches: Callable[[int], Iterator[tuple[Any, Any]]],
    steps: int,
    describe: Callable[[Any], Sequence[str]] = lambda records: [str(records)],
    evaluate: Callable[[Tree], Mapping[str, float]] | None = None,
    sample: Callable[[Tree], str] | None = None,
    flops_per_step: float = 0.0,
    peak_flops: float | None = None,
) -> Tree:
    """Trains up to step `steps`, continuing from the newest sound checkpoint in `workdir` if there is one.

    Args:
      workdir: gets checkpoints/, metrics.jsonl, tensorboard/, samples.md and loss.png.
      config: how often what happens.
      abstract_state: shapes, dtypes and shardings of the state, as `jax.eval_shape` gives them.
      init: makes the state of step 0; called only if there is no checkpoint.
      step: (state, batch) -> (state, metrics), jitted, may donate the state. Metrics are scalars: loss, tokens (trained
        on), finite, and any others to log. Where `finite` is false it must not have updated the parameters.
      batches: of the number of steps done, an iterator over (batch, record ids) from there on.
      steps: the last step.
      describe: names for record ids, for the message about a non-finite loss.
      evaluate: state -> figures to log; 'heldout/loss' among them decides the best checkpoint.
      sample: state -> Markdown for samples.md.
      flops_per_step: model FLOPs of a whole batch.
      peak_flops: FLOP/s of one chip, if known.

    Returns:
      The state after `steps` steps.

    Raises:
      UserError: non-finite loss, no space left, no readable checkpoint, or data that ends early.
      SystemExit: when the state is saved, with code 130 after a first Ctrl-C, 143 after a SIGTERM or the notice of a preemption.
    """
    workdir = locate(workdir)
    retention = {'keep_last': config.keep_last, 'keep_best': config.keep_best, 'keep_every': config.keep_every}
    # The watch is outermost: when a process is lost, leaving the checkpoints may wait for it.
    with Watch() as watch, report_disk_full(workdir), Checkpoints(workdir / 'checkpoints', **retention) as checkpoints:
        state, progress = checkpoints.restore(abstract_state) or (None, {})
        progress = Progress(**progress)
        state = init() if state is None else state
        lost = lost_metrics(workdir / 'metrics.jsonl', progress.step, config.log_every) if progress.step else ''
        meter = Meter(flops_per_step, peak_flops)
        trace = Trace(workdir / 'profile', *config.profiled)
        with Interruption() as interruption, Report(workdir, progress, meter, steps) as report, trace:

            def settle(number, metrics, records, evaluation=None):
                line = report.complete(number, metrics)
                if not line.pop('finite'):
                    _skip_or_stop(config, report, checkpoints, line['loss'], describe(records))
                if not evaluation and not _due(number, config.log_every, steps):
                    return {}
                line |= meter.read()  # before the evaluation, whose time is not the steps'
                figures = evaluation() if evaluation else {}
                report.write(line | figures)
                return figures

            if progress.step:
                report.log(f'Continuing from the checkpoint of step {progress.step}. {lost}'.strip())
            waiting, first = None, progress.step + 1
            for number, (batch, records) in _numbered(batches(progress.step), progress.step, steps):
                watch.at(number)
                meter.start()
                with trace.step(number):
                    state, metrics = step(state, batch)
                trace.after(number, metrics)
                # Only now that this step is queued, wait for the one before: the device never idles for the host.
                if waiting:
                    settle(*waiting)
                waiting = number, metrics, records
                stop = interruption.reached(number)
                evaluates = evaluate and _due(number, config.eval_every, steps)
                samples = sample and _due(number, config.sample_every, steps)
                saves = stop or _due(number, config.checkpoint_every, steps)
                if not (evaluates or samples or saves or number == first):
                    continue
                figures = settle(*waiting, partial(evaluate, state) if evaluates else None)
                waiting = None
                if samples:
                    report.sample(number, sample(state))
                if saves:
                    report.flush()
                    checkpoints.save(number, state, dataclasses.asdict(progress), figures.get(HELDOUT))
                if evaluates or number == steps:
                    report.plot()
                if stop:
                    leave(number, steps, checkpoints, report, interruption.code)
                meter.pause()
    return state


class Trace:
    """Traces the steps from `first` to `last` into a directory that XProf and TensorBoard read; (0, 0): none."""

    def __init__(self, directory: Any, first: int, last: int):
        self._directory, self._first, self._last, self._runs = directory, first, last, False

    def __enter__(self) -> 'Trace':
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def step(self, number: int) -> Any:
        """The context of a step, under whose number the trace shows it."""
        if number == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._runs = True
        return jax.profiler.StepTraceAnnotation('train', step_num=number) if self._runs else contextlib.nullcontext()

    def after(self, number: int, metrics: Any) -> None:
        """Ends the trace after its last step, when the device is through with it."""
        if self._runs and number == self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()


def _due(number: int, every: int, steps: int) -> bool:
    return number == steps or bool(every and number % every == 0)


def _numbered(data: Iterator[tuple[Any, Any]], done: int, steps: int) -> Iterator[tuple[int, tuple[Any, Any]]]:
    for number in range(done + 1, steps + 1):
        try:
            yield number, next(data)
        except StopIteration:
            raise UserError(f'The data ended after {number - 1} of {steps} steps.') from None


def _skip_or_stop(config: LoopConfig, report: Report, checkpoints: Checkpoints, loss: float, records: Sequence[str]) -> None:
    """Logs a step without a finite loss or gradient, and stops after more than `config.skip_nonfinite` of them."""
    step, skipped = report.progress.step, report.progress.skipped
    rows = ', '.join(records[:8]) + (f' and {len(records) - 8} more' if len(records) > 8 else '')
    fault = 'a gradient that is not finite' if math.isfinite(loss) else f'the loss {loss}'
    what = f'Step {step} has {fault}; its batch is: {rows}'
    if skipped <= config.skip_nonfinite:
        report.log(f'{what}. Skipped without an update ({skipped} of at most {config.skip_nonfinite}).')
        return
    checkpoints.wait()
    last = checkpoints.directory / str(checkpoints.steps[-1]) if checkpoints.steps else 'none yet'
    raise UserError(f'{what}. The last good checkpoint: {last}. --set loop.skip_nonfinite=N skips up to N such steps.')


def leave(number: int, steps: int, checkpoints: Checkpoints, report: Report, code: int) -> None:
    """Ends the process when the state of a step is saved, and says how to go on."""
    checkpoints.wait()
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    report.log(f'Interrupted: step {number} of {steps} is saved in {checkpoints.directory}. To continue, run it again: {command}')
    raise SystemExit(code)


class Interruption:
    """Notices SIGTERM, Ctrl-C, or a preemption of any of several processes, and has all of them stop after the same step.

    A second Ctrl-C ends the process at once.
    """

    def __enter__(self) -> 'Interruption':
        self._asked, self._before, self.code = False, {}, 128 + signal.SIGTERM
        if threading.current_thread() is not threading.main_thread():  # notebooks' threads cannot listen
            return self
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._ask)
        # Several processes: JAX's own service catches SIGTERM and agrees on a step.
        if jax.process_count() == 1:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
        else:
            expect_preemption(True)
        return self

    def __exit__(self, *error: object) -> None:
        if jax.process_count() > 1 and signal.SIGINT in self._before:
            expect_preemption(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self._asked = True
        if number == signal.SIGINT:
            self.code = 128 + signal.SIGINT
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; every process asks after every step."""
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
