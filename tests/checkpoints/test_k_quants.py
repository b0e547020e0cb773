"""The quantised types of llama.cpp's models, read against its own decoding, written out here number by number."""

import dataclasses

import numpy as np
import pytest
from small_models import MHA, random_model

from llama2_jax.checkpoints import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.formats import llamacpp
from llama2_jax.checkpoints.load import open_model
from llama2_jax.checkpoints.names import their_names, to_theirs

gguf = pytest.importorskip('gguf')
ROWS = dataclasses.replace(MHA, dim=256, layers=1, heads=4, kv_heads=4, head_dim=64, hidden=256)  # blocks are 256 numbers


def q4_k(block):
    """dequantize_row_q4_K of ggml-quants.c."""
    d, least = (float(x) for x in block[:4].view(np.float16))
    q, nibbles, out = [int(x) for x in block[4:16]], block[16:], []
    for j in range(8):
        low = j < 4
        scale = q[j] & 63 if low else q[j + 4] & 15 | q[j - 4] >> 6 << 4
        minimum = q[j + 4] & 63 if low else q[j + 4] >> 4 | q[j] >> 6 << 4
        part = nibbles[j // 2 * 32 :][:32]
        out += [d * scale * int(x >> 4 if j % 2 else x & 15) - least * minimum for x in part]
    return out


def q6_k(block):
    """dequantize_row_q6_K of ggml-quants.c."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), float(block[208:].view(np.float16)[0])
    out = []
    for half in range(2):
        ql, qh = low[half * 64 :], high[half * 32 :]
        for k in range(4):
            for i in range(32):
                nibble = ql[i + 32 * (k % 2)]
                value = int(nibble >> 4 if k > 1 else nibble & 15) | (int(qh[i]) >> 2 * k & 3) << 4
                out.append(d * int(scales[half * 8 + 2 * k + i // 16]) * (value - 32))
    return out


@pytest.mark.parametrize(('kind', 'decode', 'floats'), [('Q4_K', q4_k, (0, 2)), ('Q6_K', q6_k, (208,))])
def test_k_quants(kind, decode, floats, tokenizer, tmp_path, monkeypatch):
    written, rng = [], np.random.default_rng(0)

    def random_blocks(matrix, _):
        raw = rng.integers(0, 256, (*matrix.shape[:-1], matrix.shape[-1] // 256, SIZES[kind]), np.uint8)
        for place in floats:  # a scale that is a sensible number
            raw[..., place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
        written.append(raw)
        return raw.reshape(len(matrix), -1)

    for module in (llamacpp, convert):
        monkeypatch.setattr(module, 'QUANTISED', kind.lower())
    monkeypatch.setattr(convert, 'READERS', 1)  # so that they come in order
    monkeypatch.setattr(gguf, 'LlamaFileType', {f'MOSTLY_{kind}': 0})
    monkeypatch.setattr(gguf.quants, 'quantize', random_blocks)
    save_model(tmp_path / 'model', random_model(ROWS), tokenizer, {})
    convert.convert(open_model(tmp_path / 'model'), tmp_path / 'm.gguf', 'gguf', kind.lower())
    source = open_model(tmp_path / 'm.gguf')
    assert source.dtype == np.float32
    matrices = [key for key in their_names(ROWS, 'head_DV', 'gguf').values() if not key[0].endswith('norm_D')]
    for (name, layer), raw in zip(matrices, written, strict=True):
        theirs = to_theirs(name, source.read(name, layer), ROWS, 'gguf')
        for row in (0, len(theirs) - 1):
            np.testing.assert_allclose(theirs[row], decode(raw[row, 0]), rtol=1e-5, atol=1e-6, err_msg=name)


SIZES = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1] for name in ('Q4_K', 'Q6_K')}
