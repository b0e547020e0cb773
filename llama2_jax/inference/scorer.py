"""Scores for evaluation, rejection sampling and PPO: lists of token ids in, a number each out."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import UserError
from llama2_jax.mesh import (
    BATCH_AXES,
    MeshConfig,
    make_mesh,
    parameter_letters,
    parameter_name,
    parameter_spec,
    replicate,
    reshard,
)
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.model.reward import ScoreModel, scores_at
from llama2_jax.text.tokenizer import Tokenizer

SHORTEST = 32  # tokens of the smallest bucket; each has twice the one before


class Scorer:
    """A reward model laid out to score.

    Rows are sorted by length and padded on the right to a few lengths, so that little is compiled and computed in vain; a score
    depends on its row alone.

    Args:
      model: parameters, on any mesh or on the host; they are copied.
      tokenizer: the model's.
      mesh: for training (`mesh.make_mesh`); by default of all devices.
      batch_size: rows at a time; rounded up to what the mesh divides.
      dtype: the compute dtype; by default the platform's.
      shift: added to every score.
    """

    def __init__(
        self,
        model: ScoreModel,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 32,
        dtype: str | None = None,
        shift: float = 0.0,
    ):
        self.config, self.tokenizer, self.shift = model.config, tokenizer, shift
        self._mesh = mesh or make_mesh(MeshConfig())
        compute = ComputeConfig().on(self._mesh.devices.flat[0].platform)
        self._compute = ComputeConfig(dtype or compute.dtype, 'none', compute.attention)
        shards = int(np.prod([self._mesh.shape[axis] for axis in BATCH_AXES]))
        self._batch_size = -(-batch_size // shards) * shards
        self._model = self._place_model(model)
        self._score = scoring(self._compute)

    def score(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The scores of rows of token ids, [len(rows)] float32: linear, shifted, read at the last token of each.

        Every process calls it with the same rows, and gets all scores.

        Raises:
          UserError: a row is empty or longer than the model's context.
        """
        for number, row in enumerate(rows):
            if not 0 < len(row) <= self.config.context:
                raise UserError(f'Row {number} has {len(row)} tokens, and not 1 to {self.config.context}, the context.')
        scores = np.zeros(len(rows), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for length, same in itertools.groupby(order, key=lambda i: self._bucket(len(rows[i]))):
            same = list(same)
            for start in range(0, len(same), self._batch_size):
                batch = same[start : start + self._batch_size]
                scores[batch] = self._batch([rows[i] for i in batch], length)[: len(batch)]
        return scores + np.float32(self.shift)

    def _bucket(self, length: int) -> int:
        return min(max(SHORTEST, 1 << (length - 1).bit_length()), self.config.context)

    def _batch(self, rows: list[Sequence[int]], length: int) -> np.ndarray:
        tokens = np.zeros((self._batch_size, length), np.int32)
        last = np.zeros(self._batch_size, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], last[i] = row, len(row) - 1
        with jax.set_mesh(self._mesh):
            return np.asarray(self._score(self._model, self._placed(tokens), self._placed(last)))

    def _placed(self, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(self._mesh, P(BATCH_AXES))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def _place_model(self, model: ScoreModel) -> ScoreModel:
        """The parameters in the compute dtype, cut over the mesh; the head stays in float32."""

        def move(path, leaf):
            name = parameter_name(path)
            stacked = [None] * (leaf.ndim - len(parameter_letters(name)))
            leaf = leaf.astype(jnp.float32 if name == 'score_D' else self._compute.dtype)
            with jax.set_mesh(self._mesh):
                return jax.device_put(leaf, NamedSharding(self._mesh, P(*stacked, *parameter_spec(name))))

        return jax.tree_util.tree_map_with_path(move, model)


def scoring(compute: ComputeConfig) -> Callable[[ScoreModel, jax.Array, jax.Array], jax.Array]:
    """The compiled function (model, tokens [B, L], index of each row's last token [B]) -> scores [B] on every device."""

    @jax.jit
    def score(model: ScoreModel, tokens_BL: jax.Array, last_B: jax.Array) -> jax.Array:
        return replicate(scores_at(model(reshard(tokens_BL, 'BL'), None, compute), last_B))

    return score
