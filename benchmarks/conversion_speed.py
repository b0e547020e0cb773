"""Bytes a second, CPU seconds and peak memory of conversions, each paired with a plain copy of the same files.

python benchmarks/conversion_speed.py                    # 4 layers as wide as 7B's, bfloat16: 2.1 GB
python benchmarks/conversion_speed.py --layers=16        # 7.0 GB; the peak is the same
"""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import app, flags

from llama2_jax.checkpoints.convert import bytes_of, convert
from llama2_jax.checkpoints.formats.huggingface import write_huggingface
from llama2_jax.checkpoints.load import open_model
from llama2_jax.checkpoints.names import keys, shape
from llama2_jax.checkpoints.source import Source
from llama2_jax.config import MODELS, ModelConfig

_LAYERS = flags.DEFINE_integer('layers', 4, 'Of the model.')
_TOKENIZER = flags.DEFINE_string('tokenizer', 'tokenizer.model', "LLaMA 2's, 32,000 pieces.")
# Which of the two goes first alternates, and the best of each counts: virtual machines whose host takes back memory that is free
# are slow in every other file, whoever writes it.
_ROUNDS = flags.DEFINE_integer('rounds', 4, 'Pairs of copy and conversion.')
_DIRECTORY = flags.DEFINE_string('directory', None, 'Where to work; a temporary directory by default.')
# From, to and shards. Each route writes over what the last one has written, so that no file system is filled.
ROUTES = (
    ('hf', 'orbax', 1),
    ('orbax', 'meta', 2),
    ('meta', 'hf', 1),
    ('hf', 'meta', 2),
    ('meta', 'orbax', 1),
    ('orbax', 'hf', 1),
)


def _make(path: Path, tokenizer: Path, layers: int) -> None:
    """A model of random numbers, in Hugging Face's format."""
    config = ModelConfig(**{**vars(MODELS['7b']), 'layers': layers})
    dtype = np.dtype(ml_dtypes.bfloat16)
    source = Source(path, 'hf', config, dtype, 'head_DV', None, tokenizer.read_bytes, {})
    rng = np.random.default_rng(0)
    path.mkdir()

    def stream(prepare):
        for name, layer in keys(config, 'head_DV'):
            array = rng.random(shape(name, config), np.float32).astype(dtype)
            yield (name, layer), (call() for call in prepare(name, array))

    write_huggingface(path, source, dtype, stream)


def _clock() -> np.ndarray:
    """Seconds by the clock, and of the CPU in this process."""
    return np.array([time.perf_counter(), time.process_time()])


def _copy(source: Path, target: Path) -> np.ndarray:
    """What a copy takes that ends when all is on disk."""
    os.sync()
    start = _clock()
    shutil.copytree(source, target)
    for file in target.rglob('*'):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return _clock() - start


def _read(source: Path) -> np.ndarray:
    """What it takes to read the files once."""
    start = _clock()
    for file in filter(Path.is_file, source.rglob('*')):
        with file.open('rb', buffering=0) as opened:
            while opened.read(2**24):
                pass
    return _clock() - start


def _warm_up() -> None:
    """Imports what converting imports: a second or two that does not grow with the model."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        torch.empty(1)


def _convert(source: Path, target: Path, form: str, shards: int, queue: multiprocessing.Queue) -> None:
    _warm_up()
    os.sync()
    start = _clock()
    opened = open_model(source)
    convert(opened, target, form, shards=shards)
    taken = _clock() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    queue.put((*taken, memory, bytes_of(opened)))


def _pair(source: Path, target: Path, form: str, shards: int, context: Any, copy_first: bool) -> tuple[float, ...]:
    """Clock and CPU seconds of a copy, of reading and of a conversion, its peak bytes, and the bytes of the parameters."""
    copied, seconds = target.with_name('copy'), np.zeros(2)
    for turn in (copy_first, not copy_first):
        os.sync()
        if turn:
            seconds = _copy(source, copied)
            shutil.rmtree(copied)
            continue
        if target.exists():
            shutil.rmtree(target)
        queue = context.Queue()
        child = context.Process(target=_convert, args=(source, target, form, shards, queue))
        child.start()
        child.join()
        converted = queue.get(timeout=1)
    return *seconds, *_read(source), *converted


def main(argv: list[str]) -> None:
    """Prints one line a route."""
    del argv
    context = multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
        root = Path(directory)
        _make(root / 'hf', Path(_TOKENIZER.value), _LAYERS.value)
        print('| from | to | copy, MB/s | conversion, MB/s | (copy + reading) / conversion | the same, CPU seconds | peak, MB |')
        print(7 * '|---' + '|')
        for begin, end, shards in ROUTES:
            pairs = [_pair(root / begin, root / end, end, shards, context, i % 2 == 0) for i in range(_ROUNDS.value)]
            copy, copy_cpu, read, read_cpu, conversion, cpu, memory, size = np.min(pairs, axis=0)
            speeds = f'{size / copy / 1e6:.0f} | {size / conversion / 1e6:.0f}'
            shares = f'{(copy + read) / conversion:.2f} | {(copy_cpu + read_cpu) / cpu:.2f}'
            print(
                f'| {begin} | {end}{f" ×{shards}" if shards > 1 else ""} | {speeds} | {shares} | {memory / 1e6:.0f} |', flush=True
            )


if __name__ == '__main__':
    app.run(main)
