"""tokenizer.json, Hugging Face's own form of a SentencePiece model: transformers would make one, and lose the order of merges.

SentencePiece joins the neighbours whose joint piece has the highest score; the `tokenizers` library joins by a list of pairs. So
the list has every way to cut a piece in two pieces, pieces of high score first.
"""

from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llama2_jax.text.template import SPACES
from llama2_jax.text.tokenizer import Tokenizer

SPACE = '▁'


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
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    special = sorted({tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id})
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
        'added_tokens': [{'id': i, 'content': pieces[i].piece, **flags} for i in special],
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
