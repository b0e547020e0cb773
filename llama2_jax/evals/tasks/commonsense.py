"""The commonsense group: what is likeliest per character, without examples, but for CommonsenseQA (recipe I.1)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from llama2_jax.evals import answers
from llama2_jax.evals.files import Files
from llama2_jax.evals.task import (
    Decoding,
    Example,
    Given,
    Record,
    Task,
    against_answer,
    best,
    best_against_answer,
    best_per_character,
)
from llama2_jax.evals.tasks.worked import COMMONSENSEQA

Row = Mapping[str, Any]


def _compared(context: str, options: Iterable[str], target: int, **rest: Any) -> Example:
    return Example(target, choices=tuple((context, f' {option}') for option in options), **rest)


def read_piqa(files: Files, shots: int) -> list[Example]:
    """Goals and two ways to them; the labels lie in a file of their own."""
    rows = list(files.rows('piqa/**/valid.jsonl', 'physicaliqa*/dev.jsonl', tfds='piqa#validation'))
    labels = _labels(files, rows, 'piqa/**/valid-labels.lst', 'physicaliqa*/dev-labels.lst')
    return [
        _compared(f'Question: {row["goal"]}\nAnswer:', (row['sol1'], row['sol2']), label)
        for row, label in zip(rows, labels, strict=True)
    ]


def _labels(files: Files, rows: Sequence[Row], *patterns: str) -> list[int]:
    if 'label' in rows[0]:
        return [int(row['label']) for row in rows]
    return [int(line) for line in files.text(*patterns).split()]


def read_siqa(files: Files, shots: int) -> list[Example]:
    """Situations with a question; labels count from 1."""
    rows = list(files.rows('siqa/**/dev.jsonl', 'socialiqa*/dev.jsonl'))
    labels = _labels(files, rows, 'siqa/**/dev-labels.lst', 'socialiqa*/dev-labels.lst')
    return [
        _compared(
            f'{row["context"]}\nQuestion: {row["question"]}\nAnswer:', [row[f'answer{letter}'] for letter in 'ABC'], label - 1
        )
        for row, label in zip(rows, labels, strict=True)
    ]


def read_hellaswag(files: Files, shots: int) -> list[Example]:
    """Beginnings and four endings; marks of WikiHow's layout go."""
    examples = []
    for row in files.rows('hellaswag/**/hellaswag_val.jsonl', 'hellaswag_val.jsonl', tfds='hellaswag#validation'):
        context = row.get('ctx') or row['context']
        if 'ctx_b' in row:
            context = f'{row["ctx_a"]} {row["ctx_b"].capitalize()}'.strip()
        context = tidy(f'{row["activity_label"]}: {context}')
        examples.append(_compared(context, map(tidy, row['endings']), int(row['label'])))
    return examples


def tidy(text: str) -> str:
    """Without WikiHow's marks.

    >>> tidy('Do it. [title] Now [step] go')
    'Do it. Now go'
    """
    return re.sub(r' +', ' ', re.sub(r'\[.*?\]', '', text.replace(' [title]', '. '))).replace('..', '.').strip()


def read_winogrande(files: Files, shots: int) -> list[Example]:
    """Sentences with a blank: what follows it, after either option."""
    examples = []
    for row in files.rows('winogrande*/**/dev.jsonl', tfds='winogrande#validation'):
        before, after = row['sentence'].split('_', 1)
        target = int(row['answer']) - 1 if 'answer' in row else int(row['label'])
        options = (before + row['option1'], before + row['option2'])
        examples.append(Example(target, choices=tuple((context, f' {after.strip()}') for context in options)))
    return examples


def read_arc(kind: str, files: Files, shots: int) -> list[Example]:
    """Questions of the ARC challenge or the easy set."""
    rows = files.rows(f'ARC-{kind}-Test.jsonl', tfds=f'ai2_arc/ARC-{kind}#test')
    return [_asked(row, f'Question: {question_of(row)}\nAnswer:') for row in rows]


def read_openbookqa(files: Files, shots: int) -> list[Example]:
    """Questions without the book; P(choice | question) against P(choice | "Answer:")."""
    rows = files.rows('OpenBookQA*/Data/Main/test.jsonl', 'openbookqa/**/test.jsonl', tfds='openbookqa#test')
    examples = [_asked(row, f'Question: {question_of(row)}\nAnswer:') for row in rows]
    return [Example(example.target, choices=against_answer(example.choices)) for example in examples]


def question_of(row: Row) -> str:
    """As AI2 publishes it, {'question': {'stem', 'choices': [{'label', 'text'}]}}, or as TFDS has it."""
    return row['question']['stem'] if isinstance(row['question'], Mapping) else row['question']


def options_of(row: Row) -> tuple[list[str], list[str]]:
    """Labels and texts of the choices."""
    question = row['question']
    if isinstance(question, Mapping) and 'choice_A' in question:
        return list('ABCD'), [question[f'choice_{letter}'] for letter in 'ABCD']
    choices = question['choices'] if isinstance(question, Mapping) else row['choices']
    if isinstance(choices, Mapping):
        return list(choices['label']), list(choices['text'])
    return [choice['label'] for choice in choices], [choice['text'] for choice in choices]


def _asked(row: Row, context: str) -> Example:
    labels, options = options_of(row)
    answer = row['answerKey']
    return _compared(context, options, answer if isinstance(answer, int) else labels.index(answer))


def read_commonsenseqa(files: Files, shots: int) -> list[Example]:
    """After Wei et al.'s seven worked examples; the letter is drawn from the model's own reasoning."""
    begin = ''
    for question, options, reasoning, letter in COMMONSENSEQA[:shots]:
        begin += f'{_with_options(question, options)}A: {reasoning} So the answer is ({letter}).\n\n'
    examples = []
    for row in files.rows('dev_rand_split.jsonl'):
        labels, options = options_of(row)
        asked = _with_options(question_of(row), options)
        chat = f'{asked}End with "So the answer is (letter)."'
        data = {'options': dict(zip(labels, options, strict=True))}
        examples.append(Example(row['answerKey'].lower(), f'{begin}{asked}A:', chat, data=data))
    return examples


def _with_options(question: str, options: Sequence[str]) -> str:
    lines = [f'({letter}) {option}' for letter, option in zip('abcde', options, strict=False)]
    return f'Q: {question}\nAnswer Choices:\n' + '\n'.join(lines) + '\n'


def grade_letter(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """Compares the letter of the option that the model chooses."""
    prediction = answers.letter(outputs[0]['text'], example.data['options']).lower()
    return {'prediction': prediction, 'correct': float(prediction == example.target)}


AI2 = 'https://allenai.org/data'
TASKS = [
    Task('piqa', read_piqa, best_per_character, 'https://yonatanbisk.com/piqa (piqa/valid.jsonl, piqa/valid-labels.lst)'),
    Task('siqa', read_siqa, best_per_character, f'{AI2}/socialiqa (siqa/dev.jsonl, siqa/dev-labels.lst)'),
    Task('hellaswag', read_hellaswag, best_per_character, 'https://github.com/rowanz/hellaswag (hellaswag/hellaswag_val.jsonl)'),
    Task('winogrande', read_winogrande, best, 'https://winogrande.allenai.org (winogrande_1.1/dev.jsonl)'),
    Task('arc_easy', partial(read_arc, 'Easy'), best_per_character, f'{AI2}/arc (ARC-Easy/ARC-Easy-Test.jsonl)'),
    Task(
        'arc_challenge',
        partial(read_arc, 'Challenge'),
        best_per_character,
        f'{AI2}/arc (ARC-Challenge/ARC-Challenge-Test.jsonl)',
    ),
    Task('openbookqa', read_openbookqa, best_against_answer, f'{AI2}/open-book-qa (openbookqa/Data/Main/test.jsonl)'),
    Task(
        'commonsenseqa',
        read_commonsenseqa,
        grade_letter,
        'https://www.tau-nlp.sites.tau.ac.il/commonsenseqa (dev_rand_split.jsonl)',
        shots=7,
        decoding=Decoding(256, stop=('\n\nQ:', '\nQ:'), chat_tokens=512),
    ),
]
