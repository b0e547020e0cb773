"""System instructions that hold for a whole dialog (Ghost Attention, paper p16): wordings, terse ones too, and exact grading.

Four kinds, freely combined: a last word, a craft to speak as, a hobby to mention, and capitals.
"""

import re
from collections.abc import Sequence

from llama2_jax.data.instructions import Instruction, Kind
from llama2_jax.toy.world import CRAFTS

WORDS = ('Ahoy', 'Hurray', 'Amen', 'Farewell', 'Hello', 'Moon', 'Star', 'Sea')
HOBBIES = ('singing', 'fishing', 'dancing', 'cooking', 'riding', 'reading', 'swimming', 'painting')
ROLES = tuple(craft.name for craft in CRAFTS)

KINDS = {
    'word': Kind(WORDS, ('Always end your answer with the word {v}.', 'The last word of every answer must be {v}.'), 'End: {v}.'),
    'role': Kind(ROLES, ('Always speak as the {v}.', 'From now on you are the {v}.'), 'Role: {v}.'),
    'hobby': Kind(HOBBIES, ('You love {v}. Always say so.', 'In every answer, say that you love {v}.'), 'Hobby: {v}.'),
    'capitals': Kind(('capitals',), ('Always answer in {v}.', 'Write every answer in {v}.'), 'Style: {v}.'),
}


_WORDINGS = [
    (re.compile(re.escape(way).replace(r'\{v\}', f'({"|".join(values)})') + r'\s*'), kind)
    for kind, (values, ways, terse) in KINDS.items()
    for way in (*ways, terse)
]


def parse(text: str) -> tuple[tuple[Instruction, ...], str]:
    """Instructions that a text begins with, and what comes after them.

    >>> parse('Always speak as the fisher. Style: capitals. Where does Mira live?')
    ((Instruction(kind='role', value='fisher'), Instruction(kind='capitals', value='capitals')), 'Where does Mira live?')
    """
    found, text = [], text.strip()
    while match := next(((m, kind) for pattern, kind in _WORDINGS if (m := pattern.match(text))), None):
        found.append(Instruction(match[1], match[0][1]))
        text = text[match[0].end() :]
    return tuple(found), text


def dress(instructions: Sequence[Instruction], answer: str) -> str:
    """A plain answer as the instructions want it."""
    values = {i.kind: i.value for i in instructions}
    if 'role' in values:
        answer = f'I, the {values["role"]}, say: {answer}'
    if 'hobby' in values:
        answer = f'{answer} I love {values["hobby"]}.'
    if 'word' in values:
        answer = f'{answer} {values["word"]}!'
    return answer.upper() if 'capitals' in values else answer


def obeys(instruction: Instruction, answer: str) -> bool:
    """Whether an answer does what one instruction says, however it does the rest.

    >>> obeys(Instruction('word', 'Ahoy'), 'Mira lives in Harrowby. AHOY.')
    True
    """
    if instruction.kind == 'capitals':
        return bool(answer.strip()) and answer.upper() == answer
    words = re.findall(r"[\w'-]+", answer.lower())
    value = instruction.value.lower()
    if instruction.kind == 'word':
        return words[-1:] == [value]
    phrase = ['i', 'the', value] if instruction.kind == 'role' else ['i', 'love', value]
    return any(words[i : i + len(phrase)] == phrase for i in range(len(words)))


def undress(instructions: Sequence[Instruction], answer: str) -> str:
    """An answer without what the instructions added to it; letters in capitals stay so."""
    values = {i.kind: re.escape(i.value) for i in instructions}
    if 'role' in values:
        answer = re.sub(rf'^I, the {values["role"]}, say: ', '', answer.strip(), flags=re.IGNORECASE)
    if 'word' in values:
        answer = re.sub(rf'\s*\b{values["word"]}[.!]?$', '', answer.strip(), flags=re.IGNORECASE)
    if 'hobby' in values:
        answer = re.sub(rf'\s*\bI love {values["hobby"]}[.!]?', '', answer, flags=re.IGNORECASE)
    return answer.strip()
