"""How near multiple choice comes to the matrix products that it needs: MMLU's prompts, random weights in a 1B model's shapes.

python benchmarks/evaluation_speed.py --data_dir=benchmarks_data --layers=16

The bound is the time of the products alone for every token that must be read once: examples once a subject, then each question's
own tokens; and, beside it, of a plain forward pass over every prompt whole. Seconds are also given as processor time, which on a
busy machine says more than the clock.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from llama2_jax.config import ModelConfig
from llama2_jax.evals.files import Files
from llama2_jax.evals.tasks import TASKS
from llama2_jax.model.engine import Engine
from llama2_jax.model.llama import Llama
from llama2_jax.runtime import start

DATA_DIR = flags.DEFINE_string('data_dir', None, 'Holds mmlu.', required=True)
LAYERS = flags.DEFINE_integer('layers', 16, 'Of the model; 16 make 0.95B parameters.')
QUESTIONS = flags.DEFINE_integer('questions', 24, 'Of each of two subjects.')
SUBJECTS = ('high_school_biology', 'professional_psychology')


class Words:
    """A tokenizer of a kind: a number for each word, about as many tokens as LLaMA 2's has."""

    unk_id, bos_id, eos_id, vocab_size = 0, 1, 2, 32000

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
    whole = sum(len(question[0][0]) for question in questions)
    prefixes: set[tuple[int, ...]] = set()
    for question in questions:
        prefixes |= {tuple(question[0][0][:stop]) for stop in range(1, len(question[0][0]) + 1)}
    needed = len(prefixes)
    engine = Engine(Llama(config, jax.random.key(0)), Words(), batch_size=8)
    matrices = config.layers * (4 * config.dim * config.heads * config.head_dim + 3 * config.dim * config.hidden)
    x, w = jnp.ones((2048, config.dim)), jnp.ones((config.dim, config.hidden))
    product = jax.jit(lambda x, w: x @ w)
    repeats = max(round(needed * matrices / x.size / config.hidden), 1)

    def products() -> None:
        for _ in range(repeats):
            product(x, w).block_until_ready()

    def score() -> None:
        assert len(dict(engine.log_likelihoods(questions))) == len(questions)

    products(), score()  # compiled
    bound, ours = (np.min([clocked(work) for _ in range(3)], axis=0) for work in (products, score))
    bound = bound * needed * matrices / (repeats * x.size * config.hidden)
    print(f'{config.parameters:,} parameters; {len(questions)} questions of {whole:,} tokens, {needed:,} of which differ')
    for name, b, o in zip(('clock', 'processors'), bound, ours, strict=True):
        print(f'{name}: products {b:.2f} s, questions {o:.2f} s: {b / o:.0%} of the bound')
        print(f'  {b * whole / needed / o:.0%} of the bound of reading every prompt whole')


if __name__ == '__main__':
    app.run(main)
