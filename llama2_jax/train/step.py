"""One training step: accumulate gradients over microbatches, clip, update. It knows no Llama."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from llama2_jax.train.optimizer import where

Batch = Mapping[str, jax.Array]
# (parameters, microbatch) -> weighted sum of its token losses, nats
LossFunction = Callable[[Any, Batch], jax.Array]


class State(NamedTuple):
    """All that changes while training.

    Attributes:
      step: int32 scalar, updates tried so far.
      params: the model.
      opt_state: optax state, moments sharded like their parameters.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """A state before its first step."""
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, learning_rate: optax.Schedule, accumulation: int = 1
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """The step as a function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      loss: (parameters, microbatch) -> weighted *sum* of its token losses. The batch's `weights` [B, L] say what counts.
      optimizer: updates parameters from gradients.
      learning_rate: for the metrics.
      accumulation: microbatches a batch is cut into. Sums are divided by the weight of the whole global batch, so neither
        this nor the number of hosts changes the result.

    Returns:
      The function. Its metrics are scalars: loss (nats a token), tokens (trained on), grad_norm (before clipping),
      update_norm, learning_rate, and finite: false if loss or gradient is not, and then nothing but the step counter moved.
    """

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        tokens: jax.Array = jnp.maximum(batch['weights'].sum(), 1)

        def mean_loss(params, microbatch):
            return loss(params, microbatch) / tokens

        def accumulate(total, microbatch):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(state.params, microbatch)), None

        if accumulation == 1:
            mean, gradients = jax.value_and_grad(mean_loss)(state.params, batch)
        else:
            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (mean, gradients), _ = jax.lax.scan(accumulate, zeros, microbatches(batch, accumulation))

        metrics = {'tokens': tokens, 'learning_rate': jnp.asarray(learning_rate(state.step))}
        state, moved = descend(state, mean, gradients, optimizer)
        return state, metrics | moved

    return step


def descend(
    state: State, loss: jax.Array, gradients: Any, optimizer: optax.GradientTransformation
) -> tuple[State, dict[str, jax.Array]]:
    """One update of the optimizer, or none where loss or gradients are not finite.

    Returns:
      The next state, and loss, grad_norm (before clipping), update_norm and finite.
    """
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {'loss': loss, 'grad_norm': grad_norm, 'update_norm': optax.tree.norm(updates), 'finite': finite}
    params, opt_state = where(finite, (params, opt_state), (state.params, state.opt_state))
    return State(state.step + 1, params, opt_state), metrics


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]: rows stay on their device, as row r goes to microbatch r mod count."""

    def cut(x):
        shape = (x.shape[0] // count, count, *x.shape[1:])
        # Said where it lies: of one row a microbatch, JAX would take the count for the axis that is cut.
        row, *rest = jax.typeof(x).sharding.spec
        placed = None if jax.sharding.get_abstract_mesh().empty else P(row, None, *rest)
        return x.reshape(shape, out_sharding=placed).swapaxes(0, 1)

    return jax.tree.map(cut, dict(batch))


def minimise(objective: Callable, state: State, optimizer: optax.GradientTransformation) -> tuple[State, dict[str, jax.Array]]:
    """One step down an objective, parameters -> (loss, figures); the state stays where the loss or gradient is not finite."""
    (loss, statistics), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    state, found = descend(state, loss, gradients, optimizer)
    return state, statistics | found
