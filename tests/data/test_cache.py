import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer, DyingTokenizer, documents

from llama2_jax.config import UserError
from llama2_jax.data import cache as cache_module
from llama2_jax.data import documents as documents_module
from llama2_jax.data import sources, tokenise
from llama2_jax.data.cache import RECORD

TEXTS = [f'document {i} ' + 'é' * (i % 50) for i in range(300)]


@pytest.fixture
def corpus(tmp_path):
    """Five parts of 60 documents, several chunks each, and two empty documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'PART', 1000)
        patch.setattr(tokenise, 'CHUNK', 700)
        for part in range(5):
            lines = [json.dumps({'text': text}) for text in TEXTS[part * 60 : part * 60 + 60]]
            (tmp_path / f'{part}.jsonl').write_text('\n'.join([*lines, *['{"text": " \\n"}'] * (part < 2)]))
        yield f'jsonl:{tmp_path}/*.jsonl'


def build(corpus, root, heldout=0.2, **kwargs):
    return documents_module.build(
        corpus, kwargs.pop('tokenizer', ByteTokenizer()), root, heldout=heldout, **{'workers': 1, **kwargs}
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_all_documents_are_there_once_split_by_content_and_counted(corpus, tmp_path):
    cache = build(corpus, tmp_path / 'cache')
    train, heldout = (documents(stream.read(0, len(stream))) for stream in (cache.train, cache.heldout))
    assert sorted(train + heldout) == sorted(TEXTS)
    assert train != sorted(train, key=TEXTS.index)  # shuffled within a chunk
    assert [TEXTS.index(text) // 60 for text in train] == sorted(
        TEXTS.index(text) // 60 for text in train
    )  # but not across parts
    assert 30 < len(heldout) < 90
    assert cache.documents == {'train': len(train), 'heldout': len(heldout)}
    assert cache.bytes == {'train': len(''.join(train).encode()), 'heldout': len(''.join(heldout).encode())}
    assert cache.tokens == {split: cache.bytes[split] + 2 * cache.documents[split] for split in ('train', 'heldout')}
    assert cache.empty == 2
    assert cache.train.read(0, 5).dtype == np.uint16


def test_duplicates_fall_on_one_side_in_any_source(tmp_path):
    for name in ('a', 'b'):
        rows = [json.dumps({'text': f'{i % 97} times'}) for i in range(300 if name == 'a' else 97)]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(rows))
    splits = []
    for name in ('a', 'b'):
        cache = build(f'jsonl:{tmp_path}/{name}.jsonl', tmp_path / 'cache')
        splits.append([set(documents(stream.read(0, len(stream)))) for stream in (cache.train, cache.heldout)])
    assert splits[0] == splits[1]
    assert not splits[0][0] & splits[0][1]
    assert len(splits[0][0] | splits[0][1]) == 97
    assert cache.documents == {'train': len(splits[1][0]), 'heldout': len(splits[1][1])}


def test_the_same_with_one_and_three_workers_and_with_two_processes(corpus, tmp_path):
    expected = contents(build(corpus, tmp_path / 'one').directory)
    assert sorted(expected)[:2] == ['00000.json', '00001.json']
    assert 'meta.json' in expected
    assert contents(build(corpus, tmp_path / 'three', workers=3).directory) == expected

    barrier, caches = threading.Barrier(2), {}

    def process(index, root):
        wait = lambda name: barrier.wait(30)  # noqa: E731
        caches[index] = build(corpus, root, process_index=index, process_count=2, barrier=wait)

    for roots in (['shared', 'shared'], ['disk0', 'disk1']):  # shared storage, and a disk each
        threads = [threading.Thread(target=process, args=(i, tmp_path / root)) for i, root in enumerate(roots)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for cache in caches.values():
            assert contents(cache.directory) == expected


def test_a_finished_cache_is_not_built_again_and_a_changed_source_is(corpus, tmp_path, monkeypatch):
    cache = build(corpus, tmp_path / 'cache')
    other = build(corpus, tmp_path / 'cache', heldout=0.5)
    assert other.directory != cache.directory
    assert build(corpus, tmp_path / 'cache', tokenizer=ByteTokenizer(300)).directory != cache.directory
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, 'encode_all', None)  # would fail if called
        assert build(corpus, tmp_path / 'cache').directory == cache.directory
    os.utime(tmp_path / '3.jsonl', (1, 1))
    assert build(corpus, tmp_path / 'cache').directory != cache.directory


def test_a_killed_build_goes_on_and_never_looks_whole(corpus, tmp_path, monkeypatch):
    expected = contents(build(corpus, tmp_path / 'whole').directory)
    read, seen = tokenise.cut, []

    def killed(*args):
        for chunk in read(*args):
            seen.append(chunk.part)
            if chunk.part == 3:
                raise KeyboardInterrupt
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(tokenise, 'cut', killed)
        patch.setattr(tokenise, 'FEW', 0)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, tmp_path / 'cache')
    (directory,) = (tmp_path / 'cache').iterdir()
    names = sorted(contents(directory))
    assert 'meta.json' not in names
    assert [name for name in names if name.endswith('json')] == ['00000.json', '00001.json']  # part 2 was not closed yet
    assert not [name for name in names if '00003' in name]
    old = directory / 'train-00002.arrayrecord.elsewhere-1.tmp'  # of a process that was shot
    old.write_bytes(b'half')
    os.utime(old, (1, 1))
    todo = []
    monkeypatch.setattr(tokenise, 'cut', lambda index, *args: todo.append(index) or read(index, *args))
    build(corpus, tmp_path / 'cache')
    assert todo == [2, 3, 4]
    assert contents(directory) == expected


def test_bad_source_leaves_nothing_that_looks_whole(corpus, tmp_path):
    (tmp_path / '4.jsonl').write_text('{"text": "a"}\n{"text"}')
    with pytest.raises(UserError, match=r'/4\.jsonl:2 is not JSON'):
        build(corpus, tmp_path / 'cache')
    (directory,) = (tmp_path / 'cache').iterdir()
    assert not [name for name in contents(directory) if name == 'meta.json' or name.endswith('.tmp')]


@pytest.fixture
def big(tmp_path):
    """A stream of some records in each of three parts, and its tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'PART', 1000)
        for part in range(3):
            (tmp_path / f'{part}.txt').write_bytes(
                np.random.default_rng(part).integers(97, 123, 20000 + part, np.uint8).tobytes()
            )
        cache = build(f'text:{tmp_path}/*.txt', tmp_path / 'cache', heldout=0)
        yield cache, cache.train.read(0, len(cache.train))


def test_random_access_to_the_stream(big, monkeypatch):
    cache, tokens = big
    assert len(tokens) == len(cache.train) == 60003 + 2 * 6  # each text is two pieces
    assert len(cache.heldout) == 0
    monkeypatch.setattr(cache_module, 'OPEN_FILES', 1)
    part = 20004
    for start, stop in [
        (0, 1),
        (RECORD - 1, RECORD + 1),
        (RECORD, 3 * RECORD),
        (part - 1, part),
        (part - 1, part + 1),
        (7, 60001),
    ]:
        assert np.array_equal(cache.train.read(start, stop), tokens[start:stop])
    assert cache.train.locate(0, RECORD) == 'record 0 of train-00000.arrayrecord'
    assert cache.train.locate(RECORD - 1, RECORD + 1) == 'records 0-1 of train-00000.arrayrecord'
    assert cache.train.locate(part - 1, part + 1) == 'record 2 of train-00000.arrayrecord, record 0 of train-00001.arrayrecord'
    with pytest.raises(IndexError):
        cache.train.read(60000, 60016)


def test_wide_vocabularies(tmp_path):
    (tmp_path / 'a.txt').write_text('abc')
    cache = build(f'text:{tmp_path}/a.txt', tmp_path / 'cache', heldout=0, tokenizer=ByteTokenizer(2**16 + 1))
    assert cache.train.read(0, 5).dtype == np.uint32
    assert documents(cache.train.read(0, 5)) == ['abc']


@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'gone', 'record'])
def test_damage_is_named_with_the_way_out(big, damage):
    cache, tokens = big
    path = cache.directory / 'train-00001.arrayrecord'
    good = path.read_bytes()
    place = good.index(tokens[20004 + RECORD : 20004 + 2 * RECORD].tobytes())
    if damage == 'flip':
        path.write_bytes(good[: place + 99] + bytes([good[place + 99] ^ 1]) + good[place + 100 :])
    elif damage == 'cut':
        path.write_bytes(good[:place])
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'gone':
        path.unlink()
    else:
        shutil.copy(cache.directory / 'train-00000.arrayrecord', path)  # another file of almost the same size
    stream = documents_module.Documents(cache.directory).train
    record = {'flip': 1, 'record': 2}.get(damage, 0)
    sentence = (
        rf'^Record {record} of {path} is corrupt or half-written \(.*\); delete {cache.directory} and run again to rebuild it\.$'
    )
    with pytest.raises(UserError, match=sentence):
        stream.read(20004 + record * RECORD, 20004 + record * RECORD + 9)
    assert np.array_equal(stream.read(0, 20004), tokens[:20004])  # the other files are fine


def test_directories_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'^The token cache .*/file/jsonl-.* cannot be built: .*Not a directory'):
        build(corpus, tmp_path / 'file')
    with pytest.raises(UserError, match=r'^The token cache cannot lie at gs://bucket/x'):
        build(corpus, 'gs://bucket/x')


def test_a_full_disk_is_named(corpus, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            pass

        def write(self, data):
            raise RuntimeError('No space left on device')

        def close(self):
            raise RuntimeError('Failed')

    monkeypatch.setattr(tokenise, 'ArrayRecordWriter', Full)
    with pytest.raises(UserError, match=r'-00000.arrayrecord could not be written: No space left on device'):
        build(corpus, tmp_path / 'cache')


def test_a_worker_that_is_killed_is_reported(corpus, tmp_path):
    with pytest.raises(UserError, match=r'^A tokenising process was killed'):
        build(corpus, tmp_path / 'cache', tokenizer=DyingTokenizer(), workers=2)


def test_workers_do_not_run_the_script(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from byte_tokenizer import ByteTokenizer
        from llama2_jax.data import documents, tokenise

        print('script')
        tokenise.CHUNK = 100
        cache = documents.build('text:{tmp_path}/a.txt', ByteTokenizer(), '{tmp_path}/cache', heldout=0, workers=2)
        print(cache.documents['train'])
        """)
    )
    (tmp_path / 'a.txt').write_text('\n<|endoftext|>\n'.join(f'document {i} of a script without a guard' for i in range(50)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ('script\n50\n', 0), done.stderr


READING = """
    from llama2_jax.data.pretrain import DataConfig, PretrainData
    if __name__ == '__main__':
        config = DataConfig('text:{path}/a.txt', '{path}/cache', heldout=0, workers=1)
        batches = PretrainData(config, ByteTokenizer(), length=9, batch_size=4, seed=0, steps=10**6).train()
        next(batches)
        children = [child.pid for child in multiprocessing.active_children()]
        with open('{path}/pids', 'w') as file:
            file.write(f'{{children[0]}}\\n')
        time.sleep(1000)
"""
BUILDING = """
    from llama2_jax.data import documents, tokenise
    tokenise.CHUNK = 100
    documents.build('text:{path}/a.txt', SleepingTokenizer(), '{path}/cache', heldout=0, workers=2)
"""


@pytest.mark.parametrize('work', [READING, BUILDING])
def test_no_process_outlives_a_killed_run(tmp_path, work):
    head = f"""
    import multiprocessing, sys, time
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    from byte_tokenizer import ByteTokenizer, SleepingTokenizer
    """
    (tmp_path / 'script.py').write_text(textwrap.dedent(head) + textwrap.dedent(work.format(path=tmp_path)))
    (tmp_path / 'a.txt').write_text('\n<|endoftext|>\n'.join(f'document {i} of a run that is killed' for i in range(50)))
    pids = tmp_path / 'pids'
    with subprocess.Popen([sys.executable, str(tmp_path / 'script.py')], env={**os.environ, 'PIDS': str(pids)}) as run:
        while not (pids.exists() and pids.read_text().endswith('\n')):
            assert run.poll() is None
            time.sleep(0.1)
        run.kill()
    workers = [int(pid) for pid in pids.read_text().split()]
    assert workers
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False
