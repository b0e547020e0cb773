"""GGUF files of other programs: variants that llama.cpp reads are read, and damaged ones refused by a sentence, at once."""

import struct

import numpy as np
import pytest
from small_models import MHA

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.formats.gguf_header import read_header
from llama2_jax.checkpoints.load import load_model, open_model
from llama2_jax.config import UserError

gguf = pytest.importorskip('gguf')


@pytest.fixture
def model(model_directory, tmp_path):
    convert(open_model(model_directory(MHA)), tmp_path / 'm.gguf', 'gguf')
    return tmp_path / 'm.gguf'


def rewrite(source, path, drop=(), names=None, endian=gguf.GGUFEndian.LITTLE, **changes):
    """The file again by the library of llama.cpp, with some fields changed."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, 'llama', endianess=endian)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith(('GGUF.', 'general.architecture'))}
    for name, field in fields.items():
        if name in drop:
            continue
        kind, *item = field.types
        writer.add_key_value(name, changes.pop(name, field.contents()), kind, item[0] if item else None)
    for name, value in changes.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32)
    for tensor in reader.tensors:
        if names is None or tensor.name in names:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_header_is_that_of_the_library(model):
    fields, tensors = read_header(model)
    reader = gguf.GGUFReader(model)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
    assert fields == theirs and len(fields) > 20
    assert {name: (*tensor.shape, tensor.offset) for name, tensor in tensors.items()} == {
        tensor.name: (*reversed(tensor.shape.tolist()), tensor.data_offset) for tensor in reader.tensors
    }


def test_a_name_without_suffix_is_enough(model):
    blob = model.rename(model.with_name('sha256-6a0746a1ec1a'))
    assert open_model(blob).config == MHA


def test_big_endian_is_refused(model, tmp_path):
    rewrite(model, tmp_path / 'big.gguf', endian=gguf.GGUFEndian.BIG)
    with pytest.raises(UserError, match='big.gguf is of a big-endian machine.*gguf-convert-endian'):
        open_model(tmp_path / 'big.gguf')


@pytest.mark.parametrize('drop', ['scores', 'token_type'])
def test_a_tokenizer_without_scores_or_types(drop, model, tmp_path):
    rewrite(model, tmp_path / 'x.gguf', drop=[f'tokenizer.ggml.{drop}'])
    _, tokenizer = load_model(tmp_path / 'x.gguf')
    assert (tokenizer.vocab_size, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (296, 0, 1, 2)
    if drop == 'token_type':
        assert tokenizer.encode('some words', True, True) == load_model(model)[1].encode('some words', True, True)


def test_an_eos_that_was_added_by_the_user(model, tmp_path):
    types = read_header(model)[0]['tokenizer.ggml.token_type']
    types[290] = 4  # USER_DEFINED
    rewrite(model, tmp_path / 'x.gguf', **{'tokenizer.ggml.token_type': types, 'tokenizer.ggml.eos_token_id': 290})
    assert load_model(tmp_path / 'x.gguf')[1].eos_id == 290


def test_the_end_of_a_turn_stops_too(model, tmp_path):
    rewrite(model, tmp_path / 'x.gguf', **{'tokenizer.ggml.eot_token_id': 280})
    assert load_model(tmp_path / 'x.gguf')[1].stop_ids == (2, 280)
    convert(open_model(tmp_path / 'x.gguf'), tmp_path / 'y.gguf', 'gguf')
    assert open_model(tmp_path / 'y.gguf').stop_ids == (2, 280)


def test_parts_are_read_together(model, tmp_path):
    names = list(read_header(model)[1])
    for number in range(3):
        split = {'split.no': number, 'split.count': 3}
        rewrite(model, tmp_path / f's-{number + 1:05d}-of-00003.gguf', names=names[number::3], **split)
    whole, parts = open_model(model), open_model(tmp_path / 's-00001-of-00003.gguf')
    for key in (('w_q_DHK', 2), ('norm_D', None), ('head_DV', None)):
        assert np.array_equal(whole.read(*key), parts.read(*key))
    with pytest.raises(UserError, match='is part 2 of 3: give the first part'):
        open_model(tmp_path / 's-00002-of-00003.gguf')
    (tmp_path / 's-00003-of-00003.gguf').unlink()
    with pytest.raises(UserError, match='s-00003-of-00003.gguf is missing'):
        open_model(tmp_path / 's-00001-of-00003.gguf')


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('llama.attention.head_count', 0),
        ('llama.block_count', 10**9),
        ('llama.embedding_length', 10**9),
        ('tokenizer.ggml.eos_token_id', 10**6),
        ('split.count', 'three'),
        ('general.alignment', 3),
    ],
)
def test_fields_that_are_refused(name, value, model, tmp_path):
    rewrite(model, tmp_path / 'x.gguf', drop=[name], **{name: value})
    with pytest.raises(UserError, match=f'x.gguf.*{name}'):
        load_model(tmp_path / 'x.gguf')


def header(*fields, tensors=0):
    text = b''.join(struct.pack('<Q', len(name)) + name + rest for name, rest in fields)
    return b'GGUF' + struct.pack('<IQQ', 3, tensors, len(fields)) + text


ARRAY = struct.pack('<I', 9)


@pytest.mark.parametrize(
    'content',
    [
        header((b'a', ARRAY + struct.pack('<IQ', 0, 2**62))),
        header((b'a', ARRAY + struct.pack('<IQ', 8, 2**62))),
        header((b'a', ARRAY + struct.pack('<IQ', 9, 1) * 100_000)),
        header((b'a', struct.pack('<IQ', 8, 2**62))),
        header((b'a', struct.pack('<I', 77))),
        header((b'\xff\xfe', struct.pack('<IB', 0, 1))),
        header((b'a', struct.pack('<IB', 0, 1)), (b'a', struct.pack('<IB', 0, 1))),
        header(tensors=2**62),
        header(tensors=1) + struct.pack('<Q', 1) + b't' + struct.pack('<IIQ', 0, 0, 0),
        header(tensors=1) + struct.pack('<Q', 1) + b't' + struct.pack('<IQQQQIQ', 4, 2**40, 2**40, 2**40, 2**40, 0, 0),
        header(tensors=1) + struct.pack('<Q', 17) + b'token_embd.weight' + struct.pack('<IQQIQ', 2, 64, 10**9, 0, 0),
        header(tensors=1) + struct.pack('<Q', 17) + b'token_embd.weight' + struct.pack('<IQQIQ', 2, 64, 4, 99, 0),
        b'GGUF',
        b'GGUF' + struct.pack('<IQQ', 1, 0, 0),
    ],
)
def test_hostile_headers_are_refused(content, tmp_path):
    (tmp_path / 'x.gguf').write_bytes(content)
    with pytest.raises(UserError, match='x.gguf'):
        open_model(tmp_path / 'x.gguf')
