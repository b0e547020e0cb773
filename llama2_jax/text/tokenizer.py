"""SentencePiece as LLaMA 2 uses it: loading Meta's own model, training one with the same settings, text to ids and back."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from llama2_jax.config import UserError
from llama2_jax.files import read_whole, write_atomically
from llama2_jax.text.template import PromptFormat

FILE_NAME = 'tokenizer.model'
SENTENCE_BYTES = 4192  # SentencePiece drops longer training sentences without a word, so `sentences` cuts them
WHITESPACE_SCORE = -1e9
MODEL_BYTES = 2**26  # of a model file at most; the largest known has 5 MB


class NoText(UserError):
    """A tokenizer was to be trained on documents without text."""


class Tokenizer:
    """A SentencePiece model: `<unk>`, `<s>`, `</s>`, 256 byte pieces, then the learned pieces (recipe B).

    Text is always plain text: '<s>' or '[INST]' inside it become ordinary pieces, so nobody can forge the end of a turn.
    BOS and EOS come only from the `bos` and `eos` arguments. There is no padding id.

    Args:
      path: a `tokenizer.model` file, or a directory that holds one; local or `gs://`.

    Raises:
      UserError: if there is no such file, or it is not a SentencePiece model with BOS, EOS and `<unk>`.
    """

    padded_vocab_size = 0  # rows of the vocabulary that the model came with, where those without a piece were cut
    stop_ids: tuple[int, ...] = ()  # token ids that end a text besides EOS, which a model's files may name
    prompts = PromptFormat()  # of the model that it belongs to; not copied to data workers, as training uses LLaMA 2's format

    def __init__(self, path: str | os.PathLike):
        file = epath.Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise UserError(f'There is no tokenizer at {file}.')
        self.path = os.fspath(file)
        self._load(read_whole(file, MODEL_BYTES))

    def _load(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError):  # ValueError: text that is not UTF-8
            raise UserError(f'{self.path} is not a SentencePiece model, or is damaged.') from None
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if not self.vocab_size or min(self.unk_id, self.bos_id, self.eos_id) < 0:
            raise UserError(f'{self.path} has no <unk>, BOS or EOS piece, so it cannot mark where a document begins and ends.')

    def __getstate__(self) -> dict:  # data workers get the model itself, not a path that may have changed
        return {'path': self.path, 'model': self._model, 'stop_ids': self.stop_ids}

    def __setstate__(self, state: dict) -> None:
        self.path = state['path']
        self._load(state['model'])
        self.stop_ids = state['stop_ids'] if state['stop_ids'] != (self.eos_id,) else ()

    @classmethod
    def from_bytes(cls, model: bytes, path: str | os.PathLike = FILE_NAME, stop_ids: tuple[int, ...] = ()) -> 'Tokenizer':
        """From the content of a model file; `path` is what errors call it."""
        tokenizer = cls.__new__(cls)
        tokenizer.__setstate__({'path': os.fspath(path), 'model': model, 'stop_ids': stop_ids})
        return tokenizer

    @property
    def model(self) -> bytes:
        """The content of the model file."""
        return self._model

    @property
    def fingerprint(self) -> str:
        """A short hash of the model file: two tokenizers with the same one give the same ids."""
        return hashlib.sha256(self._model).hexdigest()[:16]

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """The ids of a text; empty text has none.

        >>> llama2.encode('Hello world', bos=True, eos=True)
        [1, 15043, 3186, 2]

        Raises:
          UserError: for a lone surrogate, which no UTF-8 file can hold (JSON's backslash-u escapes can).
        """
        _check_encodable(text)
        return self._processor.encode(text, add_bos=bos, add_eos=eos)

    def encode_batch(self, texts: Sequence[str], bos: bool, eos: bool) -> list[list[int]]:
        """The ids of each text, in one call on the calling thread (data workers are processes of their own)."""
        for text in texts:
            _check_encodable(text)
        return self._processor.encode(list(texts), add_bos=bos, add_eos=eos, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; BOS and EOS vanish, and so does the space that encoding put before the first piece.

        Byte pieces that are not valid UTF-8 become U+FFFD.

        >>> llama2.decode([1, 15043, 2])
        'Hello'

        Raises:
          UserError: for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        if bad:
            raise UserError(f'Token id {bad[0]} is outside the vocabulary of {self.path}, which has {self.vocab_size} pieces.')
        return self._processor.decode(ids)

    def piece(self, token: int) -> str:
        """The piece of an id as the model file spells it ('▁Hello', '<0x0A>')."""
        return self._processor.id_to_piece(int(token))


def _check_encodable(text: str) -> None:
    if text.isascii():  # fast
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f'Character {error.start} of the text is a lone surrogate (U+{ord(text[error.start]):04X}), not text.'
        ) from None


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts into what SentencePiece trains on: lines, and lines cut at spaces to at most `SENTENCE_BYTES` of UTF-8.

    Lines, because a newline must stay the byte piece `<0x0A>` (id 13) and never become part of a learned piece. The
    space at a cut goes, as SentencePiece puts one before every sentence.
    """
    for text in texts:
        _check_encodable(text)
        # SentencePiece reserves U+2585 and drops every sentence with it: the sentence ends there, the character stays bytes.
        for line in text.replace('\u2585', '\n').split('\n'):
            rest = line.encode()
            while len(rest) > SENTENCE_BYTES:
                end = rest.rfind(b' ', 1, SENTENCE_BYTES + 1)
                if end < 0:
                    end = SENTENCE_BYTES
                    while rest[end] & 0xC0 == 0x80:  # inside a character
                        end -= 1
                yield rest[:end].decode()
                rest = rest[end:].removeprefix(b' ')
            if rest:
                yield rest.decode()


def train_tokenizer(
    texts: Iterable[str], output: str | os.PathLike, vocab_size: int, max_sentences: int = 200_000_000
) -> Tokenizer:
    """Trains a tokenizer with the settings of LLaMA 2's own (recipe B) and writes it to `output`, whole or not at all.

    The same texts give the same file, byte for byte.

    Args:
      texts: documents of any length.
      output: the model file to write, or an existing directory to write `tokenizer.model` into.
      vocab_size: number of pieces, the 259 of `<unk>`, `<s>`, `</s>` and the bytes included.
      max_sentences: of more sentences (lines) than this, a random sample is used.

    Raises:
      UserError: if there is no text, or `vocab_size` is larger or smaller than the text allows (the limit is named).
    """
    if max_sentences <= 100:  # SentencePiece's own bound
        raise UserError(f'The tokenizer needs at least 101 sentences to sample, not {max_sentences}.')
    model = _train(texts, vocab_size, max_sentences)
    file = epath.Path(output)
    if file.is_dir():
        file = file / FILE_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, model)
    return Tokenizer(file)


class _Lines:
    """An iterator that remembers what went by: SentencePiece turns an exception inside it into one of its own."""

    def __init__(self, lines: Iterator[str]):
        self._lines = lines
        self.count = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise
        self.count += 1
        return line


def _train(texts: Iterable[str], vocab_size: int, max_sentences: int) -> bytes:
    lines = _Lines(sentences(texts))
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            model_type='bpe',
            vocab_size=vocab_size,
            character_coverage=0.99995,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=True,
            max_sentence_length=SENTENCE_BYTES,
            max_sentencepiece_length=16,
            split_digits=True,
            split_by_number=True,
            split_by_unicode_script=True,
            split_by_whitespace=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            normalization_rule_name='identity',
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=16,  # written into the model file, so not a matter of the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error:
            raise lines.error from None
        if not lines.count:
            raise NoText('There is no text to train a tokenizer on.') from None
        raise _training_error(error, vocab_size) from None
    return _merge_whitespace_last(written.getvalue())


def _training_error(error: RuntimeError, vocab_size: int) -> Exception:
    """SentencePiece reports sizes only in the words of its messages; an unknown message stays as it is."""
    if largest := re.search(r'set it to a value <= (\d+)', str(error)):
        return UserError(f'The text is too small for a vocabulary of {vocab_size}: the largest possible one is {largest[1]}.')
    if smallest := re.search(r'smaller than required_chars. \d+ vs (\d+)', str(error)):
        return UserError(f'A vocabulary of {vocab_size} is too small: the bytes and characters of this text need {smallest[1]}.')
    return error


def _merge_whitespace_last(model: bytes) -> bytes:
    """Gives pieces that are only spaces the score -1e9, as in LLaMA 2's model; the trainer itself does not.

    In training a run of spaces leaves its last one to the word that follows ('▁▁' + '▁two'). Encoding merges by score
    alone, and with the trained score (often the very highest) it would take that space away ('▁▁▁' + 'two').
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        if not piece.piece.strip('▁'):
            piece.score = WHITESPACE_SCORE
    return proto.SerializeToString(deterministic=True)
