"""Hugging Face's format: config.json, weights as safetensors (or PyTorch's .bin, read only), and the tokenizer's files."""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from etils.epath import Path

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.convert.names import from_theirs, in_parts, their_matrix, their_names, their_shape
from llama2_jax.convert.source import (
    DTYPES,
    Source,
    Stored,
    Stream,
    check_tensors,
    common_dtype,
    read_json,
    tokenizer_beside,
    write_json,
)
from llama2_jax.convert.tokenizer_json import make_tokenizer_json
from llama2_jax.convert.torchfile import tensors_in
from llama2_jax.files import create, read_bytes, size_of, write
from llama2_jax.text.tokenizer import Tokenizer

CODES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
SHARD_BYTES = 5_000_000_000
HEAD_OF = {'LlamaForCausalLM': 'head_DV', 'LlamaForSequenceClassification': 'score_D'}
# Attributes that must have a value: their default, the only one that is the LLaMA 2 of this package.
ONLY = {
    'model_type': 'llama',
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'partial_rotary_factor': 1.0,
    'quantization_config': None,
    'add_cross_attention': False,
    'is_decoder': True,
}
SHAPE = (
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads'),
    *('head_dim', 'max_position_embeddings', 'rms_norm_eps', 'rope_theta', 'rope_scaling', 'rope_parameters'),
)
# Attributes that change no logits, or that are looked at elsewhere.
HARMLESS = (
    *('_name_or_path', '_commit_hash', '_attn_implementation', 'architectures', 'auto_map', 'dtype', 'torch_dtype', 'use_cache'),
    *('bos_token_id', 'eos_token_id', 'pad_token_id', 'max_sequence_length', 'max_length', 'temperature', 'top_p', 'do_sample'),
    *('attention_dropout', 'classifier_dropout', 'initializer_range', 'pretraining_tp', 'tie_word_embeddings', 'return_dict'),
    *('id2label', 'label2id', 'num_labels', 'problem_type', 'output_attentions', 'output_hidden_states', 'transformers_version'),
)
# What Meta's chat_completion renders, in Jinja (recipe D.1).
CHAT_TEMPLATE = """\
{%- set turn = namespace(due='user', opening='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set turn.opening = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] != turn.due -%}
{{- raise_exception('After an optional system message, user and assistant take turns, and the user begins.') -}}
{%- elif turn.due == 'user' -%}
{{- bos_token + '[INST] ' + (turn.opening + message['content']).strip() + ' [/INST]' -}}
{%- set turn.due = 'assistant' -%}{%- set turn.opening = '' -%}
{%- else -%}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{%- set turn.due = 'user' -%}
{%- endif -%}
{%- endfor -%}
"""


def open_huggingface(path: Path) -> Source:
    """Opens a directory of Hugging Face's, of a LlamaForCausalLM or a reward model (LlamaForSequenceClassification, one label).

    Raises:
      UserError: config.json asks for something else, a file is missing or damaged, or a tensor is missing, unknown, there twice
        or of another shape.
    """
    content = read_json(path / 'config.json')
    config, head, tied = read_huggingface_config(path / 'config.json', content)
    found = {name: stored for name, stored in _tensors(path).items() if not name.endswith('.rotary_emb.inv_freq')}
    wanted = their_names(config, head, 'hf')
    if tied and head == 'head_DV':  # the embedding serves as the head, whatever the files hold
        found.pop('lm_head.weight', None)
        if 'model.embed_tokens.weight' in found:
            found['lm_head.weight'] = found['model.embed_tokens.weight']
    check_tensors(found, wanted, config, 1, path)
    places = {key: found[name] for name, key in wanted.items()}
    return Source(
        path,
        'hf',
        config,
        common_dtype(stored.dtype for stored in found.values()),
        head,
        lambda name, layer: from_theirs(name, places[name, layer].read(), config, 'hf'),
        partial(tokenizer_beside, path),
        {'stage': 'convert', 'parent': str(path), 'step': None},
    )


def read_huggingface_config(file: Path, content: Mapping[str, Any]) -> tuple[ModelConfig, str, bool]:
    """Shape, head and whether head and embedding are one, from config.json.

    Raises:
      UserError: naming the attribute that this package does not compute, or that is missing.
    """
    given = {name: value for name, value in content.items() if value is not None}
    for name, only in ONLY.items():
        if name in given and given[name] != only:
            raise UserError(f'{file}: {name}={json.dumps(given[name])[:80]} is not of a LLaMA 2 model, which has {only!r}.')
    for name, value in given.items():
        if name not in ONLY and name not in SHAPE and name not in HARMLESS and value not in (False, 0, [], {}, ''):
            raise UserError(f'{file}: {name}={json.dumps(value)[:80]} is an attribute that is not handled.')
    architecture = (given.get('architectures') or ['LlamaForCausalLM'])[0]
    if architecture not in HEAD_OF:
        raise UserError(f'{file}: the architecture {architecture!r} is not handled; valid: {", ".join(HEAD_OF)}.')
    for name in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads'):
        if name not in given:
            raise UserError(f'{file}: attribute {name!r} is missing.')
    for name in SHAPE[:8]:
        if name in given and (not isinstance(given[name], int) or isinstance(given[name], bool)):
            raise UserError(f'{file}: {name}={given[name]!r} is not a whole number.')
    heads = given['num_attention_heads']
    config = ModelConfig(
        vocab_size=given['vocab_size'],
        dim=given['hidden_size'],
        layers=given['num_hidden_layers'],
        heads=heads,
        kv_heads=given.get('num_key_value_heads', heads),
        head_dim=given.get('head_dim', given['hidden_size'] // max(heads, 1)),
        hidden=given['intermediate_size'],
        context=given.get('max_position_embeddings', 2048),
        norm_eps=given.get('rms_norm_eps', 1e-6),
        rope_theta=_rope_theta(file, given),
    )
    return config, HEAD_OF[architecture], bool(given.get('tie_word_embeddings', False))


def _rope_theta(file: Path, given: Mapping[str, Any]) -> float:
    theta = given.get('rope_theta', 10_000.0)
    for section in ('rope_scaling', 'rope_parameters'):
        rope = given.get(section, {})
        kind = rope.get('rope_type', rope.get('type', 'default'))
        if kind != 'default' or rope.keys() - {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor'}:
            raise UserError(f'{file}: {section}={json.dumps(rope)[:120]} is not handled; LLaMA 2 does not scale its rotations.')
        if rope.get('partial_rotary_factor', 1.0) != 1.0:
            raise UserError(f'{file}: {section}.partial_rotary_factor={rope["partial_rotary_factor"]} is not handled.')
        theta = rope.get('rope_theta', theta)
    return float(theta)


def _tensors(path: Path) -> dict[str, Stored]:
    """Where each tensor of a directory lies; safetensors go before PyTorch's files."""
    for stem, suffix, read in (('model', 'safetensors', safetensors_in), ('pytorch_model', 'bin', tensors_in)):
        index = path / f'{stem}.{suffix}.index.json'
        if index.is_file():
            places = read_json(index).get('weight_map')
            if not isinstance(places, dict):
                raise UserError(f'{index} is damaged: it has no "weight_map".')
            found = _merged([path / name for name in sorted(set(places.values()))], read)
            for name, file in places.items():
                if name not in found or found[name].path.name != file:
                    raise UserError(f'{index}: tensor {name!r} is not in {file}.')
            return found
        if (path / f'{stem}.{suffix}').is_file():
            return _merged([path / f'{stem}.{suffix}'], read)
    raise UserError(f'{path} has no weights: no model.safetensors, pytorch_model.bin or index of such files.')


def _merged(files: Iterable[Path], read: Any) -> dict[str, Stored]:
    found = {}
    for file in files:
        if not file.is_file():
            raise UserError(f'{file} is missing, though the index names it.')
        for name, stored in read(file).items():
            if name in found:
                raise UserError(f'{file}: tensor {name!r} is also in {found[name].path.name}.')
            found[name] = stored
    return found


def safetensors_in(path: Path) -> dict[str, Stored]:
    """Where each tensor of a safetensors file lies: an 8-byte length, a JSON header of that length, then the numbers.

    Raises:
      UserError: the file is damaged, names a tensor twice or holds other numbers than float32, bfloat16 and float16.
    """
    size = size_of(path)
    try:
        length = int(read_bytes(path, 0, 8).view('<u8')[0])
        if length > min(size - 8, 100_000_000):
            raise ValueError
        header = json.loads(read_bytes(path, 8, length).tobytes(), object_pairs_hook=partial(_once, path))
        header.pop('__metadata__', None)
        found = {}
        for name, entry in header.items():
            begin, end = entry['data_offsets']
            if entry['dtype'] not in CODES:
                raise UserError(f'{path}: tensor {name!r} holds {entry["dtype"]}; valid: {", ".join(CODES)}.')
            dtype = DTYPES[CODES[entry['dtype']]]
            if end - begin != int(np.prod(entry['shape'])) * dtype.itemsize or begin < 0:
                raise ValueError
            if 8 + length + end > size:
                raise UserError(f'{path} is cut short: it has {size} bytes, and tensor {name!r} ends after {8 + length + end}.')
            found[name] = Stored(path, 8 + length + begin, tuple(entry['shape']), dtype)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path} is damaged: its header is not that of a safetensors file.') from None
    return found


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []:
        raise UserError(f'{path}: {twice[0]!r} is there twice.')
    return dict(pairs)


def write_huggingface(path: Path, model: Source, dtype: np.dtype, stream: Stream) -> None:
    """Writes a directory of Hugging Face's: safetensors files of 5 GB at most, config.json last.

    Args:
      path: exists and is empty.
      model: for all but the tensors.
      dtype: of the tensors.
      stream: the tensors.
    """
    config = model.config
    wanted = their_names(config, model.head, 'hf')
    sizes = {name: int(np.prod(their_shape(key[0], config))) * dtype.itemsize for name, key in wanted.items()}
    shards: list[list[str]] = [[]]
    for name in wanted:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    places, matrices = {}, stream(lambda name, array: in_parts(their_matrix(name, array, config)))
    for number, names in enumerate(shards, 1):
        file = 'model.safetensors' if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        places |= dict.fromkeys(names, file)
        with create(path / file) as out:
            out.write(_header({name: their_shape(wanted[name][0], config) for name in names}, dtype))
            for _ in names:
                for part in next(matrices)[1]:
                    out.write(part)
    if len(shards) > 1:
        write_json(path / 'model.safetensors.index.json', {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': places})
    _write_tokenizer(path, model)
    write_json(path / 'config.json', make_huggingface_config(config, model.head, dtype, Tokenizer(path)))


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    code = next(code for code, name in CODES.items() if name == dtype.name)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + int(np.prod(shape)) * dtype.itemsize
        header[name] = {'dtype': code, 'shape': list(shape), 'data_offsets': [begin, end]}
        begin = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, 'little') + text


def make_huggingface_config(config: ModelConfig, head: str, dtype: np.dtype, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json."""
    content = {
        'architectures': [next(name for name, ours in HEAD_OF.items() if ours == head)],
        'model_type': 'llama',
        'vocab_size': config.vocab_size,
        'hidden_size': config.dim,
        'intermediate_size': config.hidden,
        'num_hidden_layers': config.layers,
        'num_attention_heads': config.heads,
        'num_key_value_heads': config.kv_heads,
        'head_dim': config.head_dim,
        'hidden_act': 'silu',
        'max_position_embeddings': config.context,
        'rms_norm_eps': config.norm_eps,
        'rope_theta': config.rope_theta,
        'rope_scaling': None,
        'attention_bias': False,
        'mlp_bias': False,
        'tie_word_embeddings': False,
        'bos_token_id': tokenizer.bos_id,
        'eos_token_id': tokenizer.eos_id,
        'torch_dtype': dtype.name,
    }
    if head == 'score_D':
        # The score is read at the last token that is not padding: <unk> never ends a dialog.
        content |= {'id2label': {'0': 'score'}, 'label2id': {'score': 0}, 'pad_token_id': tokenizer.unk_id}
    return content


def _write_tokenizer(path: Path, model: Source) -> None:
    write(path / 'tokenizer.model', model.tokenizer())
    tokenizer = Tokenizer(path)
    pieces = {
        'bos_token': tokenizer.piece(tokenizer.bos_id),
        'eos_token': tokenizer.piece(tokenizer.eos_id),
        'unk_token': tokenizer.piece(tokenizer.unk_id),
    }
    settings = {
        'tokenizer_class': 'LlamaTokenizer',
        'add_bos_token': True,
        'add_eos_token': False,
        **pieces,
        'pad_token': None,
        'model_max_length': model.config.context,
        'clean_up_tokenization_spaces': False,
        'legacy': True,  # a space goes before the text after each <s>, as when turns are encoded one by one
        'sp_model_kwargs': {},
        'chat_template': CHAT_TEMPLATE,
    }
    write_json(path / 'tokenizer_config.json', settings)
    write_json(path / 'special_tokens_map.json', pieces)
    write_json(path / 'tokenizer.json', make_tokenizer_json(model.tokenizer()))
    if model.head == 'head_DV':
        sampling = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9}  # Meta's defaults (recipe J)
        ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id}
        write_json(path / 'generation_config.json', ids | sampling)
