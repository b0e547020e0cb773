"""GSM8K (Cobbe et al. 2021) after Wei et al.'s eight worked examples, and MATH (Hendrycks et al. 2021) after Minerva's four."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import llama2_jax.evals.tasks.latex as latex
from llama2_jax.evals.answers import extract_number
from llama2_jax.evals.files import Files
from llama2_jax.evals.task import Decoding, Example, Given, Record, Task, votes
from llama2_jax.evals.tasks.worked import GSM8K, MATH

SUBJECTS = 'algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus'


def read_gsm8k(files: Files, shots: int) -> list[Example]:
    """Its test questions, or the file of this set that is there."""
    begin = ''.join(f'Q: {question}\nA: {answer}\n\n' for question, answer in GSM8K[:shots])
    rows = files.rows('gsm8k/**/test.jsonl', 'grade_school_math/**/test.jsonl', 'gsm8k/**/*.jsonl', tfds='gsm8k#test')
    examples = []
    for row in rows:
        question, target = row.text('question'), extract_number(row.text('answer'))
        if not target:
            raise row.refused("'answer' holds no number")
        examples.append(Example(target, f'{begin}Q: {question}\nA:', f'{question}\nEnd with "The answer is NUMBER."'))
    return examples


def grade_gsm8k(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """The number that most samples end with."""
    return votes([extract_number(output['text']) for output in outputs], lambda answer: answer == example.target)


def read_math(files: Files, shots: int) -> list[Example]:
    """The test problems of all seven subjects."""
    begin = ''.join(f'Problem:\n{problem}\n\nSolution:\n{solution}\n\n' for problem, solution in MATH[:shots])
    examples = []
    paths = files.find('MATH/test/*/*.json', 'math/test/*/*.json')
    for path in paths:
        for row in files.read(path):
            problem, target = row.text('problem'), latex.normalise(latex.boxed(row.text('solution')))
            if not target:
                raise row.refused("'solution' has nothing in a \\boxed{}")
            chat = f'{problem}\nPut the final answer in \\boxed{{}}.'
            examples.append(Example(target, f'{begin}Problem:\n{problem}\n\nSolution:', chat, group=_subject(path)))
    files.absent('subjects', set(map(_subject, paths)), SUBJECTS.split())
    return examples


def _subject(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def grade_math(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """The final answer that most samples give."""
    return votes([latex.final_answer(output['text']) for output in outputs], lambda answer: answer == example.target)


_GSM8K = Task(
    'gsm8k',
    read_gsm8k,
    grade_gsm8k,
    'https://github.com/openai/grade-school-math (gsm8k/test.jsonl)',
    shots=8,
    max_shots=len(GSM8K),
    decoding=Decoding(512, stop=('\n\nQ:', '\nQ:')),
)
_MATH = Task(
    'math',
    read_math,
    grade_math,
    'https://people.eecs.berkeley.edu/~hendrycks/MATH.tar (MATH/test)',
    shots=4,
    max_shots=len(MATH),
    decoding=Decoding(512, stop=('\nProblem:', '\n\n\n'), chat_tokens=1024),
)
TASKS = [
    _GSM8K,
    dataclasses.replace(_GSM8K, name='gsm8k_maj', decoding=dataclasses.replace(_GSM8K.decoding, temperature=0.7, samples=40)),
    _MATH,
    dataclasses.replace(_MATH, name='math_maj', decoding=dataclasses.replace(_MATH.decoding, temperature=0.7, samples=40)),
]
