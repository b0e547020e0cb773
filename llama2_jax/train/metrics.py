"""What a run tells: progress on the terminal, metrics.jsonl, TensorBoard, samples.md and the picture of the loss curve."""

import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils.epath import Path
from tqdm import tqdm

from llama2_jax.config import UserError
from llama2_jax.files import BUCKET_SECONDS, Lines, is_remote, save_figure, write_atomically
from llama2_jax.text.printable import printable

QUIET_SECONDS = 10.0  # between two progress lines where there is no terminal, and between two visits to a slow disk


class Meter:
    """Speed over the steps since the last reading; compilation, evaluations and saves are left out.

    Args:
      flops_per_step: of the whole batch, for all chips together.
      peak_flops: of one chip, or None if unknown.
    """

    def __init__(self, flops_per_step: float, peak_flops: float | None):
        self._flops = flops_per_step / jax.device_count()
        self._peak = peak_flops
        self._began, self._compiled = None, False
        self._steps = self._tokens = 0

    def pause(self) -> None:
        """Stops the clock until the next step starts; all steps so far are complete, so nothing is left to compile."""
        self._began, self._compiled = None, True
        self._steps = self._tokens = 0

    def start(self) -> None:
        """Starts the clock, unless it runs: a step is about to be dispatched, and no other one is under way."""
        if self._compiled and self._began is None:
            self._began = time.perf_counter()

    def count(self, tokens: int) -> None:
        """One more step is complete. Steps before the first pause, which compile, do not count."""
        if self._began is not None:
            self._steps += 1
            self._tokens += tokens

    def read(self) -> dict[str, float | None]:
        """tokens_per_second of all chips, tflops (1e12 a second) and mfu (0 to 1) of one; None where unknown."""
        steps, tokens, began = self._steps, self._tokens, self._began
        if not steps or began is None:
            return {'tokens_per_second': None, 'tflops': None, 'mfu': None}
        now = time.perf_counter()
        self._began, self._steps, self._tokens = now, 0, 0
        seconds = now - began
        flops = self._flops * steps / seconds
        return {
            'tokens_per_second': tokens / seconds,
            'tflops': flops / 1e12 if flops else None,
            'mfu': flops / self._peak if flops and self._peak else None,
        }


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds beside the state. The data position is the number of batches taken, which is `step`."""

    step: int = 0
    tokens: int = 0  # trained on so far
    skipped: int = 0  # steps without an update, as their loss or gradient was not finite
    seconds: float = 0.0  # spent in the loop so far, over all restarts


class Report:
    """Counts the steps in `progress` and writes the files of a run and its progress bar; only process 0 writes.

    What earlier lines and samples lie beyond `progress.step` is dropped on opening: they will be written again, just the same.

    Args:
      headline: figures of a line that the terminal shows; of those with a slash a line says more than it usually does.

    Raises:
      UserError: a line of metrics.jsonl is damaged.
    """

    def __init__(
        self, workdir: Path, progress: Progress, meter: Meter, steps: int, headline: tuple[str, ...] = ('loss', 'heldout/loss')
    ):
        self.progress, self._meter = progress, meter
        self._writes = jax.process_index() == 0
        self._workdir = workdir
        self._began = time.perf_counter() - progress.seconds
        if not self._writes:
            return
        drop_metrics(workdir / 'metrics.jsonl', progress.step)
        self._lines = Lines(workdir / 'metrics.jsonl')
        if (workdir / 'samples.md').exists():
            write_atomically(workdir / 'samples.md', _samples_until(workdir / 'samples.md', progress.step))
        self._board = TensorBoard(workdir / 'tensorboard', progress.step)
        self._bar = Bar(progress.step, steps, headline)

    def __enter__(self) -> 'Report':
        return self

    def __exit__(self, *error: object) -> None:
        if self._writes:
            with contextlib.closing(self._bar), contextlib.closing(self._lines), contextlib.closing(self._board):
                pass  # each is closed, though the one before may find the disk full

    def complete(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Waits for the metrics of a step and counts it; returns its line, with 'finite' in it."""
        values = {key: value.item() for key, value in jax.device_get(dict(metrics)).items()}
        loss, tokens, finite = values.pop('loss'), int(values.pop('tokens')), values.pop('finite')
        self.progress.skipped += not finite
        self._meter.count(tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        counts = self.count(step, tokens if finite else 0)
        return {**counts, 'loss': loss, 'perplexity': perplexity, **values, 'finite': finite}

    def count(self, step: int, tokens: int) -> dict[str, Any]:
        """Counts a step that is complete; returns how its line begins."""
        self.progress.step = step
        self.progress.tokens += tokens
        self.progress.seconds = time.perf_counter() - self._began
        if self._writes:
            self._bar.advance()
        return {'step': step, 'tokens': self.progress.tokens, 'seconds': self.progress.seconds}

    def write(self, line: Mapping[str, Any]) -> None:
        """Logs a line of `complete` with whatever was added to it; what is not finite becomes null."""
        if not self._writes:
            return
        line = {key: value if value is not None and math.isfinite(value) else None for key, value in line.items()}
        self._lines.write(json.dumps(line, allow_nan=False) + '\n')
        self._board.write(line)
        self._bar.show(line)

    def flush(self) -> None:
        """Brings all lines to the disk: to be called before the checkpoint that makes them final."""
        if self._writes:
            self._lines.sync()
            self._board.flush()

    def sample(self, step: int, text: str) -> None:
        """Puts the section of this step at the end of samples.md."""
        path = self._workdir / 'samples.md'
        if self._writes:
            section = f'<!-- step {step} -->\n## Step {step}\n\n{printable(text.strip())}\n\n'
            write_atomically(path, _samples_until(path, step - 1) + section)

    def log(self, text: str) -> None:
        """One line on the terminal, above the progress bar."""
        if self._writes:
            tqdm.write(printable(text), file=sys.stderr)

    def plot(self) -> None:
        """Draws loss.png."""
        if self._writes:
            plot(self._workdir)


class TensorBoard:
    """One more event file in `directory`; TensorBoard hides what earlier files hold beyond `step`."""

    def __init__(self, directory: Path, step: int):
        hidden = 'torch' not in sys.modules
        if hidden:  # tensorboardX imports it where it is installed: seconds and hundreds of megabytes for nothing
            sys.modules['torch'] = None  # type: ignore # None makes `import torch` fail
        try:
            from tensorboardX import RecordWriter, summary
            from tensorboardX.proto import event_pb2
        finally:
            if hidden:
                del sys.modules['torch']
        proto: Any = event_pb2  # its names are made at run time
        self._event, self._scalar = proto.Event, summary.scalar
        self._path = directory / f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}'
        # What is to lie in a bucket grows on the disk, and is copied now and then.
        self._local = tempfile.TemporaryDirectory() if is_remote(directory) else None
        if not self._local:
            directory.mkdir(exist_ok=True)
        # Records without SummaryWriter and its thread: that one would swallow the error of a full disk.
        self._writer = RecordWriter(os.path.join(self._local.name, self._path.name) if self._local else str(self._path))
        self._flushed = time.monotonic()
        self._put(file_version='brain.Event:2')
        self._put(step=step + 1, session_log=proto.SessionLog(status=proto.SessionLog.START))

    def write(self, line: Mapping[str, Any]) -> None:
        """Every number of a line of metrics as a scalar of its own name."""
        for key, value in line.items():
            if value is not None and key != 'step':
                self._put(step=line['step'], summary=self._scalar(key, value, display_name=key))
        if time.monotonic() - self._flushed > (BUCKET_SECONDS if self._local else QUIET_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Brings what was written to the disk, which may take a while."""
        self._writer.flush()
        self._copy()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
        self._copy()
        if self._local:
            self._local.cleanup()

    def _copy(self) -> None:
        if self._local:
            with open(os.path.join(self._local.name, self._path.name), 'rb') as file:
                write_atomically(self._path, file.read())

    def _put(self, **event: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **event).SerializeToString())


class Bar:
    """Progress, the headline's figures, speed and time left: a bar on a terminal, and now and then a line elsewhere."""

    def __init__(self, step: int, steps: int, headline: tuple[str, ...]):
        self._headline = headline
        self._terminal = sys.stderr.isatty()
        self._tqdm = tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True, disable=not self._terminal)
        self._step, self._first, self._steps = step, step, steps
        self._began, self._printed = time.monotonic(), -math.inf

    def advance(self) -> None:
        """One more step is complete."""
        self._step += 1
        self._tqdm.update()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows a line of metrics; without a terminal the first, the last, evaluations, and one every few seconds."""
        shown = {name: line[name] for name in self._headline if name in line}
        parts = [f'{name} null' if value is None else f'{name} {value:.4f}' for name, value in shown.items()]
        if line.get('tokens_per_second'):
            parts.append(f'{line["tokens_per_second"]:,.0f} tokens/s')
        if line.get('mfu'):
            parts.append(f'MFU {line["mfu"]:.1%}')
        self._tqdm.set_postfix_str(figures := printable(', '.join(parts), line=True))
        now = time.monotonic()
        rare = any('/' in name for name in shown)
        if self._terminal or (not rare and self._step < self._steps and now - self._printed < QUIET_SECONDS):
            return
        self._printed = now
        left = (now - self._began) / max(self._step - self._first, 1) * (self._steps - self._step)
        print(f'step {line["step"]}/{self._steps}: {figures}, {tqdm.format_interval(left)} left', file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._tqdm.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a kill has cut short does not count.

    Raises:
      UserError: for a damaged line, naming it.
    """
    lines = []
    for number, text in enumerate(path.read_bytes().decode(errors='replace').splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
            lines.append(line | {'step': int(line['step'])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if text.endswith('\n'):
                raise UserError(f'{path}:{number} is damaged: it is not a JSON object with a "step".') from None
    return lines


def lost_metrics(path: Path, step: int, log_every: int) -> str:
    """A sentence if a metrics.jsonl ends before the step that a run continues from; '' otherwise."""
    last = max((line['step'] for line in read_metrics(path)), default=0) if path.exists() else 0
    return f'{path} ends at step {last}: the lines until step {step} are lost.' if last <= step - log_every else ''


def drop_metrics(path: Path, step: int) -> None:
    """Removes the lines beyond `step` from a metrics.jsonl: a resumed run writes them again, just the same."""
    if path.exists():
        write_atomically(path, ''.join(json.dumps(line) + '\n' for line in read_metrics(path) if line['step'] <= step))


def _samples_until(path: Path, step: int) -> str:
    text = path.read_text(encoding='utf-8') if path.exists() else ''
    for section in re.finditer(r'^<!-- step (\d+) -->$', text, re.MULTILINE):
        if int(section[1]) > step:
            return text[: section.start()]
    return text


def plot(workdir: Path) -> None:
    """Draws the loss by step, and the held-out losses where there are any, from metrics.jsonl to loss.png."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state; half a second to import

    lines = read_metrics(workdir / 'metrics.jsonl')
    names = ['loss', *sorted({name for line in lines for name in line if name.startswith('heldout') and name.endswith('loss')})]
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel='step', ylabel='loss (nats a token)')
    for name in names:
        points = [(line['step'], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=None if name == 'loss' else 'o', markersize=3)
    if axes.lines:
        axes.legend()
    save_figure(figure, workdir / 'loss.png')
