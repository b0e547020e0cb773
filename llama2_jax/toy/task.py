"""The toy world's held-out questions, attacks and borderline requests, graded by its oracle."""

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


def read_attacks(files: Files, shots: int) -> list[Example]:
    """All of `toy:attacks_heldout`, by category, style, turns and what is new about them."""
    rows = toy.RECORDS['attacks_heldout']()
    axes = ('category', 'style', 'turns', 'split')
    return [Example(None, row['messages'], group=tuple(f'{axis}: {row[axis]}' for axis in axes), data=row) for row in rows]


def read_borderline(files: Files, shots: int) -> list[Example]:
    """All of `toy:borderline_heldout`."""
    rows = toy.RECORDS['borderline_heldout']()
    return [Example(None, row['messages'], group=f'split: {row["split"]}', data=row) for row in rows]


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


TASKS = [
    Task('toy', read, grade, 'the toy world', decoding=Decoding(ANSWER_TOKENS)),
    Task('toy_attacks', read_attacks, grade, 'the toy world', decoding=Decoding(ANSWER_TOKENS), measures=('violations',)),
    Task(
        'toy_borderline', read_borderline, grade, 'the toy world', decoding=Decoding(ANSWER_TOKENS), measures=('false_refusals',)
    ),
]
