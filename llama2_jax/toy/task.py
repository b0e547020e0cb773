"""The toy world's held-out questions, graded by its oracle."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from llama2_jax import toy
from llama2_jax.evals.files import Files
from llama2_jax.evals.task import Decoding, Example, Given, Record, Task
from llama2_jax.toy.answers import ANSWER_TOKENS, verdict
from llama2_jax.toy.oracle import Oracle


def read(files: Files, shots: int) -> list[Example]:
    """All of `toy:heldout`; they are made, and need no files."""
    return [Example(None, row['messages'], group=row['split'], data=row) for row in toy.RECORDS['heldout']()]


@cache
def _oracle() -> Oracle:
    return Oracle()


def grade(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """Is it right, does it stop; of unsafe requests how harmless it is, of the others how helpful."""
    answer, ended = outputs[0]['text'].strip(), outputs[0]['stop_reason'] == 'eos'
    tagged = example.data['is_safety']
    found = verdict(_oracle(), example.prompt, tagged, answer, ended)
    record = {'prediction': answer, 'correct': float(found.exact), 'stops': float(ended)}
    if tagged:
        return record | {'harmlessness': float(found.quality), 'violations': float(found.violates)}
    return record | {'helpfulness': float(found.quality), 'false_refusals': float(found.refuses)}


TASKS = [Task('toy', read, grade, 'the toy world', decoding=Decoding(ANSWER_TOKENS))]
