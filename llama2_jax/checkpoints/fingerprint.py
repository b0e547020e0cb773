"""Which model lies in a directory: a short text that changes with what the model computes, not with where or how it is stored."""

import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np

from llama2_jax.checkpoints.load import open_model
from llama2_jax.checkpoints.names import BLOCK, keys, shape
from llama2_jax.files import bucket_errors, locate

SAMPLE = 2**30  # bytes of layers that are read: all of a small model, one layer of a large one


def fingerprint(model: str | os.PathLike) -> str:
    """The number of parameters of a model and a hash of its config, provenance, tokenizer and a sample of its layers.

    Embeddings, head and last norm are always read. It takes a few seconds for 70B.

    Raises:
      UserError: what `open_model` raises, or a tensor that cannot be read.
    """
    source = open_model(model)
    layer_bytes = source.dtype.itemsize * sum(int(np.prod(shape(name, source.config))) for name in BLOCK)
    count = min(max(SAMPLE // layer_bytes, 1), source.config.layers)
    layers = {None, *np.linspace(source.config.layers - 1, 0, count).astype(int).tolist()}
    # The parent is a path, which may differ where the model is the same.
    provenance = {name: value for name, value in source.provenance.items() if name != 'parent'}
    described = [dataclasses.asdict(source.config), source.head, str(source.dtype), provenance]
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=8)
    digest.update(source.tokenizer())
    with bucket_errors(model):
        for name, layer in keys(source.config, source.head):
            if layer in layers:
                digest.update(np.ascontiguousarray(source.read(name, layer)).reshape(-1).view(np.uint8))
    return f'{source.config.parameters:,} parameters, {digest.hexdigest()}'


def identity(model: str, int8: bool = False) -> dict[str, Any]:
    """What results depend on of a model: where it lies, what it is, and in which precision it is used."""
    return {'model': str(locate(model)), 'content of the model': fingerprint(model), 'int8': int8}
