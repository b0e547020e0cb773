"""The commonsense group: what is likeliest per character, without examples, but for CommonsenseQA (recipe I.1)."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llama2_jax.config import UserError
from llama2_jax.evals import answers
from llama2_jax.evals.files import Files, Row, read_text
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


def _compared(row: Row, context: str, options: Sequence[str], label: int | str, first: int = 0) -> Example:
    """A question whose options' likelihoods are compared; labels count from `first`."""
    return Example(_place(row, label, len(options), first), choices=tuple((context, f' {option}') for option in options))


def _place(row: Row, label: int | str, count: int, first: int) -> int:
    """The right one of so many options.

    Raises:
      UserError: The label is no number of an option.
    """
    if str(label) not in map(str, range(first, first + count)):
        raise row.refused(f'the label must be a number from {first} to {first + count - 1}, and is {str(label)[:40]!r}')
    return int(label) - first


def read_piqa(files: Files, shots: int) -> list[Example]:
    """Goals and two ways to them; the labels lie in a file of their own."""
    rows = list(files.rows('piqa/**/valid.jsonl', 'physicaliqa*/dev.jsonl', tfds='piqa#validation'))
    labels = _labels(files, rows, 'piqa/**/valid-labels.lst', 'physicaliqa*/dev-labels.lst')
    return [
        _compared(row, f'Question: {row.text("goal")}\nAnswer:', (row.text('sol1'), row.text('sol2')), label)
        for row, label in zip(rows, labels, strict=True)
    ]


def _labels(files: Files, rows: Sequence[Row], *patterns: str) -> list[str]:
    if 'label' in rows[0]:
        return [row['label'] for row in rows]
    [path, *_] = files.find(*patterns)
    labels = read_text(path).split()
    if len(labels) != len(rows):
        raise UserError(f'{path} holds {len(labels)} labels for {len(rows)} questions.')
    return labels


def read_siqa(files: Files, shots: int) -> list[Example]:
    """Situations with a question; labels count from 1."""
    rows = list(files.rows('siqa/**/dev.jsonl', 'socialiqa*/dev.jsonl'))
    labels = _labels(files, rows, 'siqa/**/dev-labels.lst', 'socialiqa*/dev-labels.lst')
    return [
        _compared(
            row,
            f'{row.text("context")}\nQuestion: {row.text("question")}\nAnswer:',
            [row.text(f'answer{letter}') for letter in 'ABC'],
            label,
            first=1,
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
        examples.append(_compared(row, context, [tidy(ending) for ending in row['endings']], row['label']))
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
        before, blank, after = row.text('sentence').partition('_')
        if not blank:
            raise row.refused("'sentence' has no blank, '_'")
        target = _place(row, row['answer'], 2, 1) if 'answer' in row else _place(row, row['label'], 2, 0)
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
    return _compared(row, context, options, answer if isinstance(answer, int) else _index(row, labels))


def _index(row: Row, labels: Sequence[str]) -> int:
    if row['answerKey'] not in labels:
        raise row.refused(f"'answerKey' is {row['answerKey']!r}, and the labels of the options are {', '.join(map(str, labels))}")
    return labels.index(row['answerKey'])


def read_commonsenseqa(files: Files, shots: int) -> list[Example]:
    """After Wei et al.'s seven worked examples; the letter is drawn from the model's own reasoning."""
    begin = ''
    for question, options, reasoning, letter in COMMONSENSEQA[:shots]:
        begin += f'{_with_options(question, options)}A: {reasoning} So the answer is ({letter}).\n\n'
    examples = []
    for row in files.rows('dev_rand_split.jsonl'):
        labels, options = options_of(row)
        _index(row, labels)
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
        chat_shots=0,
        max_shots=len(COMMONSENSEQA),
        decoding=Decoding(256, stop=('\n\nQ:', '\nQ:'), chat_tokens=512),
    ),
]
