"""Small models of random numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama2_jax.config import ModelConfig
from llama2_jax.model.llama import Llama

# Every size can be cut into eight shards, and the rows of every matrix into blocks of 32.
GQA = ModelConfig(vocab_size=296, dim=64, layers=3, heads=16, kv_heads=8, head_dim=4, hidden=96, context=64)
MHA = dataclasses.replace(GQA, heads=8, head_dim=8)


def random_model(config, dtype='float32', seed=0):
    """Random numbers for the norms' scales too, or nothing would see them swapped."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(partial(Llama, config), jax.random.key(0))

    def leaf(spec):
        scale = 0.5 * spec.shape[-1] ** -0.5 if len(spec.shape) > 2 else 1
        return jnp.asarray((scale * rng.normal(1 if len(spec.shape) < 3 else 0, 0.3, spec.shape)).astype(jnp.dtype(dtype)))

    return jax.tree.map(leaf, abstract)
