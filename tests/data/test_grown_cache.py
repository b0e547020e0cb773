"""Caches of sources that changed: what is as it was is not tokenised again, and the result is that of a new cache."""

import gzip
import json
import shutil

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer

from llama2_jax.data import documents, sources, tokenise
from llama2_jax.data.documents import build


class Counting(ByteTokenizer):
    """Counts the documents that it encodes."""

    count = 0

    def encode_batch(self, texts, bos, eos):
        Counting.count += len(texts)
        return super().encode_batch(texts, bos, eos)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenise, 'CHUNK', 700)
    Counting.count = 0


def made(source, root):
    """A cache, and how many documents were encoded for it."""
    before = Counting.count
    cache = build(source, Counting(), root, heldout=0.2, workers=1)
    return cache, Counting.count - before


def same(cache, source, tmp_path):
    """Whether a cache is what a new one of the source is."""
    shutil.rmtree(tmp_path / 'new', ignore_errors=True)
    new = build(source, Counting(), tmp_path / 'new', heldout=0.2, workers=1)
    streams = all(
        np.array_equal(a.read(0, len(a)), b.read(0, len(b))) for a, b in ((cache.train, new.train), (cache.heldout, new.heldout))
    )
    facts = ('documents', 'tokens', 'bytes', 'empty', 'fingerprint')
    return streams and all(getattr(cache, name) == getattr(new, name) for name in facts)


def lines(first, last):
    return ''.join(json.dumps({'text': f'document {i} ' + 'é' * (i % 50)}) + '\n' for i in range(first, last))


def texts(first, last):
    return ''.join(f'document {i} ' + 'x' * (i % 50) + '\n<|endoftext|>\n' for i in range(first, last))


@pytest.mark.parametrize(('kind', 'write'), [('rows', lines), ('text', texts)])
def test_a_file_that_has_grown_is_tokenised_from_its_last_chunk_on(tmp_path, kind, write):
    path, source = tmp_path / 'a.data', f'{kind}:{tmp_path}/a.data'
    path.write_text(write(0, 300))
    cache, count = made(source, tmp_path / 'cache')
    assert count == 300
    del cache
    path.write_text(write(0, 310))
    cache, count = made(source, tmp_path / 'cache')
    assert 10 <= count <= 35  # a chunk has about 20
    assert same(cache, source, tmp_path)
    assert [path.name for path in (tmp_path / 'cache').iterdir()] == [cache.directory.name]  # the old one is gone


def test_text_without_ends_of_documents_that_has_grown(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'PIECE', 200)
    words = ' '.join(f'word{i}' + '\n' * (i % 7 == 0) + '\n' * (i % 11 == 0) for i in range(2000))
    path, source = tmp_path / 'a.txt', f'text:{tmp_path}/a.txt'
    for size in (5000, 5017, 9000, len(words)):
        path.write_text(words[:size])
        cache, _ = made(source, tmp_path / 'cache')
        assert same(cache, source, tmp_path)
        del cache
    path.write_text('\ufeff' + words)
    assert same(made(source, tmp_path / 'cache')[0], source, tmp_path)


@pytest.mark.parametrize('change', ['begin', 'end', 'cut', 'line'])
def test_a_changed_beginning_is_tokenised_again(tmp_path, change):
    path, source = tmp_path / 'a.jsonl', f'rows:{tmp_path}/a.jsonl'
    path.write_text(lines(0, 300).rstrip('\n') if change == 'line' else lines(0, 300))
    made(source, tmp_path / 'cache')
    changed = {
        'begin': lines(0, 310).replace('document 0 ', 'Document 0 '),
        'end': lines(0, 310).replace('document 299 ', 'Document 299 '),
        'cut': lines(0, 100),
        'line': lines(0, 300).rstrip('\n') + '\n' + lines(300, 310),
    }[change]
    path.write_text(changed)
    cache, count = made(source, tmp_path / 'cache')
    assert count == {'begin': 310, 'end': 310, 'cut': 100, 'line': count}[change]
    assert count < 40 or change != 'line'
    assert same(cache, source, tmp_path)


def test_an_added_file_alone_is_tokenised_wherever_it_stands(tmp_path):
    for name in 'bd':
        (tmp_path / f'{name}.jsonl').write_text(lines(0, 50) if name == 'b' else lines(50, 100))
    source = f'rows:{tmp_path}/*.jsonl'
    made(source, tmp_path / 'cache')
    for name in 'ace':
        (tmp_path / f'{name}.jsonl').write_text(lines(100, 107))
        cache, count = made(source, tmp_path / 'cache')
        assert count == 7
        assert same(cache, source, tmp_path)
    (tmp_path / 'a.jsonl').unlink()
    cache, count = made(source, tmp_path / 'cache')
    assert count == 0 and same(cache, source, tmp_path)


def test_a_file_that_was_only_touched_or_is_compressed(tmp_path):
    path, source = tmp_path / 'a.jsonl', f'rows:{tmp_path}/a.jsonl*'
    path.write_text(lines(0, 50))
    made(source, tmp_path / 'cache')
    path.write_text(lines(0, 50))
    cache, count = made(source, tmp_path / 'cache')
    assert count == 0 and same(cache, source, tmp_path)
    path.unlink()
    packed = tmp_path / 'a.jsonl.gz'
    for last in (50, 60):
        packed.write_bytes(gzip.compress(lines(0, last).encode()))
        cache, count = made(source, tmp_path / 'cache')
        assert count == last and same(cache, source, tmp_path)


def test_a_cache_in_use_is_not_removed_and_others_are(tmp_path):
    path, source = tmp_path / 'a.jsonl', f'rows:{tmp_path}/a.jsonl'
    path.write_text(lines(0, 50))
    used, _ = made(source, tmp_path / 'cache')
    other = build(source, ByteTokenizer(300), tmp_path / 'cache', heldout=0.2, workers=1).directory
    tokens = used.train.read(0, len(used.train))
    path.write_text(lines(0, 60))
    new = made(source, tmp_path / 'cache')[0].directory
    assert np.array_equal(documents.Documents(used.directory).train.read(0, len(tokens)), tokens)
    assert sorted((tmp_path / 'cache').iterdir()) == sorted([used.directory, other, new])  # other: of another tokenizer
    old = used.directory
    del used
    path.write_text(lines(0, 70))
    made(source, tmp_path / 'cache')
    assert not old.exists() and not new.exists() and other.exists()


@pytest.mark.parametrize('damage', ['cut', 'gone', 'meta', 'info'])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    for name in 'ab':
        (tmp_path / f'{name}.jsonl').write_text(lines(0, 50))
    source = f'rows:{tmp_path}/*.jsonl'
    directory = made(source, tmp_path / 'cache')[0].directory
    path = directory / {'meta': 'meta.json', 'info': '00001.json'}.get(damage, 'train-00001.arrayrecord')
    path.unlink() if damage == 'gone' else path.write_bytes(path.read_bytes()[:50])
    cache, count = made(source, tmp_path / 'cache')
    assert count == (0 if damage == 'meta' else 50)
    assert same(cache, source, tmp_path)
