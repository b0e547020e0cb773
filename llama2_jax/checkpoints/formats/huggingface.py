"""Hugging Face's format: config.json, weights as safetensors (or PyTorch's .bin, read only), and the tokenizer's files."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from etils.epath import Path

from llama2_jax.checkpoints.formats.pieces import AddedToken, with_added
from llama2_jax.checkpoints.formats.tokenizer_json import (
    added_tokens_of,
    make_tokenizer_json,
    read_tokenizer_json,
    spaces_of,
)
from llama2_jax.checkpoints.formats.torchfile import tensors_in
from llama2_jax.checkpoints.names import from_theirs, in_parts, their_matrix, their_names, their_shape
from llama2_jax.checkpoints.source import (
    DTYPES,
    Source,
    Stored,
    Stream,
    check_stop_ids,
    check_tensors,
    stored_dtype,
    tokenizer_beside,
    write_json,
)
from llama2_jax.config import ModelConfig, UserError, check_field, from_dict, nearest, shown
from llama2_jax.files import JSON_BYTES, create, parse_json, read_bytes, read_json, read_whole, size_of, write
from llama2_jax.text.template import LLAMA2_TEMPLATE, MAX_TEMPLATE, PromptFormat, foreign_format
from llama2_jax.text.tokenizer import MODEL_BYTES, Tokenizer

CODES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
SHARD_BYTES = 5_000_000_000
HEAD_OF = {'LlamaForCausalLM': 'head_DV', 'LlamaForSequenceClassification': 'score_D'}
OLD_NAMES = {'LLaMAForCausalLM': 'LlamaForCausalLM'}
# Attributes that must have one of these values, the first of which is the default: the LLaMA 2 of this package.
ONLY = {
    'model_type': ('llama',),
    'hidden_act': ('silu', 'swish'),  # two names of one function
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'partial_rotary_factor': (1.0,),
    'quantization_config': (None,),
    'add_cross_attention': (False,),
    'is_decoder': (True,),
}
# Attributes of the shape, and our fields.
SHAPE = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'dim',
    'num_hidden_layers': 'layers',
    'num_attention_heads': 'heads',
    'intermediate_size': 'hidden',
    'num_key_value_heads': 'kv_heads',
    'head_dim': 'head_dim',
    'max_position_embeddings': 'context',
    'rms_norm_eps': 'norm_eps',
    'rope_theta': 'rope_theta',
}
REQUIRED = tuple(SHAPE)[:5]
# Attributes that change no logits, or that are looked at elsewhere; so are all that begin with one of PRIVATE.
HARMLESS = {
    *('architectures', 'auto_map', 'dtype', 'torch_dtype', 'use_cache', 'transformers_version', 'transformers.js_config'),
    *('bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id', 'sep_token_id', 'decoder_start_token_id'),
    *('bos_token', 'eos_token', 'pad_token', 'unk_token', 'tokenizer_class', 'model_max_length', 'max_sequence_length'),
    *('attention_dropout', 'classifier_dropout', 'hidden_dropout', 'resid_pdrop', 'embd_pdrop', 'initializer_range'),
    *('pretraining_tp', 'tie_word_embeddings', 'rope_scaling', 'rope_parameters', 'gradient_checkpointing', 'is_llama_config'),
    *('use_flash_attention', 'use_flash_attention_2', 'use_flash_attn', 'attn_implementation', 'neftune_noise_alpha'),
    *('id2label', 'label2id', 'num_labels', 'problem_type', 'finetuning_task', 'task_specific_params', 'prefix'),
    *('return_dict', 'output_attentions', 'output_hidden_states', 'output_scores', 'return_dict_in_generate', 'torchscript'),
    *('keys_to_ignore_at_inference', 'chunk_size_feed_forward'),
    # Settings of generation, which older versions of transformers wrote here.
    *('max_length', 'min_length', 'max_new_tokens', 'do_sample', 'temperature', 'top_p', 'top_k', 'typical_p', 'early_stopping'),
    *('num_beams', 'num_beam_groups', 'diversity_penalty', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size'),
    *('encoder_no_repeat_ngram_size', 'num_return_sequences', 'bad_words_ids', 'suppress_tokens', 'begin_suppress_tokens'),
    *('forced_bos_token_id', 'forced_eos_token_id', 'remove_invalid_values', 'exponential_decay_length_penalty'),
}
PRIVATE = ('_', 'unsloth_')
PADS = ('<pad>', '[PAD]', '<PAD>', '[pad]', '<|pad|>')  # usual names of a token that only fills up rows of a batch


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
    # Fine-tuning may leave a head of its own beside the attribute, and it counts, as in transformers 5.
    if tied and head == 'head_DV' and 'lm_head.weight' not in found and 'model.embed_tokens.weight' in found:
        found['lm_head.weight'] = found['model.embed_tokens.weight']
    check_tensors(found, wanted, config, 1, path)
    places = {key: found[name] for name, key in wanted.items()}
    dtype, notes = stored_dtype(path, found.values())
    stop_ids = _stop_ids(path, content, config.vocab_size) if head == 'head_DV' else ()
    added = _added_tokens(path, config.vocab_size)
    return Source(
        path,
        'hf',
        config,
        dtype,
        head,
        lambda name, layer: from_theirs(name, places[name, layer].read(), config, 'hf'),
        partial(_tokenizer_model, path, added, stop_ids),
        {'stage': 'convert', 'parent': str(path), 'step': None},
        stop_ids,
        notes,
        _prompts(path),
        added,
    )


def _settings(path: Path) -> dict[str, Any]:
    file = path / 'tokenizer_config.json'
    return read_json(file) if file.exists() else {}


def _special(path: Path) -> dict[str, str]:
    """The texts of special tokens that a directory names, such as 'pad_token'."""
    file = path / 'special_tokens_map.json'
    given = (read_json(file) if file.exists() else {}) | _settings(path)
    texts = {name: value.get('content') if isinstance(value, dict) else value for name, value in given.items()}
    return {name: text for name, text in texts.items() if name.endswith('_token') and isinstance(text, str)}


# The files that may list added tokens, and how; what a later one says counts.
ADDED_TOKENS = {
    'added_tokens.json': lambda content: {i: AddedToken(text, None) for text, i in content.items()},
    'tokenizer.json': added_tokens_of,
    'tokenizer_config.json': lambda content: {
        int(i): AddedToken(token['content'], token.get('special')) for i, token in content.get('added_tokens_decoder', {}).items()
    },
}


def _added_tokens(path: Path, size: int) -> dict[int, AddedToken]:
    """The tokens that a directory adds to its tokenizer, by id, from whichever of three files lists them.

    Raises:
      UserError: a file does not list tokens.
    """
    found: dict[int, AddedToken] = {}
    for name, read in ADDED_TOKENS.items():
        file = path / name
        try:
            tokens = read(read_json(file, limit=MODEL_BYTES)) if file.exists() else {}
            if not all(type(i) is int and i >= 0 and isinstance(token.text, str) and token.text for i, token in tokens.items()):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f'{file} is damaged: its added tokens are not texts with ids.') from None
        found |= tokens
    return {i: token for i, token in found.items() if i < size}


def _tokenizer_model(path: Path, added: Mapping[int, AddedToken], stop_ids: tuple[int, ...]) -> bytes:
    """The SentencePiece model of a directory with its added tokens, but for those at the end that only pad.

    Raises:
      UserError: there is neither a tokenizer.model nor a tokenizer.json that can be read in its place.
    """
    special = _special(path)
    pads = {special.get('pad_token'), *PADS} - {special.get('eos_token')}
    last = max((i for i, token in added.items() if token.text not in pads or i in stop_ids), default=-1)
    used = {i: token for i, token in added.items() if i <= last}
    file = path / 'tokenizer.json'
    if (path / 'tokenizer.model').exists() or not file.exists():
        return with_added(tokenizer_beside(path), used, last + 1)
    return read_tokenizer_json(file, used, special)


def _prompts(path: Path) -> PromptFormat:
    """The chat template of a directory, and where its tokenizer puts leading spaces, as transformers reads both."""
    file, tokenizer, settings = path / 'tokenizer_config.json', path / 'tokenizer.json', _settings(path)
    template = settings.get('chat_template')
    if (own := path / 'chat_template.jinja').exists():
        file, template = own, read_whole(own, 4 * MAX_TEMPLATE).decode('utf-8', 'replace')
    if str(settings.get('tokenizer_class', 'LlamaTokenizer')).startswith('Llama') or not tokenizer.exists():
        spaces = 'always' if settings.get('legacy') is True else 'first'
    else:
        spaces = spaces_of(read_json(tokenizer, limit=MODEL_BYTES))
    return foreign_format(template, path.name, str(file), spaces)


def _stop_ids(path: Path, content: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json, or of config.json where it names none."""
    file = path / 'generation_config.json'
    generation = read_json(file) if file.exists() else {}
    if generation.get('eos_token_id') is None:
        file, generation = path / 'config.json', content
    return check_stop_ids(f'{file}: eos_token_id', generation.get('eos_token_id'), vocab_size)


def read_huggingface_config(file: Path, content: Mapping[str, Any]) -> tuple[ModelConfig, str, bool]:
    """Shape, head and whether head and embedding are one, from config.json.

    Raises:
      UserError: naming the attribute that this package does not compute, or that is missing.
    """
    given = {name: value for name, value in content.items() if value is not None}
    for name, only in ONLY.items():
        if name in given and given[name] not in only:
            raise UserError(
                f'{file}: {name}={shown(given[name])} makes another model of it than LLaMA 2, which has {only[0]!r}: '
                'its logits would be wrong here, so it is not read.'
            )
    known = {*ONLY, *SHAPE, *HARMLESS}
    for name, value in given.items():
        if name not in known and not name.startswith(PRIVATE) and value not in (False, 0, [], {}, ''):
            raise UserError(
                f'{file}: {shown(name)}: {shown(value)} is an attribute that is not handled; {nearest(name, SHAPE)} '
                'Remove it from a copy of the file if it does not change what the model computes.'
            )
    architectures = given.get('architectures') or ['LlamaForCausalLM']
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    if not isinstance(architecture, str) or (architecture := OLD_NAMES.get(architecture, architecture)) not in HEAD_OF:
        raise UserError(f'{file}: architectures={shown(architectures)} is not handled; valid: {", ".join(HEAD_OF)}.')
    for name in REQUIRED:
        if name not in given:
            raise UserError(f'{file}: attribute {name!r} is missing.')
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for theirs, ours in SHAPE.items():
        if theirs in given:
            check_field(f'{file}: {theirs}', given[theirs], fields[ours])
    tied = given.get('tie_word_embeddings', False)
    if not isinstance(tied, bool):
        raise UserError(f'{file}: tie_word_embeddings is {shown(tied)}, not true or false.')
    heads = given['num_attention_heads']
    defaults = {'kv_heads': heads, 'head_dim': given['hidden_size'] // heads, 'context': 2048, 'norm_eps': 1e-6}
    values = {ours: given[theirs] for theirs, ours in SHAPE.items() if theirs in given}
    values['rope_theta'] = _rope_theta(file, given, fields['rope_theta'])
    return from_dict(ModelConfig, defaults | values, str(file)), HEAD_OF[architecture], tied


def _rope_theta(file: Path, given: Mapping[str, Any], field: dataclasses.Field) -> float:
    theta = given.get('rope_theta', field.default)
    for section in ('rope_scaling', 'rope_parameters'):
        rope = given.get(section, {})
        if not isinstance(rope, dict):
            raise UserError(f'{file}: {section} is {shown(rope)}, not an object.')
        rope = {name: value for name, value in rope.items() if value is not None}
        kind = rope.get('rope_type', rope.get('type', 'default'))
        unscaled = kind == 'default' or (kind == 'linear' and rope.get('factor') in (1, 1.0))
        if not unscaled or rope.keys() - {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor', 'factor'}:
            raise UserError(
                f'{file}: {section}={shown(rope)} is not handled: LLaMA 2 does not scale its rotations, '
                'and without the scaling the logits would be wrong.'
            )
        if rope.get('partial_rotary_factor', 1.0) != 1.0:
            raise UserError(f'{file}: {section}.partial_rotary_factor={shown(rope["partial_rotary_factor"])} is not handled.')
        theta = rope.get('rope_theta', theta)
        check_field(f'{file}: {section}.rope_theta', theta, field)
    return float(theta)


def _tensors(path: Path) -> dict[str, Stored]:
    """Where each tensor of a directory lies.

    The order is that of transformers: safetensors before PyTorch's files, and one file before an index, which may be older.
    """
    for stem, suffix, read in (('model', 'safetensors', safetensors_in), ('pytorch_model', 'bin', tensors_in)):
        single, index = path / f'{stem}.{suffix}', path / f'{stem}.{suffix}.index.json'
        if single.exists():
            return _merged([single], read)
        if not index.exists():
            continue
        places = read_json(index).get('weight_map')
        if not isinstance(places, dict) or not all(_is_plain_name(file) for file in places.values()):
            raise UserError(f'{index} is damaged: its "weight_map" does not give the name of a file beside it for each tensor.')
        found = _merged([path / name for name in sorted(set(places.values()))], read)
        for name, file in places.items():
            if name not in found or found[name].path.name != file:
                raise UserError(f'{index}: tensor {shown(name)} is not in {file}.')
        return found
    raise UserError(f'{path} has no weights: no model.safetensors, pytorch_model.bin or index of such files.')


def _is_plain_name(file: Any) -> bool:
    """Whether it names a file of the same directory: nothing else is opened."""
    return isinstance(file, str) and file.isprintable() and len(file) < 256 and file not in ('', '.', '..') and '/' not in file


def _merged(files: Iterable[Path], read: Any) -> dict[str, Stored]:
    found = {}
    for file in files:
        if not file.exists():
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
    if size < 8 or not 2 <= (length := int(read_bytes(path, 0, 8).view('<u8')[0])) <= JSON_BYTES or 8 + length > size:
        raise UserError(f'{path} is damaged or cut short: it does not begin as a safetensors file.')
    header = parse_json(read_bytes(path, 8, length).tobytes(), path)
    header.pop('__metadata__', None)
    found, begin = {}, 8 + length
    for name, entry in header.items():
        try:
            (first, last), shape, code = entry['data_offsets'], tuple(entry['shape']), entry['dtype']
            if any(type(number) is not int or number < 0 for number in (first, last, *shape)) or not isinstance(code, str):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path} is damaged: its header does not say where tensor {shown(name)} lies.') from None
        if code not in CODES:
            raise UserError(f'{path}: tensor {shown(name)} holds {shown(code)}; valid: {", ".join(CODES)}.')
        dtype = DTYPES[CODES[code]]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise UserError(
                f'{path} is damaged: tensor {shown(name)} has {last - first} bytes, which is not its shape {shown(shape)}.'
            )
        if begin + last > size:
            raise UserError(f'{path} is cut short: it has {size} bytes, and tensor {shown(name)} ends after {begin + last}.')
        found[name] = Stored(path, begin + first, shape, dtype)
    place = begin
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if stored.offset != place:
            where = f'begins at byte {stored.offset}, not {place}, where the last one ends'
            raise UserError(f'{path} is damaged: tensor {shown(name)} {where}.')
        place += math.prod(stored.shape) * stored.dtype.itemsize
    if place != size:
        raise UserError(f'{path} is damaged: {size - place} bytes after its last tensor belong to none.')
    return found


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
    write_json(path / 'config.json', make_huggingface_config(config, model.head, dtype, Tokenizer(path), model.stop_ids))


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


def make_huggingface_config(
    config: ModelConfig, head: str, dtype: np.dtype, tokenizer: Tokenizer, stop_ids: tuple[int, ...] = ()
) -> dict[str, Any]:
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
        'eos_token_id': _eos_token_id(tokenizer, stop_ids),
        'torch_dtype': dtype.name,
    }
    if head == 'score_D':
        # The score is read at the last token that is not padding: <unk> never ends a dialog.
        content |= {'id2label': {'0': 'score'}, 'label2id': {'score': 0}, 'pad_token_id': tokenizer.unk_id}
    return content


def _eos_token_id(tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> int | list[int]:
    """As transformers has it: one id, or a list of several."""
    return tokenizer.eos_id if not stop_ids else stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)


def _write_tokenizer(path: Path, model: Source) -> None:
    write(path / 'tokenizer.model', model.tokenizer())
    tokenizer = Tokenizer(path)
    pieces = {
        'bos_token': tokenizer.piece(tokenizer.bos_id),
        'eos_token': tokenizer.piece(tokenizer.eos_id),
        'unk_token': tokenizer.piece(tokenizer.unk_id),
    }
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast',  # which reads tokenizer.json; LlamaTokenizer drops leading spaces
        'add_bos_token': True,
        'add_eos_token': False,
        **pieces,
        'pad_token': None,
        'model_max_length': model.config.context,
        'clean_up_tokenization_spaces': False,
    }
    if model.prompts.chat:
        settings['chat_template'] = model.prompts.template or LLAMA2_TEMPLATE
    write_json(path / 'tokenizer_config.json', settings)
    write_json(path / 'special_tokens_map.json', pieces)
    write_json(path / 'tokenizer.json', make_tokenizer_json(model.tokenizer(), model.prompts.spaces))
    if model.head == 'head_DV':
        sampling = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9}  # Meta's defaults (recipe J)
        ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': _eos_token_id(tokenizer, model.stop_ids)}
        write_json(path / 'generation_config.json', ids | sampling)
