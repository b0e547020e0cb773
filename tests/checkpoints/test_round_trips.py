"""There and back again: bit for bit, between all formats, and with names and layouts that others use."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface import to_theirs as oracle
from small_models import GQA, MHA, random_model

from llama2_jax.checkpoints.convert import compare, convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.formats.meta import make_params
from llama2_jax.checkpoints.load import load_model, open_model
from llama2_jax.checkpoints.names import contiguous, from_theirs, keys, shape, their_names, their_shape, to_theirs
from llama2_jax.checkpoints.source import Source
from llama2_jax.config import MODELS, ModelConfig, hidden_size
from llama2_jax.mesh import MeshConfig, make_mesh

torch = pytest.importorskip('torch')
pytest.importorskip('gguf')


def same(a, b):
    """Whether two models of any formats hold the same bits under the same names."""
    a, b = open_model(a), open_model(b)
    assert (a.dtype, a.head) == (b.dtype, b.head)
    for key in keys(a.config, a.head):
        x, y = (side.read(*key).astype(a.dtype) for side in (a, b))
        assert x.shape == y.shape, key
        bits = [contiguous(array).view(f'u{array.dtype.itemsize}') for array in (x, y)]
        assert np.array_equal(*bits), key
    return True


def test_permutation_of_rope_by_hand():
    config = ModelConfig(vocab_size=8, dim=2, layers=1, heads=1, kv_heads=1, head_dim=4, hidden=4)
    w_q_DHK = np.arange(8).reshape(2, 1, 4)
    assert to_theirs('w_q_DHK', w_q_DHK, config, 'hf').tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    for form in ('meta', 'gguf'):
        assert to_theirs('w_q_DHK', w_q_DHK, config, form).tolist() == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert to_theirs('w_v_DGK', w_q_DHK, config, 'meta').tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize('config', [MHA, GQA], ids=['MHA', 'GQA'])
def test_permutation_of_rope_is_that_of_the_published_converter(config):
    """Recipe A.4: Meta's w becomes Hugging Face's by view(heads, K/2, 2, D).transpose(1, 2)."""
    rng = np.random.default_rng(0)
    for name, heads in (('w_q_DHK', config.heads), ('w_k_DGK', config.kv_heads)):
        array = rng.normal(size=shape(name, config))
        meta, hf = (to_theirs(name, array, config, form) for form in ('meta', 'hf'))
        view = torch.tensor(meta).view(heads, config.head_dim // 2, 2, config.dim)
        assert np.array_equal(view.transpose(1, 2).reshape(hf.shape), hf)
        assert np.array_equal(from_theirs(name, meta, config, 'meta'), array)


def test_names_are_those_of_transformers_and_llama_cpp():
    transformers, gguf = pytest.importorskip('transformers'), pytest.importorskip('gguf')
    config = transformers.LlamaConfig(
        vocab_size=296,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        head_dim=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_labels=1,
    )
    for kind, head in (('LlamaForCausalLM', 'head_DV'), ('LlamaForSequenceClassification', 'score_D')):
        with torch.device('meta'):
            theirs = getattr(transformers, kind)(config).state_dict()
        ours = {name: their_shape(key[0], GQA) for name, key in their_names(GQA, head, 'hf').items()}
        assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    mapped = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, GQA.layers)
    for name, key in their_names(GQA, 'head_DV', 'hf').items():
        assert their_names(GQA, 'head_DV', 'gguf')[mapped.get_name(name, try_suffixes=('.weight',))] == key


def test_values_are_where_the_parity_tests_put_them():
    """`tests/huggingface.py` transposes by itself; its logits and gradients are those of transformers."""
    model = random_model(GQA)
    theirs = oracle(model)
    for name, (ours, layer) in their_names(GQA, 'head_DV', 'hf').items():
        array = getattr(model if layer is None else model.blocks, ours)[...]
        array = np.asarray(array if layer is None else array[layer])
        assert np.array_equal(to_theirs(ours, array, GQA, 'hf'), theirs[name]), name


@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_contiguous(dtype):
    array = np.random.default_rng(0).normal(size=(37, 5, 53)).astype(dtype)
    for axes in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)):
        view = array.transpose(axes)
        assert contiguous(view).flags.c_contiguous and np.array_equal(contiguous(view), view)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('config', [MHA, GQA], ids=['MHA', 'GQA'])
def test_all_directions(config, dtype, model_directory, tmp_path):
    start = model_directory(config, dtype)
    where = {'orbax': start}
    routes = [('orbax', 'hf', 1), ('orbax', 'gguf', 1), *(('orbax', 'meta', shards) for shards in (1, 2, 4, 8))]
    routes += [
        ('hf', 'meta', 2),
        ('meta', 'hf', 1),
        ('meta', 'orbax', 1),
        ('hf', 'orbax', 1),
        ('gguf', 'orbax', 1),
        ('gguf', 'hf', 1),
    ]
    for i, (begin, end, shards) in enumerate(routes):
        output = tmp_path / f'{i}-{end}{".gguf" if end == "gguf" else ""}'
        convert(open_model(where[begin]), output, end, shards=shards)
        assert same(output, start), (begin, end, shards)
        assert open_model(output).form == end
        where[end] = output
    back = open_model(where['orbax']).config
    assert dataclasses.replace(back, context=64) == config


@pytest.mark.parametrize('shape', MODELS)
def test_params_json_makes_the_same_widths(shape):
    config = MODELS[shape]
    params = make_params(config)
    assert hidden_size(config.dim, params['multiple_of'], params.get('ffn_dim_multiplier')) == config.hidden
    expected = {'7b': (256, None), '13b': (256, None), '34b': (256, None), '70b': (4096, 1.3)}
    if shape in expected:
        assert (params['multiple_of'], params.get('ffn_dim_multiplier')) == expected[shape]
    for hidden in range(1, 4000, 7):
        params = make_params(dataclasses.replace(config, hidden=hidden))
        assert hidden_size(config.dim, params['multiple_of'], params.get('ffn_dim_multiplier')) == hidden


def test_q8_0_rounds_by_half_a_step_at_most(model_directory, tmp_path):
    convert(open_model(model_directory()), tmp_path / 'q.gguf', 'gguf', 'q8_0')
    ours, theirs = open_model(tmp_path / 'q.gguf'), open_model(model_directory())
    for name, layer in keys(GQA, 'head_DV'):
        a, b = (to_theirs(name, side.read(name, layer), GQA, 'gguf') for side in (ours, theirs))
        if a.ndim == 1:
            assert np.array_equal(a, b)
            continue
        blocks = np.abs(b).reshape(-1, 32)
        step = blocks.max(1, keepdims=True) / 127
        assert (np.abs(a - b).reshape(-1, 32) <= 0.5 * step + 2e-3 * blocks.max()).all()  # the step itself is a float16
        assert not np.array_equal(a, b)


@pytest.mark.parametrize('kind', ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'])
def test_quantised_types_are_read(kind, model_directory, tmp_path):
    """A file whose matrices are quantised by the gguf library is read as that library dequantises it."""
    import gguf

    convert(open_model(model_directory()), tmp_path / 'f.gguf', 'gguf')
    reader = gguf.GGUFReader(tmp_path / 'f.gguf')
    writer = gguf.GGUFWriter(tmp_path / 'q.gguf', 'llama')
    for name, field in reader.fields.items():
        if name.startswith(('llama.', 'tokenizer.')):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    expected = {}
    quantised = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        if tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        data = gguf.quants.quantize(np.array(tensor.data), quantised)
        expected[tensor.name] = gguf.quants.dequantize(data, quantised)
        writer.add_tensor(tensor.name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_model(tmp_path / 'q.gguf')
    for name, key in their_names(GQA, 'head_DV', 'gguf').items():
        if name in expected:
            assert np.array_equal(to_theirs(key[0], source.read(*key), GQA, 'gguf'), expected[name])


def test_tied_embeddings_are_copied(model_directory, tmp_path):
    convert(open_model(model_directory()), tmp_path / 'hf', 'hf')
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / 'hf/model.safetensors')
    del tensors['lm_head.weight']
    save_file(tensors, tmp_path / 'hf/model.safetensors')
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    (tmp_path / 'hf/config.json').write_text(json.dumps(config | {'tie_word_embeddings': True}))
    source = open_model(tmp_path / 'hf')
    assert np.array_equal(source.read('head_DV', None), source.read('table_VD', None).T)


def test_pytorch_bins_with_index_and_strided_tensors(model_directory, tmp_path):
    """pytorch_model-*.bin: two files, one tensor stored transposed, two in one storage, and buffers of old versions."""
    start = model_directory(dtype='float16')
    convert(open_model(start), tmp_path / 'hf', 'hf')
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / 'hf/model.safetensors')
    name = 'model.layers.1.mlp.up_proj.weight'
    tensors[name] = tensors[name].t().contiguous().t()
    both = torch.stack([tensors['model.layers.0.input_layernorm.weight'], tensors['model.layers.1.input_layernorm.weight']])
    tensors |= {f'model.layers.{i}.input_layernorm.weight': both[i] for i in range(2)}
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(2)
    names = sorted(tensors)
    files = {name: f'pytorch_model-0000{1 + (i % 2)}-of-00002.bin' for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, tmp_path / 'hf' / file)
    (tmp_path / 'hf/pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': files}))
    (tmp_path / 'hf/model.safetensors').unlink()
    assert same(tmp_path / 'hf', start)


def test_large_models_are_sharded_with_an_index(model_directory, tmp_path, monkeypatch):
    start = model_directory()
    monkeypatch.setattr('llama2_jax.checkpoints.formats.huggingface.SHARD_BYTES', 200_000)
    convert(open_model(start), tmp_path / 'hf', 'hf')
    index = json.loads((tmp_path / 'hf/model.safetensors.index.json').read_text())
    files = sorted(path.name for path in (tmp_path / 'hf').glob('*.safetensors'))
    assert files == sorted(set(index['weight_map'].values())) == [f'model-{i + 1:05d}-of-00003.safetensors' for i in range(3)]
    assert index['metadata']['total_size'] == 4 * GQA.parameters
    assert same(tmp_path / 'hf', start)


@pytest.mark.parametrize('mesh', [MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(replica=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize('form', ['orbax', 'hf', 'meta', 'gguf'])
def test_any_format_loads_onto_any_mesh(form, mesh, model_directory, tmp_path):
    """Also what was written a tensor at a time is restored by Orbax, and cast on the way."""
    start = model_directory()
    expected = random_model(GQA)
    output = tmp_path / ('model.gguf' if form == 'gguf' else 'converted')
    convert(open_model(start), output, form)
    with jax.set_mesh(make_mesh(mesh)):
        for dtype in (None, 'bfloat16'):
            model, tokenizer = load_model(output, dtype)
            assert tokenizer.vocab_size == 296
            for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(model), strict=True):
                assert theirs.dtype == (dtype or 'float32')
                assert np.array_equal(np.asarray(ours.astype(theirs.dtype)), jax.device_get(theirs))
            w_gate = model.blocks.w_gate_DF
            assert w_gate.sharding.shard_shape(w_gate.shape) == (3, 64 // mesh.fsdp, 96 // mesh.tensor)


def test_tokenizer_of_a_gguf_file_gives_the_same_ids(llama2, tmp_path):
    from llama2_jax.text.tokenizer import Tokenizer

    config = dataclasses.replace(GQA, vocab_size=32_000, layers=1)
    save_model(tmp_path / 'model', random_model(config, 'float16'), llama2, {})
    convert(open_model(tmp_path / 'model'), tmp_path / 'model.gguf', 'gguf')
    read = Tokenizer.from_bytes(open_model(tmp_path / 'model.gguf').tokenizer())
    for text in ('Hello world', '12345', 'a\n\nb', '  two leading', 'naïve café', '🙂', '[INST] Hi [/INST]', ' ' * 20 + 'x'):
        assert read.encode(text, bos=True, eos=True) == llama2.encode(text, bos=True, eos=True)
    assert read.decode(read.encode('naïve  café 🙂', bos=True, eos=True)) == 'naïve  café 🙂'


def test_stories260k(fixtures, tmp_path):
    """Both published forms give the same parameters."""
    stories = fixtures / 'stories260K'
    for form in ('hf', 'meta'):
        convert(open_model(stories / form), tmp_path / form, 'orbax')
    assert same(tmp_path / 'hf', tmp_path / 'meta')
    result = compare(open_model(tmp_path / 'hf'), open_model(stories / 'meta'))
    assert (result.differences, result.logits) == ({}, 0.0)


MEMORY = """
import resource, sys
from llama2_jax.checkpoints.load import open_model
from llama2_jax.checkpoints.convert import convert
convert(open_model(sys.argv[1]), sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def random_source(config, tokenizer, dtype='float32'):
    """A source that makes its numbers when asked."""

    def read(name, layer):
        seed = hash((name, layer)) % 2**32
        size = np.dtype(dtype).itemsize
        bits = np.random.default_rng(seed).integers(0, 256**size, shape(name, config), f'u{size}')
        return bits.view(dtype)

    return Source(Path('nowhere'), 'random', config, np.dtype(dtype), 'head_DV', read, lambda: tokenizer.model, {})


@pytest.mark.slow
@pytest.mark.parametrize('route', [('hf', 'orbax'), ('orbax', 'hf'), ('hf', 'meta'), ('meta', 'gguf')], ids='-'.join)
def test_memory_does_not_grow_with_the_layers(route, tokenizer, tmp_path):
    peaks = []
    for layers in (4, 16):  # a sixteenth of 7B's layer: 50 MB of float32
        config = ModelConfig(vocab_size=296, dim=1024, layers=layers, heads=8, kv_heads=8, hidden=2752)
        start, end = tmp_path / f'{layers}-start', tmp_path / (f'{layers}-end' + ('.gguf' if route[1] == 'gguf' else ''))
        convert(random_source(config, tokenizer), start, route[0])
        command = [sys.executable, '-c', MEMORY, start, end, route[1]]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < peaks[0] + 100_000  # KiB: two layers; twelve more layers have 600 MB


@pytest.mark.slow
@pytest.mark.parametrize('size', ['7b', '13b', '34b', '70b'])
def test_real_layer_shapes(size, tokenizer, tmp_path):
    """One layer as wide as the real one, with a small vocabulary, through all formats and back."""
    config = dataclasses.replace(MODELS[size], layers=1, vocab_size=296)
    convert(random_source(config, tokenizer, 'float16'), tmp_path / 'orbax', 'orbax')
    shards = {'7b': 1, '13b': 2, '34b': 4, '70b': 8}[size]
    convert(open_model(tmp_path / 'orbax'), tmp_path / 'meta', 'meta', shards=shards)
    convert(open_model(tmp_path / 'meta'), tmp_path / 'hf', 'hf')
    assert same(tmp_path / 'hf', tmp_path / 'orbax')
    assert open_model(tmp_path / 'meta').config == open_model(tmp_path / 'orbax').config
