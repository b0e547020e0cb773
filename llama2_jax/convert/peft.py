"""Adapters as Hugging Face's `peft` reads them: adapter_config.json and adapter_model.safetensors."""

import jax
import numpy as np
from etils.epath import Path
from safetensors.numpy import save

from llama2_jax.convert.names import BLOCK
from llama2_jax.convert.source import write_json
from llama2_jax.files import locate, write
from llama2_jax.mesh import replicate
from llama2_jax.model.lora import Adapters, LoraConfig, names
from llama2_jax.runtime import barrier, is_main_process


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
            name = f'base_model.model.{module.format(layer)}'
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
