"""Lists of instructions for Ghost Attention (paper p17): the toy world's, given ones, and those that a model is asked for."""

import re

from llama2_jax.config import UserError, nearest
from llama2_jax.data.instructions import Kind, Kinds
from llama2_jax.data.sources import read_records
from llama2_jax.toy.instructions import KINDS

# The paper's three kinds.
WORDINGS = {
    'hobby': (('You enjoy {v}.', 'Your hobby is {v}. Let it show in every answer.'), 'Hobby: {v}.'),
    'language': (('Speak in {v}.', 'Give all your answers in {v}.'), 'Language: {v}.'),
    'figure': (('Always act as {v} from now on.', 'You are {v}. Answer as {v} would.'), 'Figure: {v}.'),
}
# What a model is asked for their values, so that they are things it knows.
QUESTIONS = {
    'hobby': 'Write a list of 40 hobbies, one on each line, and nothing else.',
    'language': 'Write a list of 15 languages that you speak well, one on each line, and nothing else.',
    'figure': 'Write a list of 40 famous public figures of all times, one name on each line, and nothing else.',
}
LONGEST = 4  # words of a value; a longer line is talk


def read_constraints(source: str) -> Kinds:
    """Kinds of instructions: `toy`, or a source of rows {'kind', 'values'}; other kinds than the paper's give 'ways' and 'terse'.

    Raises:
      UserError: naming the row, and what is wrong with it.
    """
    if source == 'toy':  # capitals are spelled letter by letter: twenty turns of them would take half as much context again
        return {name: kind for name, kind in KINDS.items() if name != 'capitals'}
    kinds = {}
    for record in read_records(source):
        row, where = record.fields, record.where
        if not isinstance(row.get('kind'), str):
            raise UserError(f"{where} has no 'kind', such as {', '.join(map(repr, WORDINGS))}.")
        ways, terse = WORDINGS.get(row['kind'], ((), ''))
        ways, terse = row.get('ways', ways), row.get('terse', terse)
        if not ways or not terse:
            raise UserError(f"{where}: kind {row['kind']!r} needs 'ways' and 'terse' wordings; {nearest(row['kind'], WORDINGS)}")
        for name, texts in (('values', row.get('values')), ('ways', ways), ('terse', [terse])):
            if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise UserError(f'{where}: {name!r} is not a list of texts.')
            if name != 'values' and (bad := [text for text in texts if '{v}' not in text]):
                raise UserError(f'{where}: {bad[0]!r} in {name!r} has no {{v}}, where a value is to stand.')
        kinds[row['kind']] = Kind(tuple(row['values']), tuple(ways), terse)
    return kinds


def parse_list(text: str) -> list[str]:
    """The values of a list that a model wrote, one on each line.

    >>> parse_list('Sure! Here is a list of some hobbies:\\n1. Chess\\n- cooking.\\n* Chess')
    ['Chess', 'cooking']
    """
    lines = (re.sub(r'^\W*(\d+[.)])?\s*', '', line).rstrip(' .') for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line and len(line.split()) <= LONGEST and not line.endswith(':')))
