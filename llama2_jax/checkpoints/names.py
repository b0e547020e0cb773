"""One table of names: our parameters, and what Meta, Hugging Face and llama.cpp (GGUF) call them.

The three others store matrices as [out, in], the axes in the order of `letters`, with heads and head size as one axis. Their RoPE
differs in which numbers of a head it rotates together. Ours and Hugging Face's rotates halves, (j, j + K/2); Meta's and GGUF's
neighbours, (2j, 2j + 1). So the rows of a head of w_q and w_k change places on the way (recipe A.4).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.mesh import parameter_letters


class Entry(NamedTuple):
    """A parameter outside.

    Attributes:
      letters: its axes there; 1 is an axis of one.
      cut: the letter that Meta's model-parallel shards divide; '' where each holds a copy.
      meta: its name in Meta's files; {} is the layer; '' where the format has no such parameter. `hf` and `gguf` likewise.
      rotated: whether RoPE rotates it.
    """

    letters: str
    cut: str
    meta: str
    hf: str
    gguf: str
    rotated: bool = False


_META, _HF, _GGUF = 'layers.{}.', 'model.layers.{}.', 'blk.{}.'
OUTSIDE = {
    'table_VD': Entry('VD', 'D', 'tok_embeddings.weight', 'model.embed_tokens.weight', 'token_embd.weight'),
    'norm_D': Entry('D', '', 'norm.weight', 'model.norm.weight', 'output_norm.weight'),
}
HEADS = {
    'head_DV': Entry('VD', 'V', 'output.weight', 'lm_head.weight', 'output.weight'),
    'score_D': Entry('1D', '', '', 'score.weight', ''),  # reward models and value heads
}
BLOCK = {
    'attention_norm_D': Entry(
        'D', '', _META + 'attention_norm.weight', _HF + 'input_layernorm.weight', _GGUF + 'attn_norm.weight'
    ),
    'w_q_DHK': Entry(
        'HKD', 'H', _META + 'attention.wq.weight', _HF + 'self_attn.q_proj.weight', _GGUF + 'attn_q.weight', rotated=True
    ),
    'w_k_DGK': Entry(
        'GKD', 'G', _META + 'attention.wk.weight', _HF + 'self_attn.k_proj.weight', _GGUF + 'attn_k.weight', rotated=True
    ),
    'w_v_DGK': Entry('GKD', 'G', _META + 'attention.wv.weight', _HF + 'self_attn.v_proj.weight', _GGUF + 'attn_v.weight'),
    'w_o_DHK': Entry('DHK', 'H', _META + 'attention.wo.weight', _HF + 'self_attn.o_proj.weight', _GGUF + 'attn_output.weight'),
    'ffn_norm_D': Entry('D', '', _META + 'ffn_norm.weight', _HF + 'post_attention_layernorm.weight', _GGUF + 'ffn_norm.weight'),
    'w_gate_DF': Entry('FD', 'F', _META + 'feed_forward.w1.weight', _HF + 'mlp.gate_proj.weight', _GGUF + 'ffn_gate.weight'),
    'w_up_DF': Entry('FD', 'F', _META + 'feed_forward.w3.weight', _HF + 'mlp.up_proj.weight', _GGUF + 'ffn_up.weight'),
    'w_down_DF': Entry('DF', 'F', _META + 'feed_forward.w2.weight', _HF + 'mlp.down_proj.weight', _GGUF + 'ffn_down.weight'),
}
TABLE = OUTSIDE | HEADS | BLOCK
TILE = 480, 256  # of a matrix that is turned: what a core's own cache holds, and rows that are no power of two apart
PART = 2**23  # bytes of a parameter that a thread makes at a time
NEIGHBOURS = ('meta', 'gguf')  # the formats whose RoPE rotates neighbours

Key = tuple[str, int | None]  # our name, and the layer or None


def keys(config: ModelConfig, head: str) -> Iterator[Key]:
    """Every tensor of a model, in the order in which files are written; `head` is a name of HEADS."""
    yield 'table_VD', None
    for layer in range(config.layers):
        for name in BLOCK:
            yield name, layer
    yield 'norm_D', None
    yield head, None


def their_names(config: ModelConfig, head: str, form: str) -> dict[str, Key]:
    """Their name -> ours, for the format 'meta', 'hf' or 'gguf'.

    Raises:
      UserError: the format has no place for the head.
    """
    if not getattr(TABLE[head], form):
        raise UserError(f'The format {form} has no place for {head!r}: a reward model or value head is written as hf or orbax.')
    return {getattr(TABLE[name], form).format(layer): (name, layer) for name, layer in keys(config, head)}


def shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one layer's parameter, by its letters."""
    sizes = _sizes(config)
    return tuple(sizes[letter] for letter in parameter_letters(name))


def their_shape(name: str, config: ModelConfig, shards: int = 1) -> tuple[int, ...]:
    """The shape that the others store, or that one of Meta's shards holds."""
    entry, sizes = TABLE[name], _sizes(config)
    if entry.cut:
        sizes[entry.cut] //= shards
    sizes.update(H=sizes['H'] * sizes['K'], G=sizes['G'] * sizes['K'])
    return tuple(sizes[letter] for letter in entry.letters if letter != 'K')


def cut_axis(name: str) -> int | None:
    """The axis of `their_shape` that Meta's shards divide; None where each holds a copy."""
    entry = TABLE[name]
    return entry.letters.replace('K', '').index(entry.cut) if entry.cut else None


def to_theirs(name: str, array: np.ndarray, config: ModelConfig, form: str) -> np.ndarray:
    """One layer's parameter as they store it; C-contiguous.

    >>> to_theirs('w_q_DHK', np.arange(8).reshape(2, 1, 4), config, 'meta').tolist()  # K = 4: rows 0, 2, 1, 3
    [[0, 4], [2, 6], [1, 5], [3, 7]]
    """
    return as_stored(name, their_matrix(name, array, config), config, form)


def their_matrix(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A view of one layer's parameter with their axes; `as_stored` makes of it, or of a shard's part, what they store."""
    entry, ours = TABLE[name], parameter_letters(name)
    return array.transpose([ours.index(letter) for letter in entry.letters.strip('1')]).reshape(their_shape(name, config))


def as_stored(name: str, matrix: np.ndarray, config: ModelConfig, form: str) -> np.ndarray:
    """`their_matrix` or a part of it, with whole heads where RoPE rotates them, as they store it; C-contiguous."""
    rotated = TABLE[name].rotated and form in NEIGHBOURS
    return _turned(contiguous(matrix), (2, config.head_dim // 2)) if rotated else contiguous(matrix)


def from_theirs(name: str, matrix: np.ndarray, config: ModelConfig, form: str) -> np.ndarray:
    """The inverse of `to_theirs`; a view where that is possible."""
    entry, ours, sizes = TABLE[name], parameter_letters(name), _sizes(config)
    if entry.rotated and form in NEIGHBOURS:
        matrix = _turned(matrix, (config.head_dim // 2, 2))
    theirs = entry.letters.strip('1')
    array = matrix.reshape([sizes[letter] for letter in theirs])
    return array.transpose([theirs.index(letter) for letter in ours])


def _turned(matrix: np.ndarray, pairs: tuple[int, int]) -> np.ndarray:
    """The rows of each head in the other order."""
    heads = integers(matrix).reshape(-1, *pairs, matrix.shape[1])
    return heads.swapaxes(1, 2).reshape(matrix.shape).view(matrix.dtype)


def integers(array: np.ndarray) -> np.ndarray:
    """The same bits as whole numbers: only numpy's own types are copied fast and without the interpreter's lock."""
    return array.view(np.dtype(f'u{array.dtype.itemsize}'))


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order. By tiles: numpy by itself walks a transposed matrix against the cache, several times slower."""
    if array.flags.c_contiguous:
        return array
    source = integers(array.reshape(len(array), -1))
    out = np.empty_like(source, order='C')
    if source.strides[1] == source.itemsize:
        out[...] = source
        return out.view(array.dtype).reshape(array.shape)
    rows, columns = TILE
    for i, j in itertools.product(range(0, source.shape[0], rows), range(0, source.shape[1], columns)):
        tile = source[i : i + rows, j : j + columns]
        out[i : i + rows, j : j + columns] = np.ascontiguousarray(tile.T).T
    return out.view(array.dtype).reshape(array.shape)


def in_parts(array: np.ndarray, rows: int = 0) -> list[Callable[[], np.ndarray]]:
    """Calls that give the bytes of an array in C order, so many rows each; by default of about PART bytes."""
    rows = rows or max(PART * len(array) // max(array.nbytes, 1), 1)
    return [partial(as_bytes, array[start : start + rows]) for start in range(0, len(array), rows)]


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order."""
    return contiguous(array).reshape(-1).view(np.uint8)


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        'V': config.vocab_size,
        'D': config.dim,
        'H': config.heads,
        'G': config.kv_heads,
        'K': config.head_dim,
        'F': config.hidden,
        '1': 1,
    }
