import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from batches import concatenated, equal
from byte_tokenizer import ByteTokenizer, documents, split_at_bos

from llama2_jax.config import UserError
from llama2_jax.data import packing, sources
from llama2_jax.data.pretrain import DataConfig, PretrainData

LENGTH, BATCH = 20, 8


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Two sources, the first in two parts: about 5,000 and 1,700 tokens."""
    path = tmp_path_factory.mktemp('world')
    for name, count in [('a0', 120), ('a1', 90), ('b', 80)]:
        rows = [json.dumps({'text': f'{name} document {i} ' + 'x' * (i % 13)}) for i in range(count)]
        (path / f'{name}.jsonl').write_text('\n'.join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'PART', 1000)
        yield path


@pytest.fixture
def make(world):
    def make(
        mixture='jsonl:{}/a*.jsonl:3,jsonl:{}/b.jsonl', *, workers=0, heldout=0.1, steps=30, seed=0, length=LENGTH, **kwargs
    ):
        config = DataConfig(mixture.replace('{}', str(world)), str(world / 'cache'), heldout, workers)
        return PretrainData(config, ByteTokenizer(), length=length, batch_size=BATCH, seed=seed, steps=steps, **kwargs)

    return make


def test_batches_have_the_shapes_and_say_where_they_come_from(make):
    data = make()
    batches = list(data.train())
    assert len(batches) == 30
    for batch in batches:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            'tokens': ((8, 21), np.int32),
            'segment_ids': ((8, 21), np.int32),
            'record_ids': ((8, 2), np.int64),
        }
    streams = [cache.train.read(0, len(cache.train)) for cache in data._caches]
    for batch in batches:
        for tokens, segments, (source, sequence) in zip(batch['tokens'], batch['segment_ids'], batch['record_ids'], strict=True):
            row = streams[source][slice(*packing.window(sequence, LENGTH, len(streams[source])))]
            assert tokens[: len(row)].tolist() == row.tolist()
            assert np.array_equal(segments > 0, np.arange(21) < len(row))
            assert len(set(segments[: len(row)].tolist())) == sum(row[1:] == 1) + 1  # a document each BOS


@pytest.mark.parametrize('count', [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_processes(make, count):
    whole = list(make().train())
    assert equal(concatenated([make(process_index=p, process_count=count).train() for p in range(count)]), whole)


@pytest.mark.parametrize(('workers', 'start', 'count'), [(0, 11, 1), (2, 0, 1), (1, 11, 2)])
def test_any_number_of_workers_and_any_start_continue_the_same_batches(make, workers, start, count):
    whole = list(make().train())[start:]
    per_process = [make(workers=workers, process_index=p, process_count=count).train(start) for p in range(count)]
    assert equal(concatenated(per_process), whole)


def test_the_order_depends_on_the_seed_and_not_on_the_length_of_the_run(make):
    first = list(make(steps=12).train())
    assert equal(first, list(make(steps=30).train())[:12])
    assert not equal(first[:1], list(make(seed=1).train())[:1])
    assert list(make(steps=12).train(12)) == []


def test_starting_late_reads_nothing_before(make, monkeypatch):
    data = make('jsonl:{}/b.jsonl', steps=10**12)
    batch = next(iter(data.train(10**12 - 1)))
    assert batch['tokens'].shape == (8, 21)


def test_every_token_is_a_target_once_an_epoch_in_a_new_order(make):
    data = make('jsonl:{}/a*.jsonl', steps=100)
    stream = data._caches[0].train.read(0, len(data._caches[0].train))
    rows = [
        (record[1], tokens[segments > 0][1:].tolist())
        for batch in data.train()
        for tokens, segments, record in zip(batch['tokens'], batch['segment_ids'], batch['record_ids'], strict=True)
    ]
    count = packing.count(len(stream), LENGTH)
    epochs = [rows[i * count : (i + 1) * count] for i in range(2)]
    for epoch in epochs:
        assert [token for _, targets in sorted(epoch) for token in targets] == stream[1:].tolist()
    orders = [[sequence for sequence, _ in epoch] for epoch in epochs]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_proportions_are_exact(make):
    data = make(steps=30)
    seen = Counter(int(source) for batch in data.train() for source in batch['record_ids'][:, 0])
    assert seen == {0: 180, 1: 60}
    assert [source.weight for source in data.sources] == [0.75, 0.25]
    count = packing.count(data.sources[1].tokens, LENGTH)
    assert data.sources[1].epochs == 60 / count


def test_epoch_limits_are_kept_to_the_sequence(make):
    data = make('jsonl:{}/a*.jsonl,jsonl:{}/b.jsonl:9@1.5', steps=40)
    count = packing.count(data.sources[1].tokens, LENGTH)
    assert 1.5 * count < 9 / 10 * 320  # it binds
    seen = Counter(tuple(map(int, record)) for batch in data.train() for record in batch['record_ids'])
    assert sum(n for (source, _), n in seen.items() if source == 1) == int(1.5 * count)
    assert {n for (source, _), n in seen.items() if source == 1} == {1, 2}
    with pytest.raises(UserError, match=r'^The run needs 8000 sequences, but the epoch limits of the mixture allow \d+ '):
        make('jsonl:{}/a*.jsonl@1,jsonl:{}/b.jsonl@2', steps=1000)


def test_held_out_documents_are_all_there_and_never_trained_on(make):
    whole = make()
    for source in range(2):
        expected = whole._caches[source].heldout.read(0, len(whole._caches[source].heldout))
        batches = list(whole.heldout(source))
        assert equal(concatenated([make(process_index=p, process_count=4).heldout(source) for p in range(4)]), batches)
        assert {batch['tokens'].shape for batch in batches} == {(8, 21)}
        rows = sorted(
            (int(record[1]), tokens[segments > 0][1:].tolist())
            for batch in batches
            for tokens, segments, record in zip(batch['tokens'], batch['segment_ids'], batch['record_ids'], strict=True)
            if record[1] >= 0
        )
        assert [token for _, targets in rows for token in targets] == expected[1:].tolist()
        padding = [batch['segment_ids'][batch['record_ids'][:, 0] < 0] for batch in batches]
        assert sum(rows.size for rows in padding) == (len(batches) * 8 - len(rows)) * 21
        assert not any(rows.any() for rows in padding)
        assert whole.sources[source].heldout_tokens == len(expected)
        held = documents(expected)
        assert whole.sources[source].heldout_bytes == len(''.join(held).encode())
        trained = documents(whole._caches[source].train.read(0, whole.sources[source].tokens))
        assert not set(held) & set(trained)
        assert len(trained) == whole.sources[source].documents
    assert list(make(heldout=0.0).heldout(0)) == []


def test_sequences_of_other_lengths_use_the_same_cache(make):
    assert make(length=7)._caches[0].directory == make(length=500)._caches[0].directory
    batch = next(make('jsonl:{}/b.jsonl', length=5000).train())  # longer than the source
    assert (batch['segment_ids'] > 0).sum() == 8 * len(split_at_bos([1])) * make('jsonl:{}/b.jsonl').sources[0].tokens


def test_describe_and_table(make, world):
    data = make()
    records = next(data.train())['record_ids']
    assert data.describe(np.array([[1, 3], [0, 0]])) == [
        f'jsonl:{world}/b.jsonl sequence 3 (record 0 of train-00000.arrayrecord)',
        f'jsonl:{world}/a*.jsonl sequence 0 (record 0 of train-00000.arrayrecord)',
    ]
    assert len(data.describe(records)) == 8
    lines = data.table().splitlines()
    assert len(lines) == 3
    assert (
        lines[2].split()[1:] == ['0.2500', str(data.sources[1].documents), f'{data.sources[1].tokens:,}'] + lines[2].split()[4:]
    )


@pytest.mark.parametrize('workers', [0, 1])
def test_a_corrupt_record_is_named_while_training(make, workers, tmp_path):
    (tmp_path / 'a.txt').write_text('some text ' * 1000)
    config = DataConfig(f'text:{tmp_path}/a.txt', str(tmp_path / 'cache'), 0.0, workers)
    data = PretrainData(config, ByteTokenizer(), length=20, batch_size=8, seed=0, steps=10)
    (path,) = (tmp_path / 'cache').glob('*/train-*')
    stored = bytearray(path.read_bytes())
    at = stored.index(data._caches[0].train.read(0, 1000).tobytes())
    stored[at + 500] ^= 4
    path.write_bytes(stored)
    data._caches[0].train._readers.clear()
    with pytest.raises(UserError, match=rf'^Record 0 of {path} is corrupt or half-written \(.*delete .* and run again'):
        list(data.train())


def test_bad_arguments(make, tmp_path):
    with pytest.raises(UserError, match=r'^A batch of 8 sequences cannot be divided among 3 processes\.$'):
        make(process_index=0, process_count=3)
    with pytest.raises(UserError, match=r'^heldout is 1\.0'):
        make(heldout=1.0)
    with pytest.raises(UserError, match='^workers is -1'):
        make(workers=-1)
    (tmp_path / 'empty.txt').write_text('\n<|endoftext|>\n \n')
    with pytest.raises(
        UserError, match=rf'^Source text:{tmp_path}/empty.txt has no documents to train on \(2 empty ones were skipped'
    ):
        make(f'text:{tmp_path}/empty.txt')


def test_toy_world_by_default(make, tmp_path, monkeypatch):
    monkeypatch.setenv('LLAMA2_JAX_CACHE', str(tmp_path))
    from llama2_jax import toy

    monkeypatch.setattr(toy, 'documents', lambda genre, seed=0: iter([f'{genre} {i}' for i in range(20)]))
    data = PretrainData(DataConfig(), ByteTokenizer(), length=20, batch_size=8, seed=0, steps=10)
    assert data.sources[0].name == 'toy:documents'
    assert [path.name[:14] for path in tmp_path.iterdir()] == ['toy-documents-']
    cache = data._caches[0]
    assert cache.documents['train'] + cache.documents['heldout'] == 20 * len(toy.GENRES)


def test_no_framework_is_loaded_to_read_or_tokenise():
    """Tokenising processes start quickly and small because these modules do not load JAX or grain."""
    heavy = ('jax', 'grain', 'tensorflow', 'torch')
    code = f'import sys; import llama2_jax.data.tokenise; print([name for name in {heavy} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == '[]\n'
