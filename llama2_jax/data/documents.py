"""Text to pretrain on as tokens: BOS, document, EOS, one after the other, in a token cache of two columns."""

import dataclasses
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama2_jax.data import tokenise
from llama2_jax.data.cache import Cache
from llama2_jax.data.files import Position
from llama2_jax.data.sources import Part
from llama2_jax.data.tokenise import Chunk, Encoded

SPLITS = ('train', 'heldout')


class Documents(Cache):
    """A cache of documents.

    Attributes:
      train, heldout: streams of tokens.
      documents, tokens, bytes: dicts by split; bytes are of the documents' UTF-8 text.
      empty: documents that were skipped because they hold nothing but white space.
      fingerprint: the number of all tokens and a hash of them.
    """

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.train, self.heldout = (self.streams[split] for split in SPLITS)
        self.documents, self.bytes = ({s: self.counts[f'{s} {what}'] for s in SPLITS} for what in ('documents', 'bytes'))
        self.tokens = {split: len(self.streams[split]) for split in SPLITS}
        self.empty = self.counts['empty']
        self.fingerprint = f'{sum(self.tokens.values()):,} tokens, {self.digest}'


def build(source: str, tokenizer, root: str | os.PathLike, *, heldout: float, **kwargs: Any) -> Documents:
    """The cache of a source of documents, built first if it is not there.

    Args:
      tokenizer: a `llama2_jax.text.tokenizer.Tokenizer`.
      heldout: the share of documents held out; which ones is decided by their content, so duplicates stay on one side.
      kwargs: workers, and which of how many processes this is, as of `tokenise.build`.

    Raises:
      UserError: for anything wrong with the source, or a directory that cannot be written.
    """
    return Documents(tokenise.build(source, _Encoder(tokenizer, heldout), root, **kwargs))


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Chunk to tokens. Sizes and times say whether a file has changed: terabytes are not read again at every start."""

    tokenizer: Any
    heldout: float

    by_content = False

    @property
    def key(self) -> tuple:
        return 'documents', self.tokenizer.fingerprint, self.heldout

    @property
    def columns(self) -> dict[str, np.dtype]:
        return dict.fromkeys(SPLITS, tokenise.token_dtype(self.tokenizer))

    def read(self, part: Part, start: Position) -> Iterator[tuple[str, int, Position | None]]:
        for text, end in part.documents(start):
            yield text, len(text), end

    def __call__(self, chunk: Chunk) -> Encoded:
        texts = {split: [] for split in SPLITS}
        counts = Counter()
        for i in np.random.default_rng((chunk.seed, chunk.number)).permutation(len(chunk.units)):
            data = chunk.units[i].encode()
            if not data or data.isspace():
                counts['empty'] += 1
                continue
            fate = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64
            split = 'heldout' if fate < self.heldout else 'train'
            texts[split].append(chunk.units[i])
            counts[f'{split} documents'] += 1
            counts[f'{split} bytes'] += len(data)
        ids = {split: self.tokenizer.encode_batch(texts[split], bos=True, eos=True) for split in SPLITS}
        columns = {split: np.fromiter(itertools.chain.from_iterable(ids[split]), self.columns[split]) for split in SPLITS}
        return Encoded(columns, counts)
