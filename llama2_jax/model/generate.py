"""Text from a model: one prefill of all prompts, then cached decoding in one compiled loop."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama2_jax.config import UserError
from llama2_jax.mesh import BATCH_AXES, replicate, reshard, spec
from llama2_jax.model.cache import empty_cache, extend
from llama2_jax.model.llama import Llama
from llama2_jax.ops.sampling import sample

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple, so that few programs are compiled


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = 'float32',
) -> list[list[int]]:
    """Continues each prompt until EOS or `max_new_tokens`.

    Args:
      model: parameters.
      prompts: token ids, BOS included, of any lengths.
      max_new_tokens: at most so many new ones.
      eos_id: ends a row; it is part of the result.
      temperature: 0 takes the most likely token.
      top_p: see `ops.sampling.sample`.
      seed: of the draws.
      dtype: compute dtype.

    Returns:
      The new tokens of each prompt.

    Raises:
      UserError: for an empty prompt, or where a prompt and its continuation exceed the model's context.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise UserError(f'Prompt {lengths.index(0)} is empty: begin it with BOS at least.')
    context = model.config.context
    if max(lengths) + max_new_tokens > context:
        raise UserError(f'{max(lengths)} tokens of prompt and {max_new_tokens} new ones exceed the context of {context} tokens.')
    mesh = jax.sharding.get_mesh()
    shards = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    rows = -(-len(prompts) // shards) * shards
    width = min(-(-max(lengths) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, context)
    tokens = np.full((rows, width), eos_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths_B = np.array(lengths + [1] * (rows - len(prompts)), np.int32)
    settings = (jnp.float32(temperature), jnp.float32(top_p))
    out = _run(model, tokens, lengths_B, jax.random.key(seed), *settings, max_new_tokens, eos_id, dtype)
    new = np.asarray(jax.device_get(out))[: len(prompts)].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in new]


@partial(jax.jit, static_argnames=('max_new_tokens', 'eos_id', 'dtype'))
def _run(model, tokens_BL, length_B, key, temperature, top_p, max_new_tokens, eos_id, dtype):
    """New tokens [B, T] of every row, the same on every device; after a row's EOS comes what need not be read."""
    B, L = tokens_BL.shape
    tokens_BL, length_B = reshard(tokens_BL, 'BL'), reshard(length_B, 'B')
    x_BLD, cache = extend(model, tokens_BL, empty_cache(model.config, B, L + max_new_tokens, dtype))
    is_last_BL = (jnp.arange(L)[None] == length_B[:, None] - 1).astype(x_BLD.dtype)
    last_BD = jnp.einsum('BLD,BL->BD', x_BLD, is_last_BL, out_sharding=spec('BD'))

    def choose(step, x_BD):
        logits_BV = replicate(model.logits(x_BD[:, None])[:, 0])
        return sample(logits_BV, jax.random.fold_in(key, step), temperature, top_p)

    def unfinished(state):
        step, token_B, *_ = state
        return (step < max_new_tokens) & ~state[2].all()

    def decode(state):
        step, token_B, done_B, cache, new_BT = state
        new_BT = jax.lax.dynamic_update_slice(new_BT, token_B[:, None], (0, step))
        x_BLD, cache = extend(model, reshard(token_B[:, None], 'BL'), cache)
        return step + 1, choose(step + 1, x_BLD[:, 0]), done_B | (token_B == eos_id), cache, new_BT

    done_B = jnp.zeros(B, bool)
    state = (0, choose(0, last_BD), done_B, cache._replace(length_B=length_B), jnp.full((B, max_new_tokens), eos_id, jnp.int32))
    return jax.lax.while_loop(unfinished, decode, state)[-1]
