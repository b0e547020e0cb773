"""Instructions that are to hold for a whole dialog (Ghost Attention, paper p16): drawn at random, and put into words."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Kind(NamedTuple):
    """What an instruction of a kind may say: `{v}` in a wording stands for one of the values."""

    values: tuple[str, ...]
    ways: tuple[str, ...]
    terse: str


Kinds = Mapping[str, Kind]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One constraint: `kind` is a key of `Kinds`, `value` one of its values."""

    kind: str
    value: str


def draw(kinds: Kinds, rng: random.Random, count: int) -> tuple[Instruction, ...]:
    """`count` instructions of different kinds at random, in the order in which they are given."""
    return tuple(Instruction(kind, rng.choice(kinds[kind].values)) for kind in rng.sample(list(kinds), count))


def word(kinds: Kinds, rng: random.Random, instructions: Sequence[Instruction], terse: bool) -> str:
    """Instructions as a text; the terse wording is the paper's 'Figure: Napoleon.'."""
    texts = [kinds[i.kind].terse if terse else rng.choice(kinds[i.kind].ways) for i in instructions]
    return ' '.join(text.format(v=i.value) for text, i in zip(texts, instructions, strict=True))
