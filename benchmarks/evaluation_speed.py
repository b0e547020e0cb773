"""How near multiple choice comes to the matrix products that it needs: MMLU's prompts, random weights in a 1B model's shapes.

python benchmarks/evaluation_speed.py --data_dir=benchmarks_data --layers=16

The bound is the time of the matrix products alone, of activations with weights and of attention, for every token that must be
read once: examples once a subject, then each question's own tokens; beside it that of the products with weights only, and that of
a plain forward pass over every prompt whole. Seconds are also given as processor time, which on a busy machine says more than the
clock.
"""

import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from llama2_jax.config import ModelConfig
from llama2_jax.evals.files import Files
from llama2_jax.evals.tasks import TASKS
from llama2_jax.inference.engine import Engine
from llama2_jax.model.llama import Llama
from llama2_jax.runtime import start
from llama2_jax.text.template import PromptFormat

DATA_DIR = flags.DEFINE_string('data_dir', None, 'Holds mmlu.', required=True)
LAYERS = flags.DEFINE_integer('layers', 16, 'Of the model; 16 make 0.95B parameters.')
QUESTIONS = flags.DEFINE_integer('questions', 24, 'Of each of two subjects.')
SUBJECTS = ('high_school_biology', 'professional_psychology')


class Words:
    """A tokenizer of a kind: a number for each word, about as many tokens as LLaMA 2's has."""

    unk_id, bos_id, eos_id, stop_ids, vocab_size, prompts = 0, 1, 2, (), 32000, PromptFormat()

    def encode(self, text: str) -> list[int]:
        """Ids, BOS first."""
        return [1, *(3 + hash(word) % 31000 for word in text.replace('\n', ' \n ').split(' '))]


def clocked(work) -> tuple[float, float]:
    """Seconds of the clock, and of all processors."""
    began = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - began[0], time.process_time() - began[1]


def main(argv: list[str]) -> None:
    """Measures, products and questions by turns."""
    start()
    config = ModelConfig(
        vocab_size=32000, dim=2048, layers=LAYERS.value, heads=32, kv_heads=32, head_dim=64, hidden=5632, context=2048
    )
    examples = TASKS['mmlu'].read(Files(DATA_DIR.value), 5)
    encode = Words().encode
    questions = []
    for subject in SUBJECTS:
        chosen = [example for example in examples if example.data['subject'] == subject][: QUESTIONS.value]
        questions += [[(encode(example.choices[0][0]), [letter]) for letter in (5, 6, 7, 8)] for example in chosen]
    prompts = [question[0][0] for question in questions]
    once = sorted({tuple(prompt[:stop]) for prompt in prompts for stop in range(1, len(prompt) + 1)}, key=len)
    engine = Engine(Llama(config, jax.random.key(0)), Words(), batch_size=8)
    matrices = config.layers * (4 * config.dim * config.heads * config.head_dim + 3 * config.dim * config.hidden)
    attention = config.layers * 2 * config.heads * config.head_dim  # for each key that a token sees

    def multiplications(lengths: Iterable[int], seen: int = attention) -> int:
        """In a forward pass that reads one token after so many, itself included."""
        return sum(matrices + seen * length for length in lengths)

    bounds = {
        'every token that differs': multiplications(map(len, once)),
        'the same, weights alone': multiplications(map(len, once), 0),
        'every prompt whole': multiplications(stop for prompt in prompts for stop in range(1, len(prompt) + 1)),
    }
    x, w = jnp.ones((2048, config.dim)), jnp.ones((config.dim, config.hidden))
    product = jax.jit(lambda x, w: x @ w)
    repeats = 60

    def products() -> None:
        for _ in range(repeats):
            product(x, w).block_until_ready()

    def score() -> None:
        assert len(dict(engine.log_likelihoods(questions))) == len(questions)

    products(), score()  # compiled
    rounds = [(clocked(products), clocked(score)) for _ in range(3)]
    rate, ours = (np.min(seconds, axis=0) for seconds in zip(*rounds, strict=True))
    rate /= repeats * x.size * config.hidden
    print(f'{config.parameters:,} parameters, {len(prompts)} questions: {sum(map(len, prompts)):,} tokens, {len(once):,} once')
    for name, seconds, taken in zip(('clock', 'processors'), rate, ours, strict=True):
        print(f'{name}: {taken:.1f} s')
        for what, count in bounds.items():
            print(f'  {what}: products take {seconds * count:.1f} s, {seconds * count / taken:.0%} of it')


if __name__ == '__main__':
    app.run(main)
