"""Batches of dialogs: packed whole, masked, each once an epoch, the same on any number of hosts and after a restart."""

import collections
import json
import random

import numpy as np
import pytest
from batches import concatenated, equal

from llama2_jax.config import UserError
from llama2_jax.data.dialogs import DialogConfig, DialogData
from llama2_jax.data.packing import best_fit
from llama2_jax.text.dialog import encode_dialog

LENGTH, BATCH = 120, 8


class Letters:
    """A tokenizer of code points; like SentencePiece it puts a space before every text."""

    def encode(self, text, bos, eos):
        return bos * [1] + [ord(letter) for letter in f' {text}'] + eos * [2]


def dialog(*contents):
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(contents)]


def write(path, rows):
    path.write_text('\n'.join(json.dumps({'messages': row}) for row in rows))


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp('world'), random.Random(0)
    for name, count in [('a', 150), ('b', 40)]:
        rows = [dialog(*(f'{name}{i}' + 'x' * rng.randint(0, 9) for _ in range(2 * rng.choice((1, 1, 2))))) for i in range(count)]
        write(path / f'{name}.jsonl', rows)
    return path


@pytest.fixture
def make(world):
    def make(mixture='jsonl:{}/a.jsonl,jsonl:{}/b.jsonl', *, epochs=2.0, heldout=0.1, length=LENGTH, seed=0, **kwargs):
        config = DialogConfig(mixture.replace('{}', str(world)), epochs, heldout)
        return DialogData(config, Letters(), length=length, batch_size=BATCH, seed=seed, **kwargs)

    return make


def parts(batches):
    """(ids, trained) of every dialog of batches, in order."""
    for batch in batches:
        for tokens, segments, trained in zip(batch['tokens'], batch['segment_ids'], batch['trained'], strict=True):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                yield tokens[here].tolist(), trained[here].tolist()


def rows_of(path):
    return [json.loads(line)['messages'] for line in path.read_text().splitlines()]


def test_rows_hold_whole_dialogs_with_their_masks(make, world):
    data = make(epochs=1.0, heldout=0.0)
    batches = list(data.train())
    assert len(batches) == data.steps
    for batch in batches:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            'tokens': ((8, 121), np.int32),
            'segment_ids': ((8, 121), np.int32),
            'trained': ((8, 121), bool),
            'record_ids': ((8, 2), np.int64),
        }
        assert not batch['tokens'][batch['segment_ids'] == 0].any()
        assert not batch['trained'][batch['segment_ids'] == 0].any()
        for segments in batch['segment_ids']:
            real = segments[segments > 0]
            assert np.array_equal(segments[: len(real)], real)  # padding comes last
            assert real.tolist() == sorted(real.tolist())
            assert set(real.tolist()) == set(range(1, real.max(initial=0) + 1))
        assert (batch['tokens'] == 1)[np.diff(batch['segment_ids'], prepend=0, axis=1) > 0].all()
    expected = [encode_dialog(row, Letters()) for name in 'ab' for row in rows_of(world / f'{name}.jsonl')]
    assert sorted(parts(batches)) == sorted(expected)


@pytest.mark.parametrize('epochs', [1.0, 2.0, 3.0])
def test_every_dialog_comes_exactly_once_an_epoch(make, epochs):
    data = make(epochs=epochs)
    counts = collections.Counter(''.join(map(chr, ids)) for ids, _ in parts(data.train()))
    assert set(counts.values()) == {int(epochs)}
    assert len(counts) == sum(source.dialogs for source in data.sources)
    assert data.steps == -(-int(epochs) * sum(source.rows for source in data.sources) // 8)
    rows = [tuple(record) for batch in data.train() for record in batch['record_ids'].tolist()]
    for source in range(2):
        mine = [row for index, row in rows if index == source]
        count = data.sources[source].rows
        orders = [mine[i * count : (i + 1) * count] for i in range(int(epochs))]
        assert all(sorted(order) == list(range(count)) for order in orders)
        assert all(order != list(range(count)) for order in orders)
        assert len(set(map(tuple, orders))) == epochs
    empty = [row for row in rows if row[0] < 0]
    assert len(empty) == data.steps * 8 - int(epochs) * sum(source.rows for source in data.sources)
    assert rows[len(rows) - len(empty) :] == empty


@pytest.mark.parametrize('count', [2, 4])
def test_the_same_on_any_number_of_processes_and_from_any_step(make, count):
    whole = list(make().train())
    assert equal(concatenated([make(process_index=p, process_count=count).train() for p in range(count)]), whole)
    late = concatenated([make(process_index=p, process_count=count).train(5) for p in range(count)])
    assert equal(late, whole[5:])
    assert list(make().train(len(whole))) == []
    assert not equal(list(make(seed=1).train())[:1], whole[:1])


def test_weights_and_limits_say_how_often_a_dialog_comes(make):
    data = make('jsonl:{}/a.jsonl:0.5x,jsonl:{}/b.jsonl:3x', epochs=2.0)
    seen = collections.Counter(tuple(record) for batch in data.train() for record in batch['record_ids'].tolist())
    assert collections.Counter(times for (source, _), times in seen.items() if source == 0) == {1: data.sources[0].rows}
    assert collections.Counter(times for (source, _), times in seen.items() if source == 1) == {6: data.sources[1].rows}
    assert [source.epochs for source in data.sources] == [1, 6]
    share = data.sources[0].rows / (data.sources[0].rows + 6 * data.sources[1].rows)
    assert [source.weight for source in data.sources] == [share, 1 - share]
    first = [record[0] for batch in list(data.train())[: data.steps // 2] for record in batch['record_ids'].tolist()]
    assert abs(first.count(0) / len(first) - share) < 0.02  # evenly spread
    assert [source.epochs for source in make('jsonl:{}/a.jsonl@1.5,jsonl:{}/b.jsonl').sources] == [1.5, 2]


def test_held_out_dialogs_go_by_their_first_question(make, tmp_path):
    write(tmp_path / 'a.jsonl', [dialog(f'q{i % 50}', f'answer {i}') for i in range(150)])
    data = make(f'jsonl:{tmp_path}/a.jsonl', heldout=0.2)
    batches = list(data.heldout(0))
    halves = [make(f'jsonl:{tmp_path}/a.jsonl', heldout=0.2, process_index=p, process_count=2).heldout(0) for p in range(2)]
    assert equal(concatenated(halves), batches)
    assert {batch['tokens'].shape for batch in batches} == {(8, 121)}

    def questions(found):
        return [''.join(map(chr, ids)).split('[INST] ')[1].split()[0] for ids, _ in found]

    held, trained = questions(parts(batches)), questions(parts(data.train()))
    assert 15 < len(held) < 60 and set(collections.Counter(held).values()) == {3}
    assert not set(held) & set(trained)
    assert set(held) | set(trained) == {f'q{i}' for i in range(50)}
    assert data.sources[0].heldout_tokens == sum(sum(mask) for _, mask in parts(batches))
    assert data.sources[0].heldout_bytes == sum(len(ids) for ids, _ in parts(batches)) - sum(
        len(f'_ [INST] {question} [/INST]_ _') for question in held
    )
    assert list(make(heldout=0.0).heldout(0)) == []


def test_too_long_dialogs_are_cut_at_turns_or_dropped(make, tmp_path):
    long = 'x' * 80
    weightless = dialog('q', 'a', 'q', long)
    weightless[1]['weight'] = 0
    write(tmp_path / 'a.jsonl', [dialog('a', 'b', 'c', long), dialog(long, long), dialog('d', 'e'), weightless])
    data = make(f'jsonl:{tmp_path}/a.jsonl', heldout=0.0, epochs=1.0)
    kept = sorted(''.join(map(chr, ids)) for ids, _ in parts(data.train()))
    assert kept == ['\1 [INST] a [/INST] b \2', '\1 [INST] d [/INST] e \2']
    assert (data.sources[0].dialogs, data.sources[0].cut, data.sources[0].dropped) == (2, 1, 2)
    exact = len(encode_dialog(dialog('a', 'b', 'c', long), Letters())[0])
    assert make(f'jsonl:{tmp_path}/a.jsonl', heldout=0.0, length=exact - 1).sources[0].cut == 0  # its last token is a target only
    assert make(f'jsonl:{tmp_path}/a.jsonl', heldout=0.0, length=exact - 2).sources[0].cut == 1


def test_shares_are_those_of_the_batches(make):
    data = make(epochs=1.0, heldout=0.0)
    batches = [batch for batch in data.train()]
    for source in range(2):
        rows = [batch['record_ids'][:, 0] == source for batch in batches]
        segments = np.concatenate([batch['segment_ids'][mine] for batch, mine in zip(batches, rows, strict=True)])
        trained = np.concatenate([batch['trained'][mine] for batch, mine in zip(batches, rows, strict=True)])
        info = data.sources[source]
        assert info.tokens == (segments > 0).sum()
        assert info.trained_share == pytest.approx(trained.sum() / info.tokens)
        assert info.padding_share == pytest.approx((segments == 0).mean())
        assert info.padding_share < 0.2


def test_nothing_to_learn_names_the_row(make, tmp_path):
    row = dialog('a', 'b')
    row[1]['weight'] = 0
    write(tmp_path / 'a.jsonl', [dialog('a', 'b'), row])
    with pytest.raises(UserError, match=r'/a\.jsonl:2: there is nothing to learn, every answer has weight 0\.$'):
        make(f'jsonl:{tmp_path}/a.jsonl')
    write(tmp_path / 'a.jsonl', [dialog('x' * 200, 'b')])
    with pytest.raises(UserError, match=r'has no dialogs to train on, for length=120 \(1 too long; 0 held out'):
        make(f'jsonl:{tmp_path}/a.jsonl')
    write(tmp_path / 'a.jsonl', [dialog('a', 'b'), dialog('a'), dialog('a', 'b', 'c')])
    data = make(f'jsonl:{tmp_path}/a.jsonl', heldout=0.0)
    assert data.sources[0].reasons == '1 no answer' and '1 no answer' in data.table() and data.sources[0].dialogs == 2
    with pytest.raises(UserError, match='a.jsonl:2 is not JSON'):
        write(tmp_path / 'a.jsonl', [dialog('a', 'b')])
        with (tmp_path / 'a.jsonl').open('a') as file:
            file.write('\n{\n')
        make(f'jsonl:{tmp_path}/a.jsonl')


def test_describe_and_table(make, world):
    data = make()
    record = next(data.train())['record_ids'][0].tolist()
    (text,) = data.describe(np.array([record]))
    name = 'ab'[record[0]]
    assert text.startswith(f'row {record[1]} of jsonl:{world}/{name}.jsonl ({world}/{name}.jsonl:')
    lines = [int(place.split(':')[-1]) for place in text.split('(')[1].rstrip(')').split(', ')]
    rows = rows_of(world / f'{name}.jsonl')
    batch = next(data.train())
    assert [ids for ids, _ in parts([{k: v[:1] for k, v in batch.items()}])] == [
        encode_dialog(rows[line - 1], Letters())[0] for line in lines
    ]
    assert data.describe(np.array([[-1, -1]])) == ['an empty row']
    assert len(data.table().splitlines()) == 3
    assert f'{data.sources[1].tokens:,}' in data.table().splitlines()[2]


def test_bad_arguments(make):
    with pytest.raises(UserError, match=r'^A batch of 8 rows cannot be divided among 3 processes\.$'):
        make(process_index=0, process_count=3)
    with pytest.raises(UserError, match=r'^heldout is 1\.0'):
        make(heldout=1.0)
    with pytest.raises(UserError, match='^epochs is 0'):
        make(epochs=0)


@pytest.mark.parametrize('longest', [10, 60, 100])
def test_best_fit_leaves_little_over(longest):
    lengths = np.random.default_rng(longest).integers(1, longest + 1, 1000)
    rows = best_fit(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(1000))
    sums = [lengths[row].sum() for row in rows]
    assert max(sums) <= 100
    least = max(-(-lengths.sum() // 100), (lengths > 50).sum())
    assert len(rows) <= least * 1.03
    assert rows == best_fit(lengths, 100)
    assert best_fit(np.array([], int), 10) == []
