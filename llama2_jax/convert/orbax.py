"""The model directory that every stage writes and reads: config.json, tokenizer.model and params/ (Orbax, for any mesh)."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax

from llama2_jax.config import ModelConfig, UserError, from_dict
from llama2_jax.model.llama import Llama
from llama2_jax.runtime import barrier, is_main_process
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.checkpoint import load_params, save_params


def save_model(directory: str | Path, model: Llama, tokenizer: Tokenizer, provenance: dict[str, Any]) -> None:
    """Writes a model directory, whole or not at all, in place of what is there; every process calls it.

    Args:
      directory: `model/` of a workdir, say.
      model: parameters, on any mesh.
      tokenizer: copied beside them.
      provenance: stage, parent and step, for config.json.

    Raises:
      UserError: no space is left.
    """
    directory = Path(directory).absolute()
    new = directory.with_name(directory.name + '.new')
    if is_main_process():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    barrier('model directory made')
    save_params(new / 'params', model)
    if is_main_process():
        config = {'model': dataclasses.asdict(model.config), 'provenance': provenance}
        (new / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        (new / 'tokenizer.model').write_bytes(Path(tokenizer.path).read_bytes())
        old = directory.with_name(directory.name + '.old')
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    barrier('model directory written')


def load_model(directory: str | Path) -> tuple[Llama, Tokenizer]:
    """The model, cut over the mesh that is set, and its tokenizer.

    Raises:
      UserError: something is missing or damaged, or the tokenizer does not belong to the model.
    """
    directory = Path(directory).absolute()
    config = read_config(directory)
    tokenizer = Tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size)
    abstract = jax.eval_shape(partial(Llama, config), jax.random.key(0))
    return load_params(directory / 'params', abstract), tokenizer


def read_config(directory: Path) -> ModelConfig:
    """The model's shape from a model directory.

    Raises:
      UserError: there is none, or a field is unknown, missing or of another type.
    """
    path = directory / 'config.json'
    if not path.is_file():
        raise UserError(f'{directory} is not a model directory: it has no config.json.')
    if (directory / 'model' / 'params').is_dir():
        raise UserError(f'{directory} is the directory of a run; its model is {directory / "model"}.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        return from_dict(ModelConfig, content['model'], str(path))
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is damaged, or not the config.json of a model directory: it has no "model" section.') from None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises a UserError where tokenizer and model disagree on the number of pieces."""
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f'{tokenizer.path} has {tokenizer.vocab_size} pieces, and the model has model.vocab_size={vocab_size}.')
