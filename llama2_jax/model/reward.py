"""A Llama that gives every position a score in place of next tokens: reward models (paper p10; recipe E.2) and value models."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from llama2_jax.config import ModelConfig
from llama2_jax.mesh import parameter_name, reshard
from llama2_jax.model.llama import CPU, ComputeConfig, Transformer


class ScoreModel(Transformer):
    """The trunk, and a linear head without bias."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        super().__init__(config, key)
        self.score_D = nnx.Param(new_head(config, key))

    def __call__(self, tokens_BL: jax.Array, segments_BL: jax.Array | None = None, compute: ComputeConfig = CPU) -> jax.Array:
        """The score at every position, [B, L] float32, of what was read up to there; arguments as of `Transformer`."""
        x_BLD = super().__call__(tokens_BL, segments_BL, compute).astype(jnp.float32)
        # Not as a matrix product, whose inputs accelerators would round.
        return jnp.sum(x_BLD * self.score_D[...].astype(jnp.float32)[None, None], axis=-1)


def new_head(config: ModelConfig, key: jax.Array) -> jax.Array:
    """A head to begin with, [D] float32.

    The paper does not state one. Normal numbers of sigma (D + 1)^-1/2, as in Stiennon et al.'s reward model (recipe K): the
    hidden state has been normalised, so scores begin with a spread of about 1.
    """
    _, head, _ = jax.random.split(key, 3)
    return (config.dim + 1) ** -0.5 * jax.random.normal(head, (config.dim,), jnp.float32)


def with_score(model: Transformer, key: jax.Array) -> ScoreModel:
    """The trunk of another model, such as the chat model that a reward model begins with, under a new head."""
    given = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    given['score_D'] = new_head(model.config, key).astype(given['norm_D'].dtype)
    abstract = jax.eval_shape(partial(ScoreModel, model.config), key)
    return jax.tree_util.tree_map_with_path(lambda path, _: given[parameter_name(path)], abstract)


def zero_head(model: ScoreModel) -> ScoreModel:
    """The model with a head of zeros: it predicts the mean of whitened rewards, 0."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if parameter_name(path) == 'score_D' else leaf, model
    )


def scores_at(score_BL: jax.Array, last: jax.Array) -> jax.Array:
    """The scores at some places of each row, of the shape of `last`, [B, ...]: where texts end, which no id tells.

    >>> scores_at(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.array([2, 0])).tolist()
    [3.0, 4.0]
    """
    index = jnp.expand_dims(jnp.arange(score_BL.shape[1]), range(last.ndim))
    scores = jnp.expand_dims(reshard(score_BL, 'BM'), range(1, last.ndim))
    return jnp.sum(jnp.where(index == last[..., None], scores, 0), axis=-1)
