"""Models of other people: what transformers loads has the same numbers here, and what would be silently wrong is refused."""

import dataclasses
import fractions
import json
import os
import struct
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import MHA, random_model

from llama2_jax.checkpoints.convert import _stream, convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.formats.huggingface import write_huggingface
from llama2_jax.checkpoints.formats.meta import write_meta
from llama2_jax.checkpoints.formats.peft import with_adapter, write_peft
from llama2_jax.checkpoints.load import load_model, open_model
from llama2_jax.checkpoints.verify import against_transformers
from llama2_jax.config import UserError
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.model.lora import LoraConfig, make_adapters, merge

HEAD, TABLE = 'lm_head.weight', 'model.embed_tokens.weight'


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_archives_that_are_no_list_of_tensors(orbax, tmp_path):
    torch = pytest.importorskip('torch')
    convert(open_model(orbax), tmp_path / 'meta', 'meta')
    file = tmp_path / 'meta/consolidated.00.pth'
    write_zip(file, {'archive/data.pkl': b'', 'archive/data/0': bytes(3_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match='consolidated.00.pth is compressed'):
        open_model(tmp_path / 'meta')
    torch.save({'norm.weight': fractions.Fraction}, file)
    with pytest.raises(UserError, match='consolidated.00.pth holds fractions.Fraction'):
        open_model(tmp_path / 'meta')
    for content in ([1], {1: torch.zeros(1)}, {'norm.weight': 'text'}, {'norm.weight': torch.zeros(2, dtype=torch.int8)}):
        torch.save(content, file)
        with pytest.raises(UserError, match='consolidated.00.pth'):
            open_model(tmp_path / 'meta')
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match='consolidated.00.pth is damaged'):
        open_model(tmp_path / 'meta')


@pytest.fixture
def hf(model_directory, tmp_path):
    convert(open_model(model_directory(MHA)), tmp_path / 'hf', 'hf')
    return tmp_path / 'hf'


@pytest.fixture
def orbax(model_directory):
    return model_directory(MHA)


def change(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in (content | values).items() if value != 'gone'}))


def write_index(hf, shards):
    """The tensors of {file: {name: array}}, and their index."""
    for file, tensors in shards.items():
        save_file(tensors, hf / file, {'format': 'pt'})
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (hf / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))


@pytest.mark.parametrize('shards_are_there', [True, False])
def test_one_file_goes_before_an_index(shards_are_there, hf):
    pytest.importorskip('transformers')
    tensors = load_file(hf / 'model.safetensors')
    write_index(hf, {'model-00001-of-00001.safetensors': {name: array + 1 for name, array in tensors.items()}})
    if not shards_are_there:
        (hf / 'model-00001-of-00001.safetensors').unlink()
    assert np.array_equal(open_model(hf).read('norm_D', None), tensors['model.norm.weight'])
    assert against_transformers(open_model(hf), hf) < 1e-4


def test_one_file_of_pytorch_goes_before_its_index(hf):
    torch = pytest.importorskip('torch')
    tensors = {name: torch.tensor(array) for name, array in load_file(hf / 'model.safetensors').items()}
    (hf / 'model.safetensors').unlink()
    torch.save(tensors, hf / 'pytorch_model.bin')
    torch.save({name: array + 1 for name, array in tensors.items()}, hf / 'old.bin')
    (hf / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': dict.fromkeys(tensors, 'old.bin')}))
    assert np.array_equal(open_model(hf).read('norm_D', None), tensors['model.norm.weight'])


@pytest.mark.parametrize('head', ['differs', 'equal', 'missing'])
def test_a_tied_head_that_differs_is_kept(head, hf):
    pytest.importorskip('transformers')
    tensors = load_file(hf / 'model.safetensors')
    if head == 'equal':
        tensors[HEAD] = tensors[TABLE]
    if head == 'missing':
        del tensors[HEAD]
    save_file(tensors, hf / 'model.safetensors', {'format': 'pt'})
    change(hf / 'config.json', tie_word_embeddings=True)
    read = open_model(hf).read('head_DV', None)
    assert np.array_equal(read, (tensors[HEAD] if head == 'differs' else tensors[TABLE]).T)
    assert against_transformers(open_model(hf), hf) < 1e-4


@pytest.mark.parametrize('file', ['config.json', 'generation_config.json'])
def test_each_of_several_eos_ids_stops(file, hf, tmp_path):
    (hf / 'generation_config.json').unlink()
    change(hf / 'config.json', eos_token_id='gone')
    change(hf / file, eos_token_id=[2, 7])
    convert(open_model(hf), tmp_path / 'ours', 'orbax')
    assert json.loads((tmp_path / 'ours/config.json').read_text())['stop_ids'] == [2, 7]
    convert(open_model(tmp_path / 'ours'), tmp_path / 'again', 'hf')
    for name in ('config.json', 'generation_config.json'):
        assert json.loads((tmp_path / 'again' / name).read_text())['eos_token_id'] == [2, 7]
    model, tokenizer = load_model(tmp_path / 'ours')
    # A head that gives id 7 after every token.
    model.norm_D[...] = jnp.ones_like(model.norm_D[...])
    model.head_DV[...] = jnp.zeros_like(model.head_DV[...]).at[:, 7].set(1.0)
    [samples] = Engine(model, tokenizer).generate([Request(token_ids=(1, 20), temperature=0.0, max_new_tokens=5)])
    greedy = samples[0]
    other = [i for i in greedy.token_ids if i != 7]
    assert other or (greedy.token_ids, greedy.stop_reason) == ([7], 'eos')


@pytest.mark.parametrize('value', ['2', [2, 296], [True], {'a': 1}, 1.5, list(range(20))])
def test_eos_ids_that_are_none(value, hf):
    change(hf / 'generation_config.json', eos_token_id=value)
    with pytest.raises(UserError, match='generation_config.json: eos_token_id'):
        open_model(hf)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *(
            (name, value)
            for name in ('rms_norm_eps', 'rope_theta')
            for value in (float('nan'), float('inf'), -1.0, True, '1e-05')
        ),
        ('tie_word_embeddings', 'no'),
        ('rope_scaling', [1]),
        ('rope_scaling', 'linear'),
        ('architectures', [['a']]),
        ('num_hidden_layers', 10**9),
        ('hidden_size', 10**9),
        ('max_position_embeddings', 10**18),
        ('num_attention_heads', 0),
        ('vocab_size', 296.0),
        ('sliding_window', 4096),
        ('hidden_act', ['silu']),
    ],
)
def test_values_of_config_that_are_refused(name, value, hf):
    change(hf / 'config.json', **{name: value})
    with pytest.raises(UserError, match=rf'config.json: .?{name}'):
        open_model(hf)


@pytest.mark.parametrize(
    'values',
    [
        {'unsloth_version': '2025.1', 'unsloth_fixed': True, '_attn_implementation_autoset': True, '_flash_attn_2_enabled': True},
        {'use_flash_attention': True, 'tokenizer_class': 'LlamaTokenizer', 'model_max_length': 4096, 'unk_token_id': 0},
        {'gradient_checkpointing': True, 'is_llama_config': True, 'transformers.js_config': {'dtype': 'q4'}, 'num_beams': 1},
        {'top_k': 50, 'repetition_penalty': 1.1, 'length_penalty': 1.0, 'num_return_sequences': 1, 'max_new_tokens': 9},
        {'rope_scaling': {'type': 'linear', 'factor': 1.0}},
        {'architectures': 'LlamaForCausalLM'},
        {'architectures': ['LLaMAForCausalLM']},
        {'hidden_act': 'swish'},
    ],
    ids=lambda values: next(iter(values)),
)
def test_attributes_that_change_nothing_are_passed_over(values, hf):
    before = open_model(hf).config
    change(hf / 'config.json', **values)
    assert open_model(hf).config == before


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('n_heads', 0),
        ('multiple_of', 0),
        ('ffn_dim_multiplier', float('nan')),
        ('norm_eps', float('inf')),
        ('rope_theta', float('nan')),
        ('n_layers', 10**9),
        ('dim', '64'),
        ('vocab_size', True),
    ],
)
def test_values_of_params_that_are_refused(name, value, orbax, tmp_path):
    convert(open_model(orbax), tmp_path / 'meta', 'meta')
    change(tmp_path / 'meta/params.json', **{name: value})
    with pytest.raises(UserError, match=f'params.json: .*{name}'):
        open_model(tmp_path / 'meta')


def test_the_layout_that_meta_publishes(orbax, tmp_path):
    """The tokenizer is beside the directories of the models; there are fields of Meta's ModelArgs, too."""
    convert(open_model(orbax), tmp_path / 'meta', 'meta')
    (tmp_path / 'meta/tokenizer.model').rename(tmp_path / 'tokenizer.model')
    change(tmp_path / 'meta/params.json', max_seq_len=2048, use_scaled_rope=False)
    (tmp_path / 'meta/consolidated.00.merged.pth').write_bytes(b'of another program')
    model, tokenizer = load_model(tmp_path / 'meta')
    assert (model.config, tokenizer.vocab_size) == (dataclasses.replace(MHA, context=2048), 296)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'model': []}, "config.json: 'model' is .*, not an object"),
        ({'model': dataclasses.asdict(MHA), 'provenance': [1]}, "config.json: 'provenance' is .*, not an object"),
        ({'model': dataclasses.asdict(MHA) | {'norm_eps': float('nan')}}, "config.json: field 'norm_eps' is nan"),
        ({'model': dataclasses.asdict(MHA) | {'layers': 10**9}}, "config.json: field 'layers' is 1000000000"),
        ({'model': dataclasses.asdict(MHA), 'stop_ids': [-7]}, 'config.json: stop_ids'),
    ],
)
def test_values_of_our_config_that_are_refused(content, message, orbax):
    (orbax / 'config.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_model(orbax)


def rewrite_header(file, edit, tail=b''):
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], 'little')
    header = json.loads(whole[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, 'little') + text + whole[8 + length :] + tail)


def overlap(header):
    header[HEAD]['data_offsets'] = header[TABLE]['data_offsets']


@pytest.mark.parametrize(
    ('edit', 'tail'),
    [
        (overlap, b''),
        (lambda header: None, bytes(8)),
        (lambda header: header.pop('model.norm.weight'), b''),  # a hole
        (lambda header: header[HEAD].update(data_offsets=[float(i) for i in header[HEAD]['data_offsets']]), b''),
        (lambda header: header[HEAD].update(shape=[float(i) for i in header[HEAD]['shape']]), b''),
        (lambda header: header[HEAD].update(shape=[2**62, 2**62]), b''),
        (lambda header: header[HEAD].update(dtype=['F32']), b''),
        (lambda header: header.update({HEAD: None}), b''),
    ],
    ids=['overlap', 'tail', 'hole', 'float offsets', 'float shape', 'huge shape', 'dtype', 'null'],
)
def test_safetensors_that_the_reference_library_refuses(edit, tail, hf):
    import safetensors

    file = hf / 'model.safetensors'
    rewrite_header(file, edit, tail)
    with pytest.raises(safetensors.SafetensorError):
        load_file(file)
    with pytest.raises(UserError, match='model.safetensors'):
        open_model(hf)


@pytest.mark.parametrize('name', ['../x.safetensors', '/etc/passwd', 'a/b', '', '..', None, 7, ['x'], 'a\n'])
def test_names_of_shards_are_names_of_files_beside_the_index(name, hf):
    (hf / 'model.safetensors').unlink()
    (hf / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {HEAD: name}}))
    with pytest.raises(UserError, match='model.safetensors.index.json is damaged: its "weight_map"'):
        open_model(hf)


@pytest.mark.parametrize(
    'name', ['config.json', 'model.safetensors', 'model.safetensors.index.json', 'tokenizer.model', 'generation_config.json']
)
def test_pointers_of_git_lfs_and_pipes_are_named(name, hf):
    (hf / name).unlink(missing_ok=True)
    if name.endswith('index.json'):
        (hf / 'model.safetensors').unlink()
    (hf / name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576392\n')
    with pytest.raises(UserError, match=f'{name} is a pointer of Git LFS.*git lfs pull'):
        load_model(hf)
    (hf / name).unlink()
    os.mkfifo(hf / name)
    with pytest.raises(UserError, match=f'{name} is not a regular file'):
        load_model(hf)


def test_other_files_that_are_pipes(orbax, tmp_path):
    convert(open_model(orbax), tmp_path / 'meta', 'meta')
    convert(open_model(orbax), tmp_path / 'plain', 'orbax')
    places = ['meta/consolidated.00.pth', 'meta/params.json', 'plain/params/table_VD/0.0', 'plain/params/norm_D/.zarray']
    manifest = orbax / 'params/manifest.ocdbt'
    for place in [*(tmp_path / name for name in places), *([manifest] if manifest.exists() else [])]:
        content = place.read_bytes()
        place.unlink()
        os.mkfifo(place)
        with pytest.raises(UserError, match=f'{place.name} is not a regular file'):
            open_model(place.parent if place.parent.name == 'meta' else orbax if place == manifest else tmp_path / 'plain')
        place.unlink()
        place.write_bytes(content)
    os.mkfifo(tmp_path / 'x.gguf')
    with pytest.raises(UserError, match='x.gguf is not a regular file'):
        open_model(tmp_path / 'x.gguf')


@pytest.mark.parametrize('setting', [{}, {'compressor': {'id': 'zlib', 'level': 1}}, {'dimension_separator': '/'}])
def test_a_chunk_of_an_array_that_is_missing_or_too_long(setting, orbax, tmp_path):
    import tensorstore as ts

    convert(open_model(orbax), tmp_path / 'plain', 'orbax')
    array = tmp_path / 'plain/params/blocks.w_up_DF'
    metadata = json.loads((array / '.zarray').read_text())
    content = ts.open({'driver': 'zarr', 'kvstore': f'file://{array}'}, open=True).result().read().result()
    for file in array.iterdir():
        file.unlink()
    spec = {'driver': 'zarr', 'kvstore': f'file://{array}', 'metadata': metadata | setting}
    ts.open(spec, create=True).result().write(content).result()
    assert np.array_equal(open_model(tmp_path / 'plain').read('w_up_DF', 1), content[1])
    chunk = array / ('1/0/0' if 'dimension_separator' in setting else '1.0.0')
    whole = chunk.read_bytes()
    if 'compressor' not in setting:
        chunk.write_bytes(whole + bytes(1000))
        with pytest.raises(UserError, match='params'):
            open_model(tmp_path / 'plain').read('w_up_DF', 1)
    chunk.unlink()
    with pytest.raises(UserError, match=r'blocks.w_up_DF/1.0.0 is missing'):
        open_model(tmp_path / 'plain')


@pytest.mark.parametrize(('name', 'value'), [('chunks', [1, 2**40, 2**40, 8]), ('chunks', 'x'), ('shape', [3, -1, 8, 8])])
def test_arrays_of_impossible_sizes(name, value, orbax, tmp_path):
    convert(open_model(orbax), tmp_path / 'plain', 'orbax')
    change(tmp_path / 'plain/params/blocks.w_q_DHK/.zarray', **{name: value})
    with pytest.raises(UserError, match='blocks.w_q_DHK/.zarray is damaged'):
        open_model(tmp_path / 'plain')


def test_a_tokenizer_whose_text_is_not_utf_8(hf):
    content = (hf / 'tokenizer.model').read_bytes()
    (hf / 'tokenizer.model').write_bytes(content.replace(b'</s>', b'\xf8/s>', 1))
    with pytest.raises(UserError, match='tokenizer.model'):
        load_model(hf)


def deep(depth):
    return '{"a":' * depth + '1' + '}' * depth


@pytest.mark.parametrize('content', [deep(100_000), deep(100), '{"a": 1, "a": 2}', '{', '[]', '\xff', '9' * 10_000])
@pytest.mark.parametrize('name', ['config.json', 'generation_config.json', 'model.safetensors.index.json'])
def test_json_that_is_none_or_too_deep(name, content, hf):
    if name.endswith('index.json'):
        (hf / 'model.safetensors').unlink()
    (hf / name).write_text(content, encoding='latin-1')
    with pytest.raises(UserError, match=name):
        open_model(hf)


def test_headers_that_are_too_deep_or_too_long(hf):
    file = hf / 'model.safetensors'
    for text in (deep(100_000).encode(), b' ' * 10_000_000):
        file.write_bytes(struct.pack('<Q', len(text)) + text)
        with pytest.raises(UserError, match='model.safetensors'):
            open_model(hf)


def test_a_tokenizer_of_many_bytes_is_not_read(hf):
    with (hf / 'tokenizer.model').open('r+b') as file:
        file.truncate(20_000_000_000)  # a hole
    with pytest.raises(UserError, match='tokenizer.model has more than'):
        load_model(hf)


@pytest.mark.parametrize(('form', 'more'), [('hf', 1), ('hf', 24), ('meta', 24)])
def test_a_vocabulary_larger_than_the_tokenizer_is_cut(form, more, model_directory, tokenizer, tmp_path, capsys):
    wide = dataclasses.replace(MHA, vocab_size=296 + more)
    model = random_model(wide)
    save_model(tmp_path / 'wide', model, tokenizer, {})
    start = open_model(tmp_path / 'wide')
    # As an export of another program: all rows, and the tokenizer without the added ones.
    (tmp_path / 'out').mkdir()
    write = {'hf': write_huggingface, 'meta': partial(write_meta, shards=1)}[form]
    write(tmp_path / 'out', start, start.dtype, stream=partial(_stream, start, start.dtype, lambda _: None))
    read, own = load_model(tmp_path / 'out')
    assert read.config.vocab_size == own.vocab_size == 296
    assert capsys.readouterr().out.count(f'the vocabulary of {296 + more} is cut to the 296 pieces') == 1
    assert np.array_equal(read.table_VD[...], model.table_VD[...][:296])
    assert np.array_equal(read.head_DV[...], model.head_DV[...][:, :296])
    if form == 'hf':
        change(tmp_path / 'out/generation_config.json', eos_token_id=296)
        with pytest.raises(UserError, match='ends its texts with token 296'):
            open_model(tmp_path / 'out')


@pytest.mark.parametrize('exact', [True, False])
def test_matrices_of_bfloat16_beside_norms_of_float32(exact, hf):
    tensors = load_file(hf / 'model.safetensors')
    for name, array in tensors.items():
        if array.ndim == 2:
            tensors[name] = array.astype('bfloat16')
        elif exact:
            tensors[name] = array.astype('bfloat16').astype(np.float32)
    save_file(tensors, hf / 'model.safetensors', {'format': 'pt'})
    source = open_model(hf)
    assert source.dtype.name == ('bfloat16' if exact else 'float32')
    assert [note for note in source.notes if '--dtype=bfloat16' in note] == ([] if exact else list(source.notes))
    assert bool(source.notes) != exact


LORA = LoraConfig(rank=4, alpha=6.0, matrices=('q', 'o', 'down'))


@pytest.fixture
def adapter(tmp_path):
    """An adapter as our stages write it, and its factors."""
    adapters = make_adapters(MHA, LORA, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), adapters)
    write_peft(tmp_path / 'adapter', adapters, LORA, 'base')
    return tmp_path / 'adapter', adapters


def test_an_adapter_is_merged_by_the_formula_of_lora(adapter, hf):
    directory, adapters = adapter
    source = with_adapter(open_model(hf), directory)
    ours = merge(load_model(hf)[0], adapters, LORA)
    for name in ('w_q_DHK', 'w_o_DHK', 'w_down_DF', 'w_up_DF'):
        np.testing.assert_allclose(source.read(name, 2), getattr(ours.blocks, name)[...][2], rtol=1e-5, atol=1e-5)
    weights, factors = load_file(hf / 'model.safetensors'), load_file(directory / 'adapter_model.safetensors')
    name = 'model.layers.2.self_attn.q_proj.'
    a, b = (factors[f'base_model.model.{name}lora_{factor}.weight'] for factor in 'AB')
    by_hand = weights[f'{name}weight'] + 6 / 4 * b @ a
    np.testing.assert_allclose(source.read('w_q_DHK', 2).reshape(64, 64).T, by_hand, rtol=1e-5, atol=1e-5)
    change(directory / 'adapter_config.json', use_rslora=True)
    by_hand = weights[f'{name}weight'] + 6 / 4**0.5 * b @ a
    merged = with_adapter(open_model(hf), directory).read('w_q_DHK', 2)
    np.testing.assert_allclose(merged.reshape(64, 64).T, by_hand, rtol=1e-5, atol=1e-5)


def test_adapters_that_cannot_be_merged(adapter, hf):
    directory, _ = adapter
    with pytest.raises(UserError, match='holds an adapter of peft.*--adapter='):
        open_model(directory)
    for name, value in (('use_dora', True), ('peft_type', 'IA3'), ('modules_to_save', ['lm_head']), ('r', 'x'), ('r', 5)):
        before = (directory / 'adapter_config.json').read_text()
        change(directory / 'adapter_config.json', **{name: value})
        with pytest.raises(UserError, match='adapter'):
            with_adapter(open_model(hf), directory)
        (directory / 'adapter_config.json').write_text(before)
    factors = load_file(directory / 'adapter_model.safetensors')
    name = next(iter(factors))
    save_file({key: array for key, array in factors.items() if key != name}, directory / 'adapter_model.safetensors')
    with pytest.raises(UserError, match=f'adapter_model.safetensors: tensor .{name}. is missing'):
        with_adapter(open_model(hf), directory)
    tensors = load_file(hf / 'model.safetensors')
    save_file({f'base_model.model.{key}': array for key, array in tensors.items()}, hf / 'model.safetensors')
    with pytest.raises(UserError, match='merge_and_unload'):
        open_model(hf)


def test_what_a_kill_has_left_is_removed_whatever_it_is(hf, tmp_path):
    os.mkfifo(tmp_path / 'out.incomplete')
    convert(open_model(hf), tmp_path / 'out', 'orbax')
    assert not (tmp_path / 'out.incomplete').exists()
