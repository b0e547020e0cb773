"""Tokens a second of the data pipeline alone: building a token cache, and reading training batches from it.

python benchmarks/data_pipeline.py                                        # text of random words
python benchmarks/data_pipeline.py --source='text:corpus/*.txt' --tokenizer=llama2/tokenizer.model
python benchmarks/data_pipeline.py --pairs=50000 --tokenizer=llama2/tokenizer.model  # comparisons
"""

import itertools
import json
import os
import random
import tempfile
import time
from pathlib import Path

from absl import app, flags

from llama2_jax.data.documents import Documents, build
from llama2_jax.data.preferences import PreferenceConfig, PreferenceData
from llama2_jax.data.pretrain import DataConfig, PretrainData
from llama2_jax.data.sources import read_documents
from llama2_jax.text.tokenizer import Tokenizer, train_tokenizer

_SOURCE = flags.DEFINE_string('source', '', 'A source string; empty for 16 MB of random words.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'A tokenizer.model; empty to train one of 4,096 pieces on the source.')
_PAIRS = flags.DEFINE_integer('pairs', 0, 'Tokenise so many made-up comparisons in place of text.')
_SECONDS = flags.DEFINE_float('seconds', 3.0, 'How long to read batches in each setting.')


def _random_words(path: Path, megabytes: int) -> str:
    """A text file of Zipf-distributed made-up words; returns its source string."""
    rng = random.Random(0)
    words = [''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 9))) for _ in range(5000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    with path.open('w') as file:
        while file.tell() < megabytes * 1e6:
            file.write(' '.join(rng.choices(words, weights, k=300)) + '.\n\n')
    return f'text:{path}'


def _compare(root: Path, tokenizer: Tokenizer, count: int) -> None:
    """Prints how long comparisons take to tokenise, and a second run to start."""
    rng = random.Random(0)
    words = [''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 9))) for _ in range(5000)]
    weights = list(itertools.accumulate(1 / (i + 1) for i in range(len(words))))
    with (root / 'pairs.jsonl').open('w') as file:
        for i in range(count):
            texts = (' '.join(rng.choices(words, cum_weights=weights, k=rng.randint(30, 80))) for _ in range(3))
            file.write(json.dumps(dict(zip(('prompt', 'chosen', 'rejected'), texts, strict=True)) | {'id': i}) + '\n')
    os.environ['LLAMA2_JAX_CACHE'] = str(root / 'cache')
    config = PreferenceConfig(f'rows:{root}/pairs.jsonl')
    for run in ('first', 'second'):
        start = time.perf_counter()
        data = PreferenceData(config, tokenizer, length=8192, context=4096, batch_size=512, seed=0)
        seconds = time.perf_counter() - start
        print(f'{run} run: {count:,} pairs in {seconds:.1f} s; 2.9M in {2.9e6 * seconds / count / 60:.1f} minutes')
    print(data.table())


def _build(source: str, tokenizer: Tokenizer, root: Path, workers: int) -> tuple[Documents, float]:
    start = time.perf_counter()
    cache = build(source, tokenizer, root / f'workers-{workers}', heldout=0.01, workers=workers)
    return cache, time.perf_counter() - start


def _read(source: str, tokenizer: Tokenizer, root: Path, workers: int, batch_size: int, length: int) -> tuple[float, float]:
    """Seconds to the first batch, and tokens a second after it."""
    config = DataConfig(source, str(root), workers=workers)
    data = PretrainData(config, tokenizer, length=length, batch_size=batch_size, seed=0, steps=10**9)
    start = time.perf_counter()
    batches = data.train(12345)
    next(batches)
    first = time.perf_counter() - start
    for _ in itertools.islice(batches, 50):  # what was read ahead
        pass
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < _SECONDS.value:
        next(batches)
        count += 1
    return first, count * batch_size * length / seconds


def main(_) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        source = _SOURCE.value or _random_words(root / 'words.txt', 16)
        if _TOKENIZER.value:
            tokenizer = Tokenizer(_TOKENIZER.value)
        else:
            sample = itertools.islice(read_documents(source), 100)
            tokenizer = train_tokenizer(sample, root / 'tokenizer.model', 4096)
        if _PAIRS.value:
            _compare(root, tokenizer, _PAIRS.value)
            return
        rows = []
        for workers in (1, 2):
            cache, seconds = _build(source, tokenizer, root, workers)
            tokens, size = sum(cache.tokens.values()), sum(cache.bytes.values())
            rows.append(
                f'build     {workers} processes {tokens / seconds / 1e6:9.2f} M tokens/s {size / seconds / 1e6:6.1f} MB/s'
            )
        for (batch_size, length), workers in itertools.product([(16, 256), (16, 4096)], [0, 1, 2]):
            first, speed = _read(source, tokenizer, root / 'workers-1', workers, batch_size, length)
            rows.append(
                f'B {batch_size} L {length:<6} {workers} workers {speed / 1e6:9.2f} M tokens/s   first batch {first:5.2f} s'
            )
        print(f'{source}: {tokens:,} tokens, {size:,} bytes, vocabulary {tokenizer.vocab_size}')
        print('\n'.join(rows))


if __name__ == '__main__':
    app.run(main)
