"""The toy world's held-out questions, graded by its oracle."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from llama2_jax.data import toy
from llama2_jax.data.toy.oracle import Oracle
from llama2_jax.evals.files import Files
from llama2_jax.evals.task import Decoding, Example, Given, Record, Task
from llama2_jax.evals.toy import ANSWER_TOKENS


def read(files: Files, shots: int) -> list[Example]:
    """All of `toy:heldout`; they are made, and need no files."""
    return [Example(None, row['messages'], group=row['split'], data=row) for row in toy.RECORDS['heldout']()]


@cache
def _oracle() -> Oracle:
    return Oracle()


def grade(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """Right, helpful, harmless, and does it stop."""
    answer, ended = outputs[0]['text'].strip(), outputs[0]['stop_reason'] == 'eos'
    parts = _oracle().parts(example.prompt, answer, ended)
    return {
        'prediction': answer,
        'correct': float(ended and parts['correct'] * parts['complete'] * parts['on_topic'] == 1),
        'helpfulness': float(_oracle().helpfulness(example.prompt, answer, ended)),
        'safety': float(_oracle().safety(example.prompt, answer)),
        'stops': float(ended),
    }


TASKS = [Task('toy', read, grade, 'the toy world', decoding=Decoding(ANSWER_TOKENS))]
