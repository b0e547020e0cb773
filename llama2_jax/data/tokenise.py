"""Builds token caches (`data/cache.py`): a source is tokenised once, in parallel, by all processes of a run.

This process reads documents and writes records, others tokenise, so that one large `.gz` keeps all cores busy. What is built
depends only on the source, not on how many processes or hosts build it. A build that was killed goes on with the parts it had
not finished.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from llama2_jax.config import UserError
from llama2_jax.data import sources
from llama2_jax.data.cache import RECORD, SPLITS, Cache, file_name

FORMAT = 2  # change it when the same source would be cut or stored differently
CHUNK = 2**20  # characters of text that a process tokenises at once; documents are shuffled within a chunk
FEW = 4  # chunks: a source no larger than this is tokenised in this process, for starting others takes seconds


def build(
    source: str,
    tokenizer,
    root: str | os.PathLike,
    *,
    heldout: float,
    workers: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[str], None] = lambda name: None,
) -> Cache:
    """The cache of a source under `root`, built first if it is not there (or not whole).

    Args:
      tokenizer: a `llama2_jax.text.tokenizer.Tokenizer`.
      heldout: the share of documents held out; which ones is decided by their content, so duplicates stay on one side.
      workers: processes that tokenise; None for one a core.
      barrier: called with a name, returns when all processes of the run have called it. Processes that see the same
        directory share the work, those with disks of their own build a cache each.

    Raises:
      UserError: for anything wrong with the source, or a directory that cannot be written.
    """
    parts = sources.split(source)
    directory = _directory(source, parts, tokenizer, root, heldout)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        members = _members(directory, process_index, process_count, barrier)
        rank = members.index(process_index)
        if not (directory / 'meta.json').exists():
            todo = [i for i in range(rank, len(parts), len(members)) if not (directory / f'{i:05d}.json').exists()]
            title = source if rank == 0 else ''
            _build_parts(directory, parts, todo, _Encoder(tokenizer, heldout), workers or os.cpu_count(), title)
        barrier('cache built')
        if rank == 0 and not (directory / 'meta.json').exists():
            infos = [json.loads((directory / f'{i:05d}.json').read_text()) for i in range(len(parts))]
            _write_json(directory / 'meta.json', {'source': source, 'dtype': _dtype(tokenizer), 'parts': infos})
            _tidy(directory)
        barrier('cache ready')
        (directory / f'member-{process_index}').unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f'The token cache {directory} cannot be built: {error}.') from error
    return Cache(directory)


def _directory(source: str, parts: list[sources.Part], tokenizer, root: str | os.PathLike, heldout: float) -> Path:
    if '://' in str(root):
        raise UserError(f'The token cache cannot lie at {root}, it needs a file system: mount the bucket and name the mount.')
    key = repr((FORMAT, RECORD, CHUNK, source, parts, tokenizer.fingerprint, heldout))
    kind, _, name = source.partition(':')
    readable = re.sub(r'[^A-Za-z0-9]+', '-', f'{kind}-{"-".join(Path(name).parts[-2:])}').strip('-')[:60]
    return Path(root).expanduser() / f'{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}'


def _members(directory: Path, index: int, count: int, barrier: Callable[[str], None]) -> list[int]:
    """The processes of the run that see this directory: all of them on shared storage, one on a disk of its own."""
    if count == 1:
        return [index]
    for stale in directory.glob('member-*'):
        stale.unlink(missing_ok=True)
    barrier('cache cleared')
    (directory / f'member-{index}').touch()
    barrier('cache joined')
    return sorted(int(path.name.removeprefix('member-')) for path in directory.glob('member-*'))


def _tidy(directory: Path) -> None:
    """Removes what killed builds left behind; a file that is being written is younger than this."""
    for path in directory.glob('*.tmp'):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _write_json(path: Path, value) -> None:
    temporary = _temporary(path)
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    """A name of this process's own, so that two runs that build the same cache at once do not meet; the results are equal."""
    return path.with_name(f'{path.name}.{os.uname().nodename}-{os.getpid()}.tmp')


# Tokenising


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Neighbouring documents of one part."""

    part: int
    number: int
    texts: list[str]


@dataclasses.dataclass
class _Encoded:
    """The tokens of a chunk by split, and how many documents and bytes of text they came from."""

    part: int
    ids: dict[str, np.ndarray]
    documents: dict[str, int]
    bytes: dict[str, int]
    empty: int


def _dtype(tokenizer) -> str:
    return '<u2' if tokenizer.vocab_size <= 2**16 else '<u4'


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Chunk to tokens; runs in the tokenising processes."""

    tokenizer: Any
    heldout: float

    def __call__(self, chunk: _Chunk) -> _Encoded:
        texts = {split: [] for split in SPLITS}
        size, empty = dict.fromkeys(SPLITS, 0), 0
        for i in np.random.default_rng((chunk.part, chunk.number)).permutation(len(chunk.texts)):
            data = chunk.texts[i].encode()
            if not data or data.isspace():
                empty += 1
                continue
            fate = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64
            split = 'heldout' if fate < self.heldout else 'train'
            texts[split].append(chunk.texts[i])
            size[split] += len(data)
        ids = {split: self.tokenizer.encode_batch(texts[split], bos=True, eos=True) for split in SPLITS}
        arrays = {split: np.fromiter(itertools.chain.from_iterable(ids[split]), _dtype(self.tokenizer)) for split in SPLITS}
        return _Encoded(chunk.part, arrays, {split: len(texts[split]) for split in SPLITS}, size, empty)


def _chunks(parts: list[sources.Part], todo: list[int]) -> Iterator[_Chunk]:
    """Cuts the documents of parts into chunks of about CHUNK characters; no chunk spans two parts."""
    for part in todo:
        texts, size, number = [], 0, 0
        for text in parts[part].documents():
            texts.append(text)
            size += len(text)
            if size >= CHUNK:
                yield _Chunk(part, number, texts)
                texts, size, number = [], 0, number + 1
        yield _Chunk(part, number, texts)  # the last, perhaps empty: every part has one


def _encoded(chunks: Iterable[_Chunk], encode: _Encoder, workers: int) -> Iterator[_Encoded]:
    """Encodes chunks in order, on `workers` processes if there are enough of them; holds a few chunks a worker."""
    chunks = iter(chunks)
    few = list(itertools.islice(chunks, FEW + 1))
    if workers == 1 or len(few) <= FEW:
        yield from map(encode, itertools.chain(few, chunks))
        return
    context = multiprocessing.get_context('spawn')  # never fork: JAX may be running threads
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(encode,)) as pool:
        pending = collections.deque()
        try:
            for chunk in itertools.chain(few, chunks):
                with _without_main():
                    pending.append(pool.submit(_work, chunk))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError('A tokenising process was killed, perhaps for lack of memory; run again to continue.') from None
        finally:
            for future in pending:
                future.cancel()


def _start(encode: _Encoder) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    end_with_parent()


def end_with_parent(*_) -> None:
    """Ends this worker process when its parent is gone: one that was killed cannot tell it, and the worker would wait forever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(chunk: _Chunk) -> _Encoded:
    return _encode(chunk)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes started inside do not import the running script first: it would load JAX, and fail without a `__main__` guard."""
    main = sys.modules['__main__']
    sys.modules['__main__'] = types.ModuleType('__main__')
    try:
        yield
    finally:
        sys.modules['__main__'] = main


# Writing


def _build_parts(directory: Path, parts: list[sources.Part], todo: list[int], encode: _Encoder, workers: int, title: str) -> None:
    """Writes the files of the parts in `todo`, each followed by the JSON that says it is finished."""
    sizes = [parts[i].bytes for i in todo]
    total = None if None in sizes else sum(sizes) or None  # unknown for gz
    documents = 0
    with tqdm(total=total, desc=f'tokenising {title}', unit='B', unit_scale=True, disable=not title or not todo) as bar:
        for part, results in itertools.groupby(_encoded(_chunks(parts, todo), encode, workers), lambda encoded: encoded.part):
            info = {'empty': 0, **{split: {'documents': 0, 'tokens': 0, 'bytes': 0} for split in SPLITS}}
            digest = hashlib.blake2b(digest_size=8)
            with contextlib.ExitStack() as stack:
                writers = {split: stack.enter_context(_RecordWriter(directory / file_name(split, part))) for split in SPLITS}
                for result in results:
                    info['empty'] += result.empty
                    for split in SPLITS:
                        writers[split].write(result.ids[split])
                        digest.update(result.ids[split])
                        info[split]['documents'] += result.documents[split]
                        info[split]['tokens'] += len(result.ids[split])
                        info[split]['bytes'] += result.bytes[split]
                    documents += sum(result.documents.values())
                    bar.set_postfix(documents=documents, refresh=False)
                    bar.update(sum(result.bytes.values()))
            _write_json(directory / f'{part:05d}.json', {**info, 'digest': digest.hexdigest()})


class _RecordWriter:
    """Writes a stream of tokens as records; the file appears under its name when all of it is written."""

    def __init__(self, path: Path):
        self._path, self._temporary = path, _temporary(path)
        self._rest = np.empty(0, np.uint16)

    def __enter__(self) -> Self:
        self._writer = self._checked(ArrayRecordWriter, str(self._temporary), 'group_size:1,uncompressed')
        return self

    def write(self, ids: np.ndarray) -> None:
        ids = np.concatenate([self._rest, ids])
        whole = len(ids) // RECORD * RECORD
        for record in ids[:whole].reshape(-1, RECORD):
            self._checked(self._writer.write, record.tobytes())
        self._rest = ids[whole:]

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            if len(self._rest):
                self._checked(self._writer.write, self._rest.tobytes())
            self._checked(self._writer.close)
            self._temporary.replace(self._path)
        else:
            with contextlib.suppress(RuntimeError, ValueError):  # the disk may be full; the first error is the one to tell
                self._writer.close()
            self._temporary.unlink(missing_ok=True)

    def _checked(self, action: Callable[..., Any], *arguments) -> Any:
        try:
            return action(*arguments)
        except (RuntimeError, ValueError) as error:  # what ArrayRecord raises, for example without space left
            raise UserError(f'{self._path} could not be written: {error}.') from error
