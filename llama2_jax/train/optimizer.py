"""AdamW as the paper trains with it (p5; recipe C.2), every number a field."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama2_jax.config import Config, UserError, between
from llama2_jax.mesh import parameter_letters, parameter_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config):
    """AdamW, warm-up and cosine.

    Attributes:
      peak_lr: Learning rate after warm-up: 3.0e-4 for 7B and 13B, 1.5e-4 for 34B and 70B (p6 Table 1).
      final_lr: End of the cosine, as a share of the peak.
      warmup_steps: Steps of linear warm-up from 0.
      warmup_share: Warm-up as a share of the run, if that is more steps; a run of one step has none.
      beta1, beta2, eps, weight_decay: AdamW (p5).
      clip: Global norm above which gradients are scaled down.
    """

    peak_lr: float = between(3e-4, 0, 10)
    final_lr: float = between(0.1, 0, 1)
    warmup_steps: int = 2000
    warmup_share: float = between(0.0, 0, 1)
    beta1: float = between(0.9, 0, 0.999_999)
    beta2: float = between(0.95, 0, 0.999_999)
    eps: float = between(1e-5, 0, 1)
    weight_decay: float = between(0.1, 0, 1000)
    clip: float = between(1.0, 1e-12)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up to the peak, then a cosine that reaches its end at the last of `steps`.

    Raises:
      UserError: if warm-up takes the whole run.
    """
    warmup = max(config.warmup_steps, min(math.ceil(config.warmup_share * steps), steps - 1))
    if warmup >= steps:
        raise UserError(f'optimizer.warmup_steps={warmup} must be less than the {steps} steps of the run.')
    return optax.warmup_cosine_decay_schedule(
        0.0, config.peak_lr, warmup, decay_steps=steps, end_value=config.final_lr * config.peak_lr
    )


def decays(parameters: Any) -> Any:
    """Which parameters weight decay shrinks: those of two letters or more, so no norm scale, stacked or not."""

    def of(path, _):
        return len(parameter_letters(parameter_name(path))) > 1

    return jax.tree_util.tree_map_with_path(of, parameters)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; its moments are float32 and rest where their parameters do."""
    adamw = optax.adamw(
        schedule(config, steps), config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decays
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def where(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the scalar condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
