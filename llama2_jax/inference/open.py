"""Models of any format, opened to generate, to chat or to score."""

import contextlib
import dataclasses
from typing import Any

import jax
from etils.epath import Path
from jax.sharding import Mesh

from llama2_jax.checkpoints.load import announced, load_model, load_score_model, open_language_model, open_model
from llama2_jax.files import bucket_errors
from llama2_jax.inference import decode
from llama2_jax.inference.engine import Engine
from llama2_jax.inference.scorer import Scorer
from llama2_jax.mesh import MeshConfig, decoding_mesh, make_mesh
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.runtime import log
from llama2_jax.text.template import PromptFormat


def open_engine(model: str | Path, batch_size: int = 32, int8: bool = False, own_template: bool = True) -> Engine:
    """An engine on all devices for a model of any format (`checkpoints.load`), whose tokenizer knows how the model is prompted.

    Args:
      own_template: dialogs follow the model's own chat template, if it has one. Without it, as where answers are drawn to be
        trained on, they follow LLaMA 2's format, which all that is trained here follows.

    Raises:
      UserError: the model cannot be read.
    """
    source = open_language_model(model)
    mesh = decoding_mesh(source.config)
    dtype = ComputeConfig().on(mesh.devices.flat[0].platform).dtype
    if int8:  # there may be room for the rounded model only
        tokenizer = announced(source)
        with bucket_errors(model):
            parameters = decode.read_weights(source.config, source.read, mesh, dtype, int8)
    else:
        with _room(mesh):
            parameters, tokenizer = load_model(model, dtype=dtype)
    tokenizer.prompts = source.prompts if own_template else note_llama2(model, source.prompts)
    return Engine(parameters, tokenizer, mesh=mesh, batch_size=batch_size, int8=int8)


def note_llama2(model: str | Path, prompts: PromptFormat) -> PromptFormat:
    """LLaMA 2's format, in place of a model's own template; says so where that makes a difference."""
    if prompts.template:
        log(f"{model} has a chat template of its own; what is trained here follows LLaMA 2's chat format.")
    return dataclasses.replace(prompts, template='')


def open_scorer(model: str | Path, batch_size: int = 32) -> Scorer:
    """A scorer on all devices for a reward model of any format, with the shift that its config.json tells.

    Raises:
      UserError: the model cannot be read, or is a language model.
    """
    mesh = make_mesh(MeshConfig())
    with _room(mesh):
        parameters, tokenizer = load_score_model(model, dtype=ComputeConfig().on(mesh.devices.flat[0].platform).dtype)
    shift = open_model(model).provenance.get('scores', {}).get('shift', 0.0)
    return Scorer(parameters, tokenizer, mesh=mesh, batch_size=batch_size, shift=shift)


def _room(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Where to load: one device might not have room for the model as it is stored beside the model as it is used."""
    return jax.set_mesh(make_mesh(MeshConfig(), jax.devices('cpu')[:1]) if mesh.size == 1 else mesh)
