"""SentencePiece models made from the pieces that other files list, and extended by the tokens that a fine-tune added."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's numbers, which GGUF shares


class Piece(NamedTuple):
    """A piece of a vocabulary: its text, its score (the highest merges first) and its type."""

    text: str
    score: float
    kind: int


class AddedToken(NamedTuple):
    """A token beyond the learned vocabulary; `special`: it is no text, and None if no file says."""

    text: str
    special: bool | None

    @property
    def kind(self) -> int:
        """CONTROL for a token that no text may contain, such as `<|im_start|>`; otherwise USER_DEFINED."""
        looks_special = re.fullmatch(r'<.*>|\[.*\]', self.text, re.DOTALL) is not None
        return CONTROL if (looks_special if self.special is None else self.special) else USER_DEFINED


def kind_of(text: str) -> int:
    """The type of a learned piece by its text: the bytes are written <0x00> to <0xFF>."""
    return BYTE if re.fullmatch('<0x[0-9A-F]{2}>', text) else NORMAL


def make_model(pieces: Iterable[Piece], unk_id: int, bos_id: int, eos_id: int, add_space: bool) -> bytes:
    """A SentencePiece model with LLaMA 2's settings (recipe B).

    Args:
      pieces: the vocabulary, by id.
      unk_id, bos_id, eos_id: their types are set to what SentencePiece requires.
      add_space: a text begins with the marker of a space.

    Raises:
      TypeError, ValueError: a piece is not (text, number, type).
    """
    model = sentencepiece_model_pb2.ModelProto()
    for piece in pieces:
        model.pieces.add(piece=piece.text, score=piece.score, type=piece.kind)
    # Fine-tunes have an EOS such as <|im_end|>, which was added as a piece of the user.
    model.pieces[unk_id].type = UNKNOWN
    model.pieces[bos_id].type = model.pieces[eos_id].type = CONTROL
    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.vocab_size, spec.byte_fallback = len(model.pieces), True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = unk_id, bos_id, eos_id, -1
    spec.unk_piece, spec.bos_piece, spec.eos_piece = (model.pieces[i].piece for i in (unk_id, bos_id, eos_id))
    spec.split_digits = spec.allow_whitespace_only_pieces = True
    model.normalizer_spec.name = 'identity'
    model.normalizer_spec.add_dummy_prefix = add_space
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString(deterministic=True)


def with_added(content: bytes, added: Mapping[int, AddedToken], size: int) -> bytes:
    """A SentencePiece model with the added tokens whose ids follow its own, up to `size` pieces.

    Damaged content is returned as it is: `Tokenizer` reports it.
    """
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
    except DecodeError:
        return content
    first = len(model.pieces)
    while (i := len(model.pieces)) < size and i in added:
        model.pieces.add(piece=added[i].text, score=0.0, type=added[i].kind)
    if len(model.pieces) == first:
        return content
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString(deterministic=True)
