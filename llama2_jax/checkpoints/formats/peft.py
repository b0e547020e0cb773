"""Adapters as Hugging Face's `peft` has them: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import math

import jax
import numpy as np
from etils.epath import Path
from safetensors.numpy import save

from llama2_jax.checkpoints.formats.huggingface import safetensors_in
from llama2_jax.checkpoints.formats.torchfile import tensors_in
from llama2_jax.checkpoints.names import BLOCK, Key, from_theirs, their_names, their_shape
from llama2_jax.checkpoints.source import PEFT_PREFIX, Source, Stored, write_json
from llama2_jax.config import UserError, shown
from llama2_jax.files import locate, read_json, write
from llama2_jax.mesh import replicate
from llama2_jax.model.lora import Adapters, LoraConfig, names
from llama2_jax.runtime import barrier, is_main_process

# Settings of an adapter that change what is added; each must be off.
REFUSED = ('use_dora', 'rank_pattern', 'alpha_pattern', 'fan_in_fan_out', 'bias', 'modules_to_save', 'lora_bias')


def write_peft(directory: str | Path, adapters: Adapters, lora: LoraConfig, base: str) -> None:
    """Writes adapters in float32; every process calls it.

    Args:
      directory: made if it is not there.
      base: the model that they belong to, for people; `peft` is given the model itself.
    """
    directory = locate(directory)
    tensors, modules = {}, []
    for matrix in lora.matrices:
        w, *factors = names(matrix)
        a, b = (np.asarray(jax.jit(replicate)(getattr(adapters, name)[...])) for name in factors)
        module = BLOCK[w].hf.removesuffix('.weight')
        modules.append(module.rpartition('.')[2])
        for layer in range(len(a)):
            name = f'{PEFT_PREFIX}{module.format(layer)}'
            tensors[f'{name}.lora_A.weight'] = np.ascontiguousarray(a[layer].reshape(-1, lora.rank).T)
            tensors[f'{name}.lora_B.weight'] = np.ascontiguousarray(b[layer].reshape(lora.rank, -1).T)
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
        write(directory / 'adapter_model.safetensors', save(tensors, {'format': 'pt'}))
        settings = {
            'peft_type': 'LORA',
            'task_type': 'CAUSAL_LM',
            'base_model_name_or_path': base,
            'r': lora.rank,
            'lora_alpha': lora.alpha,
            'lora_dropout': 0.0,
            'bias': 'none',
            'target_modules': modules,
            'inference_mode': True,
        }
        write_json(directory / 'adapter_config.json', settings)
    barrier('adapters written')


def with_adapter(source: Source, directory: str | Path) -> Source:
    """A model with an adapter of peft (or of our own runs) merged: W + scale · B · A, in float32, rounded once.

    Raises:
      UserError: the adapter is of another kind than LoRA, of another model, incomplete or damaged.
    """
    directory = locate(directory)
    config = read_json(directory / 'adapter_config.json')
    if config.get('peft_type') != 'LORA':
        raise UserError(f'{directory}: peft_type={shown(config.get("peft_type"))} is not handled, only LORA is.')
    for name in REFUSED:
        if config.get(name) not in (None, False, [], {}, 'none'):
            raise UserError(f'{directory}: {name}={shown(config[name])} in adapter_config.json is not handled.')
    rank, alpha = config.get('r'), config.get('lora_alpha')
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f'{directory}: adapter_config.json has r={shown(rank)} and lora_alpha={shown(alpha)}, not two numbers.')
    scale = alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)
    pairs = _pairs(source, directory, rank)

    def read(name: str, layer: int | None) -> np.ndarray:
        array = source.read(name, layer)
        if (name, layer) not in pairs:
            return array
        a, b = (stored.read().astype(np.float32) for stored in pairs[name, layer])
        product = from_theirs(name, b @ a, source.config, 'hf')
        return (array.astype(np.float32) + np.float32(scale) * product).astype(source.dtype)

    provenance = {'stage': 'convert', 'parent': str(source.path), 'step': None, 'adapter': str(directory)}
    return dataclasses.replace(source, read=read, provenance=provenance)


def _pairs(source: Source, directory: Path, rank: int) -> dict[Key, tuple[Stored, Stored]]:
    """The two factors of each matrix that has an adapter."""
    file = directory / 'adapter_model.safetensors'
    found = safetensors_in(file) if file.exists() else tensors_in(file := directory / 'adapter_model.bin')
    pairs = {}
    for theirs, key in their_names(source.config, source.head, 'hf').items():
        names = [f'{PEFT_PREFIX}{theirs.removesuffix("weight")}lora_{factor}.weight' for factor in 'AB']
        if not any(name in found for name in names) or key[0] not in BLOCK or len(their_shape(key[0], source.config)) != 2:
            continue
        out, into = their_shape(key[0], source.config)
        for name, shape in zip(names, ((rank, into), (out, rank)), strict=True):
            if name not in found:
                raise UserError(f'{file}: tensor {name!r} is missing.')
            if found[name].shape != shape:
                raise UserError(f'{file}: tensor {name!r} has the shape {shown(list(found[name].shape))}, not {list(shape)}.')
        pairs[key] = found.pop(names[0]), found.pop(names[1])
    if found or not pairs:
        name = shown(next(iter(found))) if found else 'no tensor'
        raise UserError(f'{file} holds {name}, which adds to no matrix of a layer of {source.path}.')
    return pairs
