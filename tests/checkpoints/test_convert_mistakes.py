"""Each mistake ends in one sentence that names the file and what is wrong in it, and leaves nothing behind."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import GQA

from llama2_jax.checkpoints.convert import compare, convert
from llama2_jax.checkpoints.load import open_model
from llama2_jax.config import UserError

ROOT = Path(__file__).parents[2]
torch = pytest.importorskip('torch')


@pytest.fixture
def hf(model_directory, tmp_path):
    convert(open_model(model_directory()), tmp_path / 'hf', 'hf')
    return tmp_path / 'hf'


def change(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (content | values).items() if value != 'gone'}))


def change_tensors(hf, edit):
    tensors = load_file(hf / 'model.safetensors')
    edit(tensors)
    save_file(tensors, hf / 'model.safetensors')


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, r'rope_scaling=.*llama3.* is not handled'),
        ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, r'rope_scaling=.*linear.* is not handled'),
        ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, r'rope_parameters=.*yarn.* is not handled'),
        ({'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5 is not handled'),
        ({'attention_bias': True}, 'config.json: attention_bias=True'),
        ({'mlp_bias': True}, 'config.json: mlp_bias=True'),
        ({'hidden_act': 'gelu'}, "config.json: hidden_act='gelu'"),
        ({'model_type': 'mistral'}, "config.json: model_type='mistral'"),
        ({'quantization_config': {'bits': 4}}, 'quantization_config='),
        ({'layer_norm_bias': True}, 'config.json: .layer_norm_bias.: True'),
        ({'architectures': ['LlamaModel']}, 'architectures=.*LlamaModel.* is not handled'),
        ({'hidden_size': 'gone'}, "attribute 'hidden_size' is missing"),
        ({'num_hidden_layers': '3'}, "config.json: num_hidden_layers is '3', not a whole number"),
        ({'num_hidden_layers': 2}, r"tensor 'model.layers.2.input_layernorm.weight' is unknown"),
        ({'num_hidden_layers': 4}, r"tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ({'num_key_value_heads': 16}, r"'model.layers.0.self_attn.k_proj.weight' has the shape \[32, 64\], not \[64, 64\]"),
        ({'num_key_value_heads': 5}, 'model.heads=16 is not a multiple of model.kv_heads=5'),
    ],
    ids=lambda value: '' if isinstance(value, str) else '-'.join(value),
)
def test_config_of_huggingface(values, message, hf):
    change(hf / 'config.json', **values)
    with pytest.raises(UserError, match=message):
        open_model(hf)


def test_tensors_of_huggingface(hf):
    name = 'model.layers.1.mlp.down_proj.weight'
    change_tensors(hf, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    with pytest.raises(UserError, match=rf"model.safetensors: tensor '{name}' has the shape \[96, 64\], not \[64, 96\]\.$"):
        open_model(hf)
    change_tensors(hf, lambda tensors: tensors.update({name + 's': tensors.pop(name)}))
    with pytest.raises(UserError, match=rf"model.safetensors: tensor '{name}s' is unknown; did you mean '{name}'\?$"):
        open_model(hf)
    change_tensors(hf, lambda tensors: tensors.pop(name + 's'))
    with pytest.raises(UserError, match=rf"tensor '{name}' is missing"):
        open_model(hf)
    change_tensors(hf, lambda tensors: tensors.update({name: np.zeros((64, 96), np.int8)}))
    with pytest.raises(UserError, match=f"tensor '{name}' holds 'I8'; valid: F32, BF16, F16"):
        open_model(hf)


def test_damaged_and_missing_files(hf, model_directory, tmp_path):
    file = hf / 'model.safetensors'
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match='model.safetensors is cut short: it has'):
        open_model(hf)
    for damaged in (b'', b'12', b'\xff' * 100, (9).to_bytes(8, 'little') + b'{"a": 1}}'):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r'model\.safetensors (is damaged|is cut short)'):
            open_model(hf)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
    with pytest.raises(UserError, match="'a' is there twice"):
        open_model(hf)
    file.write_bytes(whole)
    file = file.rename(hf / 'shard.safetensors')
    save_file({'norm': np.zeros(1, np.float32)}, hf / 'other.safetensors')
    index = {'weight_map': {name: file.name for name in load_file(file)} | {'lm_head.weight': 'gone.safetensors'}}
    (hf / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='gone.safetensors is missing, though the index names it'):
        open_model(hf)
    index['weight_map']['lm_head.weight'] = 'other.safetensors'
    (hf / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: tensor 'lm_head.weight' is not in other.safetensors"):
        open_model(hf)
    save_file({'lm_head.weight': np.zeros(1, np.float32)}, hf / 'other.safetensors')
    with pytest.raises(UserError, match="shard.safetensors: tensor 'lm_head.weight' is also in other.safetensors"):
        open_model(hf)
    (hf / 'model.safetensors.index.json').unlink()
    file.unlink()
    with pytest.raises(UserError, match='has no weights'):
        open_model(hf)
    for path, message in (
        (tmp_path / 'nothing', 'There is no model at'),
        (ROOT / 'tests', 'is not a model directory: it has no config.json'),
        (ROOT / 'README.md', 'README.md is not a model'),
    ):
        with pytest.raises(UserError, match=message):
            open_model(path)
    convert(open_model(model_directory()), tmp_path / 'm.gguf', 'gguf')
    (tmp_path / 'm.gguf').write_bytes((tmp_path / 'm.gguf').read_bytes()[:-1000])
    with pytest.raises(UserError, match='m.gguf is (cut short|damaged)'):
        open_model(tmp_path / 'm.gguf')
    (tmp_path / 'm.gguf').write_bytes(b'no')
    with pytest.raises(UserError, match='m.gguf is not a model'):
        open_model(tmp_path / 'm.gguf')


def test_files_of_meta(model_directory, tmp_path):
    meta = tmp_path / 'meta'
    convert(open_model(model_directory()), meta, 'meta', shards=4)
    tensors = torch.load(meta / 'consolidated.01.pth', weights_only=True)
    torch.save(tensors | {'rope.freqs': torch.zeros(2)}, meta / 'consolidated.01.pth')  # as Meta's own files have it
    open_model(meta)
    changed = tensors | {'norm.weight': torch.zeros(64)}
    torch.save(changed, meta / 'consolidated.01.pth')
    with pytest.raises(UserError, match="hold different values of 'norm_D'"):
        open_model(meta).read('norm_D', None)
    del changed['norm.weight']
    torch.save(changed, meta / 'consolidated.01.pth')
    with pytest.raises(UserError, match="consolidated.01.pth: tensor 'norm.weight' is missing"):
        open_model(meta)
    (meta / 'consolidated.01.pth').unlink()
    with pytest.raises(UserError, match='has consolidated.02.pth but no consolidated.01.pth: a shard is missing'):
        open_model(meta)
    torch.save(tensors, meta / 'consolidated.01.pth')
    (meta / 'consolidated.03.pth').unlink()
    with pytest.raises(UserError, match='cannot be cut into 3 shards|has the shape'):
        open_model(meta)
    change(meta / 'params.json', use_scaled_rope=True)
    with pytest.raises(UserError, match="params.json: field 'use_scaled_rope' is not of a LLaMA 2 model"):
        open_model(meta)
    change(meta / 'params.json', use_scaled_rope='gone', dim='64')
    with pytest.raises(UserError, match="params.json: dim is '64'"):
        open_model(meta)


class Evil:
    def __reduce__(self):
        return os.system, ('touch /tmp/llama2_jax_evil',)


def test_no_code_in_a_file_is_run(model_directory, tmp_path):
    mark = Path('/tmp/llama2_jax_evil')
    mark.unlink(missing_ok=True)
    convert(open_model(model_directory()), tmp_path / 'meta', 'meta')
    file = tmp_path / 'meta/consolidated.00.pth'
    torch.save({'norm.weight': Evil()}, file)
    with pytest.raises(UserError, match='consolidated.00.pth holds posix.system'):
        open_model(tmp_path / 'meta')
    file.write_bytes(pickle.dumps({'norm.weight': Evil()}))
    with pytest.raises(UserError, match='is damaged, or was written by PyTorch before 1.6'):
        open_model(tmp_path / 'meta')
    assert not mark.exists()


def test_outputs(model_directory, tmp_path):
    start = model_directory()
    source = open_model(start)
    (tmp_path / 'there').mkdir()
    for output, form, options, message in (
        (start, 'hf', {}, 'is the input: choose another output'),
        (start / 'hf', 'hf', {}, 'lies in the input'),
        (tmp_path / 'there', 'hf', {}, 'exists already'),
        (tmp_path / 'm', 'gguf', {}, r'name it m\.gguf'),
        (tmp_path / 'm', 'hf', {'dtype': 'q8_0'}, '--dtype=q8_0 is for gguf only'),
        (tmp_path / 'm', 'hf', {'shards': 2}, '--shards=2 is for meta only'),
        (tmp_path / 'm', 'meta', {'shards': 16}, 'model.kv_heads=8 cannot be cut into 16 shards'),
        ('/proc/m', 'hf', {}, 'cannot be read or written'),
    ):
        with pytest.raises(UserError, match=message):
            convert(source, output, form, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([start.name, 'there'])
    big = model_directory(dtype='bfloat16')
    (big / 'tokenizer.model').unlink()
    with pytest.raises(UserError, match='has no tokenizer.model'):
        convert(open_model(big), tmp_path / 'm', 'hf')


def test_numbers_beyond_float16(hf, tmp_path):
    change_tensors(hf, lambda tensors: tensors['model.layers.1.mlp.up_proj.weight'].fill(1e5))
    with pytest.raises(UserError, match="'w_up_DF' of layer 1 holds numbers beyond those of float16"):
        convert(open_model(hf), tmp_path / 'out', 'meta', 'float16')
    assert not list(tmp_path.glob('out*'))


@pytest.mark.parametrize('form', ['orbax', 'hf', 'meta', 'gguf'])
def test_full_disk(form, model_directory, tmp_path, monkeypatch):
    source = open_model(model_directory())
    read, count = source.read, [0]

    def full(*key):
        count[0] += 1
        if count[0] == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return read(*key)

    object.__setattr__(source, 'read', full)
    output = tmp_path / ('out.gguf' if form == 'gguf' else 'out')
    with pytest.raises(UserError, match=r'No space left while writing .*out.*: nothing was kept of it'):
        convert(source, output, form)
    assert not list(tmp_path.glob('out*'))


LIMITED = """
import resource, signal, sys
from llama2_jax.checkpoints.load import open_model
from llama2_jax.checkpoints.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
convert(open_model(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize('form', ['orbax', 'hf', 'meta', 'gguf'])
def test_a_write_that_fails_for_real(form, model_directory, tmp_path):
    """The system refuses to let a file grow."""
    output = tmp_path / ('out.gguf' if form == 'gguf' else 'out')
    result = subprocess.run([sys.executable, '-c', LIMITED, model_directory(), output, form], capture_output=True, text=True)
    assert 'UserError: No space left while writing' in result.stderr.splitlines()[-1], result.stderr[-2000:]
    assert not list(tmp_path.glob('out*'))


@pytest.mark.parametrize('form', ['orbax', 'hf', 'meta', 'gguf'])
def test_a_killed_conversion_leaves_nothing_that_looks_whole(form, model_directory, tmp_path):
    slow = f"""
import sys, time
import llama2_jax.checkpoints.convert as transfer
from llama2_jax.checkpoints.load import open_model
def pause(size):
    print('.', flush=True)
    time.sleep(0.2)
transfer.convert(open_model({str(model_directory())!r}), sys.argv[1], {form!r}, progress=pause)
"""
    output = tmp_path / ('out.gguf' if form == 'gguf' else 'out')
    process = subprocess.Popen([sys.executable, '-c', slow, output], stdout=subprocess.PIPE, text=True)
    for _ in range(8):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = tmp_path / f'{output.name}.incomplete'
    assert not output.exists() and left.exists()
    with pytest.raises(UserError):
        open_model(left)
    convert(open_model(model_directory()), output, form)
    assert output.exists() and not left.exists()


def tool(*arguments):
    command = [sys.executable, ROOT / 'experiments/convert.py', *arguments]
    environment = {'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu', 'HOME': '/nowhere'}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_command_line(model_directory, tmp_path):
    start = model_directory()
    done = tool(f'--input={start}', f'--output={tmp_path / "hf"}', '--to=hf', '--dtype=bfloat16')
    assert (done.returncode, done.stdout) == (0, f'{start} (orbax) is written to {tmp_path / "hf"} (hf).\n'), done.stderr
    done = tool(f'--input={tmp_path / "hf"}', f'--output={tmp_path / "orbax"}')
    assert done.returncode == 0
    done = tool(f'--input={tmp_path / "hf"}', f'--against={tmp_path / "orbax"}')
    assert (done.returncode, done.stdout) == (0, 'Logits: differ by up to 0.\nAll weights are equal.\n')
    done = tool(f'--input={tmp_path / "hf"}', f'--against={start}')
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == '30 tensors differ.'
    assert lines[0].startswith('table_VD: differs by up to 0.00')
    assert lines[1].startswith('attention_norm_D of layer 0: differs by up to 0.00')
    assert lines[-1].startswith('Logits: differ by up to 0.0')
    for arguments, message in (
        ([], 'Error: Give either --output (to convert) or --against (to compare).'),
        ([f'--output={start}'], f'Error: {start} is the input: choose another output.'),
    ):
        done = tool(f'--input={start}', *arguments)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (1, message)
        assert 'Traceback' not in done.stderr


def test_comparing_other_shapes(model_directory, tmp_path):
    import dataclasses

    other = dataclasses.replace(GQA, layers=2)
    with pytest.raises(UserError, match=r'has model\.layers=3, and .* has 2'):
        compare(open_model(model_directory()), open_model(model_directory(other, 'bfloat16')))
