"""Comparisons and dialogs in a token cache: the batches and counts of those that are tokenised at start."""

import json

import pytest
from batches import equal
from byte_tokenizer import ByteTokenizer

from llama2_jax.config import UserError
from llama2_jax.data import dialogs, preferences, tokenise
from llama2_jax.data.dialogs import DialogConfig, DialogData
from llama2_jax.data.preferences import PreferenceConfig, PreferenceData


class Bytes(ByteTokenizer):
    """Encodes single texts, too, and counts the rows that were encoded."""

    def encode(self, text, bos, eos):
        return bos * [1] + [3 + byte for byte in f' {text}'.encode()] + eos * [2]


def row(i):
    kind = i % 10
    if kind == 0:
        return {'prompt': f'list {i}', 'responses': [f'{rank} é' for rank in range(3)]}
    if kind == 1:
        return {'prompt': f'tie {i}', 'chosen': 'same', 'rejected': 'same'}
    if kind == 2:
        return {'prompt': f'q{i}' * 200, 'chosen': 'a', 'rejected': 'b'}
    if kind == 3:
        return {'prompt': f'of row {i - 1}', 'chosen': 'equal', 'rejected': 'equal '}
    return {
        'prompt': f'question {i // 3}',
        'chosen': f'good {i}',
        'rejected': f'bad {i}',
        'rating': 'better',
        'chosen_safe': True,
    }


def write(path, first, last, mode='w'):
    with path.open(mode) as file:
        file.writelines(json.dumps(row(i)) + '\n' for i in range(first, last))


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv('LLAMA2_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(tokenise, 'CHUNK', 1500)
    encoded = []
    encode = preferences.to_comparisons
    monkeypatch.setattr(preferences, 'to_comparisons', lambda record: encoded.append(record.where) or encode(record))
    monkeypatch.setattr(tokenise.os, 'cpu_count', lambda: 1)

    def make(path, few=0, skip=0):
        monkeypatch.setattr(tokenise, 'FEW', few)
        encoded.clear()
        config = PreferenceConfig(f'rows:{path} skip={skip}', heldout=0.1)
        data = PreferenceData(config, Bytes(), length=400, context=200, batch_size=16, seed=0)
        everything = [*data.train(), *data.heldout(0)]
        return everything, data.table(), [data.describe(batch['record_ids']) for batch in data.train()], len(encoded)

    return make


def is_same(found, expected):
    return equal(found[0], expected[0]) and found[1:3] == expected[1:3]


def test_batches_and_counts_are_the_same_in_memory_built_and_read(make, tmp_path):
    path = tmp_path / 'a.jsonl'
    write(path, 0, 300)
    expected = make(path, few=10**9)
    assert not (tmp_path / 'cache').exists()
    assert '30 equal as tokens, 30 tie, 30 too long' in expected[1]
    built, read = make(path), make(path)
    assert is_same(built, expected) and is_same(read, expected)
    assert (expected[3], built[3], read[3]) == (300, 300, 0)


def test_an_appended_row_and_a_changed_one(make, tmp_path):
    path = tmp_path / 'a.jsonl'
    write(path, 0, 300)
    make(path)
    write(path, 300, 305, 'a')
    grown = make(path)
    assert grown[3] < 30 and is_same(grown, make(path, few=10**9))
    assert len(list((tmp_path / 'cache').iterdir())) == 1
    path.write_text(path.read_text().replace('"good 4"', '"Good 4"'))
    changed = make(path)
    assert changed[3] == 305 and is_same(changed, make(path, few=10**9))


def test_bad_rows_are_named_from_the_cache_too(make, tmp_path):
    path = tmp_path / 'a.jsonl'
    write(path, 0, 100)
    with path.open('a') as file:
        file.write('{"prompt": 1}\n')
    assert is_same(make(path, skip=1), make(path, few=10**9, skip=1))
    found = make(path, skip=1)
    assert found[3] == 0 and 'a.jsonl:101' in found[1]
    with pytest.raises(UserError, match=r'a\.jsonl:101'):
        make(path)


def test_a_damaged_record_is_named(make, tmp_path):
    path = tmp_path / 'a.jsonl'
    write(path, 0, 300)
    make(path)
    [file] = (tmp_path / 'cache').glob('*/tokens-*')
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r'tokens-00000\.arrayrecord is corrupt'):
        make(path)


def test_dialogs_are_the_same_in_memory_built_read_and_grown(tmp_path, monkeypatch):
    monkeypatch.setenv('LLAMA2_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(tokenise, 'CHUNK', 1500)
    monkeypatch.setattr(tokenise.os, 'cpu_count', lambda: 1)
    path, encoded, encode = tmp_path / 'a.jsonl', [], dialogs.to_dialog
    monkeypatch.setattr(dialogs, 'to_dialog', lambda record: encoded.append(record.where) or encode(record))

    def write(first, last):
        with path.open('a') as file:
            for i in range(first, last):
                row = {'prompt': f'question {i}' * (30 if i % 10 == 2 else 1), 'output': f'answer {i} é'}
                file.write(json.dumps({'prompt': 1} if i == 7 else row) + '\n')

    def make(few=0):
        monkeypatch.setattr(tokenise, 'FEW', few)
        encoded.clear()
        data = DialogData(DialogConfig(f'rows:{path} skip=1', heldout=0.1), Bytes(), length=99, batch_size=4, seed=0)
        batches = [*data.train(), *data.heldout(0)]
        return batches, data.table(), [data.describe(batch['record_ids']) for batch in data.train()], len(encoded)

    write(0, 200)
    expected = make(few=10**9)
    assert '20 too long, 1 bad rows' in expected[1] and 'a.jsonl:8' in expected[1]
    built, read = make(), make()
    assert is_same(built, expected) and is_same(read, expected)
    assert (built[3], read[3]) == (200, 0)
    write(200, 205)
    grown = make()
    assert grown[3] < 40 and is_same(grown, make(few=10**9))
