"""What a run shows of itself: held-out loss of each source, and what the model writes."""

import math
from collections.abc import Callable
from typing import Any

import jax

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.data.pretrain import Batch, PretrainData
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.runtime import log
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.step import State

LossAndTokens = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]  # (parameters, batch) -> nats, number of targets


def make_evaluate(data: PretrainData, loss_and_tokens: LossAndTokens, batches: int) -> Callable[[State], dict[str, float]] | None:
    """Held-out loss and bits per byte of each source, and their mean under the mixture's weights; None if nothing is held out.

    `batches` are read of each source; 0: all there are.
    """
    sources = [(index, source) for index, source in enumerate(data.sources) if source.heldout_tokens]
    if not sources:
        log('Nothing is held out: the sources are too small.')
        return None

    def evaluate(state: State) -> dict[str, float]:
        figures, mean, weight = {}, 0.0, 0.0
        for index, source in sources:
            nats = tokens = 0.0
            for number, batch in enumerate(data.heldout(index), start=1):
                loss, count = loss_and_tokens(state.params, batch)
                nats, tokens = nats + float(loss), tokens + float(count)
                if number == batches:
                    break
            figures[f'heldout/{source.name}/loss'] = nats / tokens
            bytes_a_token = source.heldout_bytes / source.heldout_tokens
            figures[f'heldout/{source.name}/bits_per_byte'] = nats / tokens / math.log(2) / bytes_a_token
            mean, weight = mean + source.weight * nats / tokens, weight + source.weight
        return {'heldout/loss': mean / weight, **figures}

    return evaluate


def make_sample(
    prompts: tuple[str, ...], config: ModelConfig, compute: ComputeConfig, tokenizer: Tokenizer
) -> Callable[[State], str]:
    """A function that continues the prompts, as Markdown.

    Raises:
      UserError: a prompt fills the model's context.
    """
    prompts = [tokenizer.encode(prompt, bos=True, eos=False) or [tokenizer.bos_id] for prompt in prompts]
    if max(map(len, prompts)) >= config.context:
        raise UserError(f'The longest of prompts fills the context of {config.context} tokens.')
    requests = [Request(prompt, max_new_tokens=128, temperature=0.8, top_p=0.95) for prompt in prompts]

    def sample(state: State) -> str:
        engine = Engine(state.params, tokenizer, batch_size=len(requests), dtype=compute.dtype)
        texts = [tokenizer.decode(prompt) + new.text for prompt, [new] in zip(prompts, engine.generate(requests), strict=True)]
        return '\n\n'.join(f'> {text}'.replace('\n', '\n> ') for text in texts)

    return sample
