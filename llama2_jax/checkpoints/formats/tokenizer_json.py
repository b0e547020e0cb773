"""tokenizer.json, Hugging Face's own form of a SentencePiece model, written and read.

transformers would make one too, and lose the order of merges. SentencePiece joins the neighbours whose joint piece has the
highest score; the `tokenizers` library joins by a list of pairs. So the list has every way to cut a piece in two pieces, pieces
of high score first.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from etils.epath import Path
from sentencepiece import sentencepiece_model_pb2

from llama2_jax.checkpoints.formats.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    Piece,
    kind_of,
    make_model,
)
from llama2_jax.config import UserError, shown
from llama2_jax.files import read_json
from llama2_jax.text.template import SPACES
from llama2_jax.text.tokenizer import MODEL_BYTES, Tokenizer

SPACE = '▁'
ADDED = (CONTROL, USER_DEFINED)
# What a normalizer or pre-tokenizer of SentencePiece consists of; another part would change the ids.
KNOWN_PARTS = (
    {'type': 'Prepend', 'prepend': SPACE},
    {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE},
    {'type': 'Metaspace', 'replacement': SPACE},
)


def spaces_of(content: Mapping[str, Any]) -> str:
    """Where a tokenizer.json puts leading spaces, one of `template.SPACES`."""
    parts = [part for name in ('normalizer', 'pre_tokenizer') for part in _parts(content.get(name))]
    if any(part.get('type') == 'Prepend' for part in parts):
        return 'prepend'
    schemes = [part.get('prepend_scheme', 'always') for part in parts if part.get('type') == 'Metaspace']
    return schemes[0] if schemes and schemes[0] in SPACES else 'never'


def _parts(content: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or those that a sequence has."""
    content = content if isinstance(content, dict) else {}
    inner = content.get('normalizers') or content.get('pretokenizers') or content.get('decoders')
    return [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else [content]


def make_tokenizer_json(content: bytes, spaces: str = 'prepend') -> dict[str, Any]:
    """The content of tokenizer.json for that of tokenizer.model; `spaces` is one of `template.SPACES`."""
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    tokenizer = Tokenizer.from_bytes(content)
    pieces = model.pieces
    normal = {piece.piece: (-piece.score, i) for i, piece in enumerate(pieces) if piece.type == piece.NORMAL}
    merges = [
        (*rank, cut, text[:cut], text[cut:])
        for text, rank in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    unknown, begin = pieces[tokenizer.unk_id].piece, pieces[tokenizer.bos_id].piece
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    special = {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id}
    added = {i: i in special or piece.type == CONTROL for i, piece in enumerate(pieces) if i in special or piece.type in ADDED}
    normalizers = [{'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}]
    strip, metaspace = [], None
    if model.normalizer_spec.add_dummy_prefix:
        if spaces == 'prepend':
            normalizers.insert(0, {'type': 'Prepend', 'prepend': SPACE})
        else:
            metaspace = {'type': 'Metaspace', 'replacement': SPACE, 'prepend_scheme': spaces, 'split': False}
        strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]
    template = {'SpecialToken': {'id': begin, 'type_id': 0}}
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [{'id': i, 'content': pieces[i].piece, **flags, 'special': special} for i, special in added.items()],
        'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
        'pre_tokenizer': metaspace,
        'post_processor': {
            'type': 'TemplateProcessing',
            'single': [template, {'Sequence': {'id': 'A', 'type_id': 0}}],
            'pair': [
                *(template, {'Sequence': {'id': 'A', 'type_id': 0}}),
                *({'SpecialToken': {'id': begin, 'type_id': 1}}, {'Sequence': {'id': 'B', 'type_id': 1}}),
            ],
            'special_tokens': {begin: {'id': begin, 'ids': [tokenizer.bos_id], 'tokens': [begin]}},
        },
        'decoder': {
            'type': 'Sequence',
            'decoders': [
                {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '},
                *({'type': 'ByteFallback'}, {'type': 'Fuse'}),
                *strip,
            ],
        },
        'model': {
            'type': 'BPE',
            'dropout': None,
            'unk_token': unknown,
            'continuing_subword_prefix': None,
            'end_of_word_suffix': None,
            'fuse_unk': True,
            'byte_fallback': True,
            'ignore_merges': False,
            'vocab': {piece.piece: i for i, piece in enumerate(pieces)},
            'merges': [[left, right] for *_, left, right in sorted(merges)],
        },
    }


def read_tokenizer_json(path: Path, added: Mapping[int, AddedToken], special: Mapping[str, str]) -> bytes:
    """The SentencePiece model that gives the ids of a tokenizer.json.

    Args:
      path: of the file.
      added: the added tokens that the model has, by id.
      special: texts of 'bos_token' and 'eos_token', where a file names them.

    Raises:
      UserError: the file is damaged, or its tokenizer is of another kind, such as the byte-level BPE of Llama 3.
    """
    content = read_json(path, limit=MODEL_BYTES)
    model = content.get('model')
    parts = [part for name in ('normalizer', 'pre_tokenizer') for part in _parts(content.get(name))]
    unknown = [part.get('type') for part in parts if part and not any(known.items() <= part.items() for known in KNOWN_PARTS)]
    model = model if isinstance(model, dict) else {}
    if model.get('type', 'BPE') != 'BPE' or not model.get('byte_fallback') or unknown:
        kind = 'a byte-level BPE, as of GPT-2 and Llama 3' if 'ByteLevel' in unknown else 'no BPE of SentencePiece'
        raise UserError(
            f"{path} is {kind}, and only SentencePiece's BPE with byte fallback, as of LLaMA 2, is read: "
            'use a model that was fine-tuned from LLaMA 2, or put its tokenizer.model (SentencePiece) beside this file.'
        )
    try:
        vocab = dict(model['vocab'])
        merges = [tuple(merge.split(' ')) if isinstance(merge, str) else (merge[0], merge[1]) for merge in model['merges']]
        scores = _scores(vocab, merges, any(part.get('type') == 'Metaspace' and part.get('split', True) for part in parts))
        texts = {i: text for text, i in vocab.items()} | {i: token.text for i, token in added.items()}
        if sorted(texts) != list(range(len(texts))) or len(set(texts.values())) < len(texts):
            raise ValueError('its ids are not 0, 1, 2, … of different texts')
        ids = {text: i for i, text in texts.items()}
        unk, bos, eos = model.get('unk_token') or '<unk>', special.get('bos_token', '<s>'), special.get('eos_token', '</s>')
        if missing := [text for text in (unk, bos, eos) if text not in ids]:
            raise ValueError(f'{shown(missing[0])} is not in its vocabulary')
        if sum(kind_of(text) == BYTE for text in vocab) != 256:
            raise ValueError('it does not have 256 pieces for the bytes')
        lowest = min(scores.values(), default=0.0) - 1

        def piece(i: int, text: str) -> Piece:
            if i in added:
                return Piece(text, 0.0, added[i].kind)
            made = len(text) == 1 or text in scores or kind_of(text) != NORMAL
            return Piece(text, scores.get(text, lowest), kind_of(text) if made else UNUSED)

        pieces = [piece(i, texts[i]) for i in range(len(texts))]
        return make_model(pieces, ids[unk], ids[bos], ids[eos], spaces_of(content) != 'never')
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        why = error if isinstance(error, ValueError) else 'a section is missing or of another form'
        raise UserError(f'{path} cannot be read as a SentencePiece tokenizer: {why}.') from None


def added_tokens_of(content: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens of a tokenizer.json, by id."""
    return {token['id']: AddedToken(token['content'], token.get('special')) for token in content.get('added_tokens') or ()}


def _scores(vocab: Mapping[str, int], merges: list[tuple[str, str]], within_words: bool) -> dict[str, float]:
    """The score of each piece that merges make: the later its merges come, the lower.

    Raises:
      ValueError: no scores give the same ids: merges of one piece lie apart, or a way to make a piece is not among them.
    """
    made = [left + right for left, right in merges]
    for runs_are_equal in (False, True):  # in LLaMA 2's own model all runs of spaces have one score
        names = [SPACE if runs_are_equal and not text.strip(SPACE) else text for text in made]
        blocks = [name for name, _ in itertools.groupby(names)]
        if len(blocks) == len(set(blocks)):
            break
    else:
        raise ValueError('its merges are not in the order of scores')
    order = {name: -float(rank) for rank, name in enumerate(blocks)}
    scores = {text: order[name] for text, name in zip(made, names, strict=True)}
    listed = set(merges)
    for text in scores:
        if text not in vocab or (within_words and SPACE in text[1:]):
            raise ValueError(f'{shown(text)} is not made as SentencePiece does')
        for cut in range(1, len(text)):
            parts = text[:cut], text[cut:]
            if parts not in listed and all(part in scores or (len(part) == 1 and part in vocab) for part in parts):
                raise ValueError(f'the merge of {shown(parts[0])} and {shown(parts[1])} is missing')
    return scores
