"""MMLU (Hendrycks et al. 2021): 57 subjects, the letters' likelihoods after five solved questions of the subject."""

import os
from collections.abc import Sequence

from llama2_jax.config import UserError, nearest
from llama2_jax.evals.files import Files, numbered_rows
from llama2_jax.evals.task import Example, Task, best

LETTERS = 'ABCD'
HOME = 'https://people.eecs.berkeley.edu/~hendrycks/data.tar (mmlu/dev, mmlu/test)'
# The benchmark's own four categories (its categories.py): subject -> category.
CATEGORIES = {
    'stem': 'abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics '
    'college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology '
    'high_school_chemistry high_school_computer_science high_school_mathematics high_school_physics high_school_statistics '
    'machine_learning',
    'humanities': 'formal_logic high_school_european_history high_school_us_history high_school_world_history '
    'international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law '
    'world_religions',
    'social': 'econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics '
    'high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations '
    'security_studies sociology us_foreign_policy',
    'other': 'anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing '
    'medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology',
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}


def ask(row: Sequence[str], answer: bool) -> str:
    """A question as the benchmark's own code writes it; with its answer, or ready for it."""
    question, *options, letter = row
    lines = [question, *(f'{name}. {option}' for name, option in zip(LETTERS, options, strict=True))]
    return '\n'.join(lines) + '\nAnswer:' + (f' {letter}\n\n' if answer else '')


def read(files: Files, shots: int) -> list[Example]:
    """The test questions; of the val split where there is no test split."""
    solved = {subject_of(path): _rows(path) for path in files.find('dev/*_dev.csv')} if shots else {}
    examples = []
    paths = files.find('test/*_test.csv', 'val/*_val.csv')
    for path in paths:
        subject = subject_of(path)
        begin = f'The following are multiple choice questions (with answers) about {subject.replace("_", " ")}.\n\n'
        begin += ''.join(ask(row, answer=True) for row in solved.get(subject, [])[:shots])
        for row in _rows(path):
            context = begin + ask(row, answer=False)
            choices = tuple((context, f' {letter}') for letter in LETTERS)
            examples.append(Example(LETTERS.index(row[-1]), choices=choices, group=CATEGORY[subject], data={'subject': subject}))
    if few := sorted(subject for subject in map(subject_of, paths) if len(solved.get(subject, [])) < shots):
        files.notes.append(f'dev/ has fewer than {shots} solved examples of {", ".join(few)}')
    files.absent('subjects', set(map(subject_of, paths)), CATEGORY)
    return examples


def _rows(path: str) -> list[list[str]]:
    """The questions of a subject: question, four options, and the letter of the right one.

    Raises:
      UserError: A row is something else, or there is none; or no such subject.
    """
    if (subject := subject_of(path)) not in CATEGORY:
        raise UserError(f'{path}: MMLU has no subject {subject!r}; {nearest(subject, CATEGORY)}')
    rows = []
    for where, row in numbered_rows(path):
        row = [cell.strip() if number == 5 else cell for number, cell in enumerate(row)]
        if len(row) != 6 or row[5] not in tuple(LETTERS):
            raise UserError(
                f'{where} is not a question of MMLU: it must have 6 cells, of which the last is A, B, C or D, and has '
                f'{len(row)} that end with {row[-1][:40]!r}. Files have no header, and letters for answers, as in {HOME}.'
            )
        rows.append(row)
    if not rows:
        raise UserError(f'{path} holds no rows.')
    return rows


def subject_of(path: str) -> str:
    """'…/anatomy_dev.csv' -> 'anatomy'."""
    return os.path.basename(path).split('.')[0].rpartition('_')[0]


TASKS = [Task('mmlu', read, best, HOME, shots=5, max_shots=5)]
