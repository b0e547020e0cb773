"""Memory of rejection sampling by the number of answers: a stand-in policy and rewards, everything else as in a run.

python benchmarks/rejection_memory.py

Each size runs in a process of its own; the figure is the most memory that the process held.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags
from etils.epath import Path

from llama2_jax.data.prompts import PromptConfig
from llama2_jax.inference.engine import Sample
from llama2_jax.rl import rejection
from llama2_jax.rl.rejection import RejectionConfig
from llama2_jax.rl.rewards import Rewards, RewardsConfig
from llama2_jax.text.tokenizer import train_tokenizer

ANSWERS = flags.DEFINE_multi_integer('answers', [1_000, 100_000], 'How many, in turn.')
ONLY = flags.DEFINE_bool('only', False, 'Runs the first of --answers in this process.')
SAMPLES, TOKENS = 20, 50  # answers to a prompt, tokens of an answer


class Stand:
    """A policy that draws random bytes and a reward model that scores at random."""

    def __init__(self, tokenizer):
        self.tokenizer, self._random = tokenizer, random.Random(0)

    def generate(self, requests):
        """Samples of each request."""
        for request in requests:
            yield [self._sample() for _ in range(request.num_samples)]

    def _sample(self) -> Sample:
        ids = [3 + self._random.randrange(97, 123) for _ in range(TOKENS)]
        logprobs = [-self._random.random() for _ in range(TOKENS + 1)]
        return Sample(self.tokenizer.decode(ids), [*ids, self.tokenizer.eos_id], logprobs, 'eos')

    def score(self, rows) -> np.ndarray:
        """A number for each row."""
        return np.array([self._random.random() for _ in rows], np.float32)


def measure(answers: int) -> float:
    """Gigabytes at the most."""
    with tempfile.TemporaryDirectory() as home:
        texts = [f'What is {i} and {j}?' for i in range(-(-answers // SAMPLES // 50)) for j in range(50)]
        rows = (json.dumps({'messages': [{'role': 'user', 'content': text}]}) for text in [*texts, 'Held out?', 'Or that?'])
        Path(home, 'prompts.jsonl').write_text('\n'.join(rows))
        tokenizer = train_tokenizer(['What is this? abc defg'] * 20, Path(home, 'tokenizer.model'), 280)
        stand = Stand(tokenizer)
        rejection.open_engine = lambda *_: stand
        rejection.open_rewards = lambda config, tokenizer: Rewards(stand, stand, config, tokenizer)
        config = RejectionConfig(
            rewards=RewardsConfig('help', 'safe'),
            prompts=PromptConfig(mixture=f'jsonl:{home}/prompts.jsonl', heldout=0.03),
            samples=SAMPLES,
            temperatures=(1.0,),
        )
        rejection.sample_and_choose(config, Path(home))
        lines = sum(1 for _ in Path(home, 'choices.jsonl').open())
        print(f'{lines:,} choices')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(argv: list[str]) -> None:
    """Prints the memory of each size."""
    if ONLY.value:
        print(f'{ANSWERS.value[0]:,} answers: {measure(ANSWERS.value[0]):.3f} GB')
        return
    for answers in ANSWERS.value:
        subprocess.run([sys.executable, argv[0], f'--answers={answers}', '--only'], check=True)


if __name__ == '__main__':
    app.run(main)
