"""From one format to another, a tensor at a time, and comparing two models."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from llama2_jax.checkpoints.directory import write_orbax
from llama2_jax.checkpoints.formats.huggingface import write_huggingface
from llama2_jax.checkpoints.formats.llamacpp import QUANTISED, write_gguf
from llama2_jax.checkpoints.formats.meta import check_shards, make_params, write_meta
from llama2_jax.checkpoints.load import load_model, tokenizer_of, with_padding
from llama2_jax.checkpoints.names import Key, keys, shape, their_names
from llama2_jax.checkpoints.source import DTYPES, Source
from llama2_jax.config import UserError
from llama2_jax.files import bucket_errors, check_name, is_remote, locate
from llama2_jax.runtime.workdir import out_of_space

FORMS = ('orbax', 'hf', 'meta', 'gguf')
LOGIT_TOKENS = 64
READERS = 2  # threads; as many tensors are read ahead
Progress = Callable[[int], None]


def convert(
    source: Source,
    output: str | os.PathLike,
    form: str,
    dtype: str | None = None,
    shards: int = 1,
    progress: Progress = lambda _: None,
) -> None:
    """Writes a model in another format, whole or not at all; a few tensors are in memory at a time.

    Args:
      source: what `open_model` gives.
      output: a directory, or for 'gguf' a file; must not exist.
      form: one of FORMS.
      dtype: of the parameters: a name of DTYPES, or for 'gguf' QUANTISED; None keeps the model's.
      shards: model-parallel shards, for 'meta'.
      progress: called with the bytes of each tensor when it is read.

    Raises:
      UserError: the output exists or cannot hold the model, a number overflows float16, or no space is left.
    """
    output = locate(output)
    with bucket_errors(output):
        _check_output(source, output, form, dtype, shards)
    target = dtype if dtype == QUANTISED else DTYPES[dtype or source.dtype.name]
    if form == 'hf' and source.padded:
        source = with_padding(source)
    if source.form != 'orbax':
        source = dataclasses.replace(source, provenance={'stage': 'convert', 'parent': str(source.path), 'step': None})
    stream = partial(_stream, source, target, progress)
    with bucket_errors(output), bucket_errors(source.path), _staged(output) as path:
        if form == 'gguf':
            write_gguf(path, source, target, stream)
            return
        path.mkdir()
        if form == 'meta':
            write_meta(path, source, target, stream, shards)
        else:
            {'hf': write_huggingface, 'orbax': write_orbax}[form](path, source, target, stream)


def _check_output(source: Source, output: Path, form: str, dtype: str | None, shards: int) -> None:
    """All that can be said before the first byte is written."""
    ours, theirs = (path if is_remote(path) else Path(os.path.realpath(path)) for path in (output, source.path))
    if ours == theirs:
        raise UserError(f'{output} is the input: choose another output.')
    if ours.is_relative_to(theirs):
        raise UserError(f'{output} lies in the input: choose another output.')
    if _is_there(output):
        raise UserError(f'{output} exists already; remove it, or choose another output.')
    check_name(output)
    if form == 'gguf' and output.suffix != '.gguf':
        raise UserError(f'{output}: a GGUF model is one file, so name it {output.name}.gguf.')
    if dtype == QUANTISED and form != 'gguf':
        raise UserError(f'--dtype={QUANTISED} is for gguf only.')
    if shards != 1 and form != 'meta':
        raise UserError(f'--shards={shards} is for meta only.')
    if form != 'orbax':
        their_names(source.config, source.head, form)
    if form == 'meta':
        make_params(source.config)
        check_shards(source.config, shards, f'--shards={shards}')
    tokenizer_of(source)


def _is_there(output: Path) -> bool:
    """Whether something is in the way, other than what a killed conversion has left in a bucket."""
    if is_remote(output):
        return output.exists() and not output.with_name(output.name + '.incomplete').exists()
    return os.path.lexists(output)


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Where to write: beside the output, which takes its name once all is there; a failure removes it.

    In a bucket nothing can be renamed. So it is the output itself, and a file beside it says that it is incomplete.
    """
    beside = output.with_name(output.name + '.incomplete')
    path = output if is_remote(output) else beside
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(path)  # what a killed conversion has left
        if is_remote(output):
            beside.write_text('')
        yield path
        if not is_remote(output):
            for file in [path] if path.is_file() else sorted(pathlib.Path(path).rglob('*')):
                _flush(file)
            path.rename(output)
    except BaseException as error:
        _remove(path)
        if out_of_space(error):
            raise UserError(f'No space left while writing {output}: nothing was kept of it.') from None
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f'{error.filename or output} cannot be read or written: {error.strerror}.') from None
        raise
    finally:
        if is_remote(output):
            beside.unlink(missing_ok=True)


def _flush(file: os.PathLike) -> None:
    """To the disk itself: a name must not outlive a power cut without its numbers."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if is_remote(path) or (path.is_dir() and not os.path.islink(path)):
            path.rmtree()
        else:
            os.unlink(path)  # a file, a link, or a pipe


def _stream(
    source: Source, dtype: np.dtype | str, progress: Progress, prepare: Callable[[str, np.ndarray], Iterable[Callable[[], Any]]]
) -> Iterator[tuple[Key, Iterator[Any]]]:
    """The tensors in order, each read and cast and its parts made by other threads while the last ones are being written."""

    def load(key: Key) -> tuple[Key, int, deque[Future]]:
        array = source.read(*key)
        calls = prepare(key[0], _cast(source, key, array, dtype))
        return key, array.size * source.dtype.itemsize, deque(executor.submit(call) for call in calls)

    def results(parts: deque[Future]) -> Iterator[Any]:
        while parts:
            yield parts.popleft().result()

    executor, waiting = ThreadPoolExecutor(READERS), deque()
    todo = keys(source.config, source.head)
    try:
        waiting.extend(executor.submit(load, key) for key in itertools.islice(todo, READERS))
        while waiting:
            key, size, parts = waiting.popleft().result()
            waiting.extend(executor.submit(load, key) for key in itertools.islice(todo, 1))
            progress(size)
            yield key, results(parts)
    finally:
        executor.shutdown(cancel_futures=True)


def _cast(source: Source, key: Key, array: np.ndarray, dtype: np.dtype | str) -> np.ndarray:
    if dtype == QUANTISED or array.dtype == dtype:
        return array
    with np.errstate(over='ignore'):
        cast = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise UserError(f'{source.path}: {key[0]!r} of layer {key[1]} holds numbers beyond those of float16: use bfloat16.')
    return cast


def bytes_of(source: Source) -> int:
    """What all its parameters take in the source's dtype."""
    return sum(int(np.prod(shape(name, source.config))) for name, _ in keys(source.config, source.head)) * source.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
      differences: for each tensor that differs, the largest absolute difference, in the order of the files.
      logits: the largest absolute difference of the logits of LOGIT_TOKENS fixed tokens; None where not computed, and why.
      reason: why there are no logits; ''.
    """

    differences: dict[Key, float]
    logits: float | None
    reason: str = ''


def compare(ours: Source, theirs: Source, progress: Progress = lambda _: None) -> Comparison:
    """Compares weights in float32 and, where both models fit in memory, logits.

    Raises:
      UserError: the models have different shapes or heads, so their tensors do not correspond.
    """
    for field in dataclasses.fields(ours.config):
        if field.name != 'context':  # which no tensor depends on, and Meta's format does not hold
            a, b = (getattr(side.config, field.name) for side in (ours, theirs))
            if a != b:
                raise UserError(f'{ours.path} has model.{field.name}={a}, and {theirs.path} has {b}.')
    if ours.head != theirs.head:
        raise UserError(f'{ours.path} has {ours.head!r}, and {theirs.path} has {theirs.head!r}: one of them is a reward model.')
    differences = {}
    for key in keys(ours.config, ours.head):
        a, b = (side.read(*key).astype(np.float32) for side in (ours, theirs))
        progress(a.size * ours.dtype.itemsize)
        if not np.array_equal(a, b):
            differences[key] = float(np.abs(a - b).max())
    if ours.head != 'head_DV':
        return Comparison(differences, None, 'a reward model has none')
    needed = 3 * 4 * ours.config.parameters
    free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if needed > free:
        return Comparison(differences, None, f'they would take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free')
    tokens = np.random.default_rng(0).integers(ours.config.vocab_size, size=(1, min(LOGIT_TOKENS, ours.config.context)))

    def logits(source: Source) -> np.ndarray:
        model, _ = load_model(source.path, 'float32')
        return np.asarray(jax.jit(lambda model: model.logits(model(tokens.astype(np.int32))))(model))

    return Comparison(differences, float(np.abs(logits(ours) - logits(theirs)).max()))
