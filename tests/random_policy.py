"""A policy and two reward models with random weights, and prompts."""

import json

import jax
import jax.numpy as jnp

from llama2_jax.checkpoints.directory import save_model
from llama2_jax.config import ModelConfig
from llama2_jax.mesh import MeshConfig, make_mesh
from llama2_jax.model.llama import Llama
from llama2_jax.model.reward import ScoreModel
from llama2_jax.text.tokenizer import train_tokenizer

SHAPE = ModelConfig(vocab_size=290, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=48, context=64)
DEVICES = jax.devices  # as it is, where a test sees fewer


def make_home(home, rows, eos=1.0):
    """Writes policy/, help/, safe/, and prompts.jsonl with the rows; `eos` scales what makes the policy end an answer."""
    (home / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    tokenizer = train_tokenizer([row['messages'][0]['content'] for row in rows] * 5, home / 'tokenizer.model', SHAPE.vocab_size)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        for name, kind, seed in (('policy', Llama, 0), ('help', ScoreModel, 1), ('safe', ScoreModel, 2)):
            model = kind(SHAPE, jax.random.key(seed))
            if name == 'policy':
                model.head_DV[...] *= jnp.where(jnp.arange(SHAPE.vocab_size) == tokenizer.eos_id, eos, 1.0)[None]
            save_model(home / name, model, tokenizer, {'stage': 'test', 'parent': None, 'step': 0})
    return home
