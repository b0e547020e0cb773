"""The toy world's exact grades of a model's answers: is it right, and does it stop?"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from llama2_jax.data import toy
from llama2_jax.data.toy.oracle import Oracle
from llama2_jax.model.engine import Engine, Request
from llama2_jax.text.dialog import encode_prompt

LEARNABLE = ('phrasings', 'combinations')  # splits
ANSWER_TOKENS = 96  # the longest perfect answer of the world has fewer


def grade(engine: Engine, rows: Iterable[Mapping[str, Any]] | None = None) -> dict[str, float]:
    """Greedy answers to prompts of the toy world, graded by its oracle.

    Args:
      engine: of the model.
      rows: prompts {'messages', 'split'}; by default all of `toy:heldout`.

    Returns:
      For each split, and for the questions whose facts or words training does show apart ('learnable': the splits 'phrasings'
      and 'combinations'): 'toy/SPLIT/exact', the share of answers that say all that was asked for and nothing false, refusals
      with the right reason and a safe way where that is the right answer; and 'toy/stops', the share that ends with EOS.
    """
    rows, oracle = list(toy.RECORDS['heldout']() if rows is None else rows), Oracle()
    prompts = [encode_prompt(row['messages'], engine.tokenizer) for row in rows]
    requests = [Request(prompt, max_new_tokens=ANSWER_TOKENS, temperature=0.0, answer=True) for prompt in prompts]
    exact, stops = collections.defaultdict(list), []
    for row, [sample] in zip(rows, engine.generate(requests), strict=True):
        ended = sample.stop_reason == 'eos'
        parts = oracle.parts(row['messages'], sample.text.strip(), ended)
        right = ended and parts['correct'] * parts['complete'] * parts['on_topic'] == 1
        stops.append(ended)
        exact[row['split']].append(right)
        if row['split'] in LEARNABLE:
            exact['learnable'].append(right)
    return {f'toy/{split}/exact': sum(good) / len(good) for split, good in sorted(exact.items())} | {
        'toy/stops': sum(stops) / len(stops)
    }
