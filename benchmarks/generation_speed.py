"""Generation on a CPU: our engine beside transformers with torch, and beside ourselves without continuous batching.

python benchmarks/generation_speed.py --rounds=3

dim 288, 6 layers, vocabulary 32,000, float32, random weights (the same on both sides), no EOS. Each round times every
case of both sides, one after the other; a Markdown table of the medians of the rounds' ratios.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers
from absl import app, flags

from llama2_jax.config import ModelConfig
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.mesh import decoding_mesh
from llama2_jax.model.llama import Llama

_ROUNDS = flags.DEFINE_integer('rounds', 3, 'How often each case is timed.')
_CASES = flags.DEFINE_string('cases', '', 'Only cases whose name holds this.')

CONFIG = ModelConfig(vocab_size=32_000, dim=288, layers=6, heads=6, kv_heads=6, head_dim=48, hidden=768, context=512)


class Silent:
    """A tokenizer in which nothing ends a text, and nothing is shown."""

    eos_id, bos_id, stop_ids, vocab_size = -1, 1, (), CONFIG.vocab_size

    def decode(self, ids: list[int]) -> str:
        """No text."""
        return ''


def theirs() -> transformers.LlamaForCausalLM:
    """The same shape in transformers; what the weights are does not matter to the time."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.dim,
            intermediate_size=CONFIG.hidden,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            max_position_embeddings=CONFIG.context,
            tie_word_embeddings=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


def cases() -> dict[str, tuple[Callable[[], int], Callable[[], int]]]:
    """Name -> ours and the other side; each generates and returns how many tokens."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, CONFIG.vocab_size, (16, 32)).tolist()
    mesh = decoding_mesh(CONFIG, jax.devices()[:1])
    model = Llama(CONFIG, jax.random.key(0))
    engine = Engine(model, Silent(), mesh=mesh, batch_size=16)
    peer = theirs()

    def ours(rows: int, **settings) -> Callable[[], int]:
        requests = [Request(prompt, 128, seed=n, **settings) for n, prompt in enumerate(prompts[:rows])]
        return lambda: sum(len(sample.token_ids) for [sample] in engine.generate(requests))

    def transformers_(rows: int, **settings) -> Callable[[], int]:
        tokens = torch.tensor(prompts[:rows])

        def run() -> int:
            with torch.inference_mode():
                out = peer.generate(tokens, max_new_tokens=128, min_new_tokens=128, **settings)
            return (out.shape[1] - tokens.shape[1]) * rows

        return run

    # Answers are long and short as those of people are: log-normal, 1 to 256 tokens.
    lengths = np.clip(rng.lognormal(4, 0.8, 256).astype(int), 1, 256)
    queue = [Request(rng.integers(3, 32_000, rng.integers(4, 64)).tolist(), int(length), temperature=0) for length in lengths]

    def continuous() -> int:
        return sum(len(sample.token_ids) for [sample] in engine.generate(queue))

    def static() -> int:
        """Sixteen at a time; the next sixteen when the last of them is done."""
        batches = (queue[first : first + 16] for first in range(0, len(queue), 16))
        return sum(len(sample.token_ids) for batch in batches for [sample] in engine.generate(batch))

    sampling = {'temperature': 0.8, 'top_p': 0.9}
    return {
        '16 × 128, greedy': (ours(16, temperature=0), transformers_(16, do_sample=False)),
        '16 × 128, top-p 0.9': (ours(16, **sampling), transformers_(16, do_sample=True, top_k=0, **sampling)),
        '1 × 128, greedy': (ours(1, temperature=0), transformers_(1, do_sample=False)),
        'queue of 256, continuous against static batches of 16': (continuous, static),
    }


@dataclasses.dataclass
class Timed:
    """Tokens per second of wall time and of CPU time."""

    wall: float
    cpu: float


def timed(run: Callable[[], int]) -> Timed:
    """One run of a case."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return Timed(tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu))


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    print('| case | ours, tokens/s | other | ratio | ratio per CPU second |\n|---|---|---|---|---|')
    for name, (ours, other) in cases().items():
        if _CASES.value not in name:
            continue
        ours(), other()  # compiles, and warms up
        rounds = [(timed(ours), timed(other)) for _ in range(_ROUNDS.value)]
        walls = [statistics.median(side.wall for side in sides) for sides in zip(*rounds, strict=True)]
        ratio = statistics.median(a.wall / b.wall for a, b in rounds)
        cpu = statistics.median(a.cpu / b.cpu for a, b in rounds)
        print(f'| {name} | {walls[0]:,.0f} | {walls[1]:,.0f} | {ratio:.2f} | {cpu:.2f} |', flush=True)


if __name__ == '__main__':
    app.run(main)
