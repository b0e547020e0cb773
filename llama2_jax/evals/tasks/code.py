"""HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021): programs that a model writes are run against their tests."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama2_jax.evals.files import Files
from llama2_jax.evals.sandbox import Program
from llama2_jax.evals.task import Decoding, Example, Given, Record, Task, passes
from llama2_jax.evals.tasks.programs import before, program

MBPP_SHOTS = (2, 3, 4)  # their task ids, as in the paper of MBPP
MBPP_TEST = range(11, 511)


def read_humaneval(files: Files, shots: int) -> list[Example]:
    """Its 164 problems."""
    chat = 'Complete this Python function; answer with the whole function.\n```python\n{}```'
    examples = []
    for row in files.rows('humaneval/**/HumanEval.jsonl', 'HumanEval.jsonl'):
        prompt, name, _ = row.text('prompt'), row.text('entry_point'), row.text('test')
        if not re.search(rf'^(?:async )?def {re.escape(name)}\b', prompt, re.MULTILINE):
            raise row.refused(f"'prompt' does not define {name!r}, the 'entry_point'")
        examples.append(Example(None, prompt, chat.format(prompt), data=row))
    return examples


def humaneval_program(example: Example, text: str) -> Program:
    """A completion of the prompt, or a chat model's answer, and the tests, which use the prompt's own helpers."""
    row = example.data
    name = row['entry_point']
    tests = f'{before(row["prompt"], [name])}\n{row["test"]}\ncheck({name})\n'
    return Program(program(row['prompt'], text, [name]), tests, (name,))


def read_mbpp(files: Files, shots: int) -> list[Example]:
    """The 500 problems of its test part; the examples before them are its own numbers 2, 3 and 4."""
    rows = {}
    for row in files.rows('mbpp/**/mbpp.jsonl', 'mbpp.jsonl'):
        if not row.text('text') or not asked_functions(row):
            raise row.refused("'code' defines no function that 'test_list' calls")
        rows[int(row['task_id'])] = row
    begin = ''.join(f'{mbpp_question(rows[number])}{rows[number]["code"]}\n[DONE]\n' for number in MBPP_SHOTS[:shots])
    chat = '{} Answer with a Python function. Your code should pass these tests:\n\n{}'
    return [
        Example(None, begin + mbpp_question(row), chat.format(row['text'], '\n'.join(row['test_list'])), data=row)
        for number, row in rows.items()
        if number in MBPP_TEST
    ]


def mbpp_question(row: Mapping[str, Any]) -> str:
    """A problem in the words of its paper."""
    tests = '\n'.join(row['test_list'])
    return (
        f'You are an expert Python programmer, and here is your task: {row["text"]} '
        f'Your code should pass these tests:\n\n{tests}\n[BEGIN]\n'
    )


def mbpp_program(example: Example, text: str) -> Program:
    """A function and its tests."""
    row = example.data
    tests = '\n'.join([row.get('test_setup_code', ''), *row['test_list']])
    classes = re.findall(r'^class (\w+)', row['code'], re.MULTILINE)
    asked = asked_functions(row)
    return Program(program('', text, asked), tests, (*asked, *classes))


def asked_functions(row: Mapping[str, Any]) -> list[str]:
    """The functions of a problem's own solution that its tests call."""
    tests = '\n'.join(row['test_list'])
    return [name for name in re.findall(r'^def (\w+)', row['code'], re.MULTILINE) if re.search(rf'\b{name}\b', tests)]


def grade(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """How often the tests pass."""
    outcomes = list(given['program'])
    return {'prediction': outcomes} | passes([outcome == 'passed' for outcome in outcomes])


# Temperatures and top-p of the paper (p49); 200 samples are Chen et al.'s.
_DECODING = Decoding(512, temperature=0.1, top_p=0.95, chat_tokens=1024)
_HUMANEVAL = Task(
    'humaneval',
    read_humaneval,
    grade,
    'https://github.com/openai/human-eval (humaneval/HumanEval.jsonl.gz)',
    decoding=Decoding(
        512, stop=('\nclass', '\ndef', '\n#', '\nif', '\nprint', '\n@'), temperature=0.1, top_p=0.95, chat_tokens=1024
    ),
    helpers={'program': humaneval_program},
    requires=('program',),
)
_MBPP = Task(
    'mbpp',
    read_mbpp,
    grade,
    'https://github.com/google-research/google-research/tree/master/mbpp (mbpp/mbpp.jsonl)',
    shots=3,
    chat_shots=0,
    max_shots=3,
    decoding=dataclasses.replace(_DECODING, stop=('[DONE]',)),
    helpers={'program': mbpp_program},
    requires=('program',),
)


def _many(task: Task, k: int) -> Task:
    decoding = dataclasses.replace(task.decoding, temperature=0.8, samples=200)
    return dataclasses.replace(task, name=f'{task.name}_pass{k}', decoding=decoding, measures=(f'pass@{k}', 'correct'))


TASKS = [_HUMANEVAL, _many(_HUMANEVAL, 100), _MBPP, _many(_MBPP, 80)]
