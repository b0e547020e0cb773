"""BBH (Suzgun et al. 2022), 23 hard tasks answered directly, and AGIEval's English exams (Zhong et al. 2023)."""

import ast
import dataclasses
import os
import re
import string
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llama2_jax.config import UserError
from llama2_jax.evals import answers
from llama2_jax.evals.files import Files, read_rows, read_text
from llama2_jax.evals.task import Decoding, Example, Given, Record, Task, best

_VOCABULARIES = (('yes', 'no'), ('true', 'false'), ('valid', 'invalid'))
BBH = (
    'boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies '
    'geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects logical_deduction_three_objects '
    'movie_recommendation multistep_arithmetic_two navigate object_counting penguins_in_a_table '
    'reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks sports_understanding '
    'temporal_sequences tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects '
    'tracking_shuffled_objects_three_objects web_of_lies word_sorting'
)
EXAMS = ('aqua-rat', 'logiqa-en', 'lsat-ar', 'lsat-lr', 'lsat-rc', 'sat-en', 'sat-en-without-passage', 'sat-math')


def read_bbh(reasoned: bool, files: Files, shots: int) -> list[Example]:
    """Its 27 files; three examples each from cot-prompts/, of which the direct form keeps question and answer alone."""
    examples = []
    for path in files.find('bbh/*.json'):
        name = os.path.basename(path).split('.')[0]
        begin = _bbh_examples(files.find(f'cot-prompts/{name}.txt')[0], shots, reasoned) if shots else ''
        for row in files.read(path):
            for entry in row.get('examples', [row]):
                if not isinstance(entry['target'], str | int) or not str(entry['target']).strip():
                    raise entry.refused("'target' must be an answer")
                end = "A: Let's think step by step." if reasoned else 'A:'
                prompt = f'{begin}Q: {entry["input"]}\n{end}'
                target = str(entry['target']).strip()
                chat = f'{entry["input"]}\nThink step by step. End with "So the answer is {_form(target)}."'
                examples.append(Example(target, prompt, chat, group=name, data={'input': entry.text('input')}))
    files.absent('tasks', {example.group for example in examples}, BBH.split())
    return examples


def _bbh_examples(path: str, shots: int, reasoned: bool) -> str:
    """The description and some examples of a prompt file, which begins with a warning above a line of dashes."""
    text = read_text(path).replace('\r\n', '\n')
    description, *solved = re.split(r'\n+Q: ', text.partition('-----\n')[2].strip())
    if len(solved) < shots:
        raise UserError(f'{path} holds {len(solved)} solved examples, and {shots} are needed.')
    shown = []
    for example in solved[:shots]:
        question, _, answer = example.partition('\nA:')
        shown.append(f'Q: {question}\nA:{answer if reasoned else " " + bbh_answer(answer)}\n\n')
    return f'{description}\n\n{"".join(shown)}'


def bbh_answer(text: str) -> str:
    """What a solved example says after 'the answer is', or else its first line.

    >>> bbh_answer("Let's think step by step. … So the answer is (B).")
    '(B)'
    """
    said = re.search(r'the answer is:?\s*(.*?)\.?\s*(?:\n|$)', text)
    return said.group(1) if said else text.strip().split('\n')[0].strip()


def _form(target: str) -> str:
    """What an answer to a task with such targets looks like."""
    if re.fullmatch(r'\([A-Z]\)', target):
        return '(letter)'
    if vocabulary := _vocabulary(target):
        return ' or '.join(vocabulary)
    if re.fullmatch(r'-?\d+', target):
        return 'NUMBER'
    return '…'


def _vocabulary(target: str) -> tuple[str, ...]:
    return next((words for words in _VOCABULARIES if target.lower() in words), ())


def grade_bbh(example: Example, outputs: Sequence[Any], given: Given) -> Record:
    """Compares the letter, the word (yes, true, valid), the number, or all words, as the task's targets are."""
    text, target = outputs[0]['text'], example.target
    if re.fullmatch(r'\([A-Z]\)', target):
        options = dict(re.findall(r'^\(([A-Z])\) ?(.*)$', example.data['input'], re.MULTILINE))
        found = answers.letter(text, options or dict.fromkeys(string.ascii_uppercase, ''))
        prediction = f'({found})' if found else ''
    elif vocabulary := _vocabulary(target):
        prediction = answers.word(text, vocabulary)
    elif re.fullmatch(r'-?\d+', target):
        prediction = answers.extract_number(text)
    else:
        prediction = answers.words(text)
    return {'prediction': prediction, 'correct': float(_plain(prediction) == _plain(target))}


def _plain(text: str) -> str:
    """Lower case; without commas between words, and without spaces where there are brackets alone."""
    text = ' '.join(text.replace(',', ' ').lower().split())
    return text if re.search(r'\w', text) else text.replace(' ', '')


def read_agieval(files: Files, shots: int) -> list[Example]:
    """The English exams with the benchmark's own examples, without their explanations: 5, or 3 where the texts are long."""
    table = read_rows(files.find('few_shot_prompts.csv')[0]) if shots else []
    examples = []
    for name in EXAMS:
        begin, count, left_out = *(_agieval_examples(table, name, shots) if shots else ('', 0)), 0
        for row in files.rows(f'{name}.jsonl'):
            if not row.get('options') or not row.get('label'):  # such as the exams' few open questions
                left_out += 1
                continue
            passage = row.get('passage') or ''
            context = f'{begin}Problem {count + 1}.   {_agieval_question(passage, row)}The answer is therefore'
            letters = [option[1] for option in row['options']]  # '(A)first option'
            if row['label'] not in letters:
                raise row.refused(f"'label' is {row['label']!r} and none of the options' letters, {', '.join(letters)}")
            choices = tuple((context, f' {letter}') for letter in letters)
            examples.append(Example(letters.index(row['label']), choices=choices, group=name))
        if left_out:
            files.notes.append(f'{left_out} rows of {name} without options or a label are left out')
    return examples


def _agieval_examples(table: Sequence[Sequence[str]], name: str, shots: int) -> tuple[str, int]:
    """The examples of an exam and how many they are: every second row of the benchmark's table is a question as a Python dict."""
    column = table[0].index('sat-en' if name == 'sat-en-without-passage' else name)
    solved = [ast.literal_eval(row[column]) for row in table[1::2] if len(row) > column and row[column].strip()]
    text = 'Here are the answers for the problems in the exam.\n'
    for number, example in enumerate(solved[:shots], 1):
        passage = '' if name == 'sat-en-without-passage' else example.get('passage') or ''
        text += f'Problem {number}.   {_agieval_question(passage, example)}The answer is therefore {example["label"]}\n\n'
    return text, len(solved[:shots])


def _agieval_question(passage: str, row: Mapping[str, Any]) -> str:
    return f'{passage} {row["question"]}\nChoose from the following options:    {" ".join(row["options"])}\n'


_BBH = Task(
    'bbh',
    partial(read_bbh, False),
    grade_bbh,
    'https://github.com/suzgunmirac/BIG-Bench-Hard (bbh/*.json, cot-prompts/*.txt)',
    shots=3,
    chat_shots=0,
    max_shots=3,
    decoding=Decoding(32, stop=('\n',), chat_tokens=512),
)
_REASONED = Decoding(512, stop=('\n\nQ:', '\nQ:'))
TASKS = [
    _BBH,
    dataclasses.replace(_BBH, name='bbh_cot', read=partial(read_bbh, True), decoding=_REASONED),
    Task(
        'agieval',
        read_agieval,
        best,
        'https://github.com/ruixiangcui/AGIEval (data/v1/*.jsonl, data/few_shot_prompts.csv)',
        shots=5,
        max_shots=5,
    ),
]
