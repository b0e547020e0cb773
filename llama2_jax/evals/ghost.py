"""Recall of instructions: does an answer late in a dialog still do what its first turn says (paper p54, Table 30)?"""

import importlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama2_jax.config import UserError
from llama2_jax.data.instructions import Instruction
from llama2_jax.evals.multi_turn import multi_turn_rollout
from llama2_jax.inference.engine import Engine
from llama2_jax.toy import instructions as toy

TURNS = (2, 4, 6, 20)  # the paper's

Grader = Callable[[Instruction, str], bool]  # whether an answer does what an instruction says


class Talk(NamedTuple):
    """A dialog to hold under instructions.

    Attributes:
      system: the instructions in words, the system message.
      instructions: the same, to grade by.
      questions: what the user says, turn by turn.
    """

    system: str
    instructions: tuple[Instruction, ...]
    questions: tuple[str, ...]


def mentions(instruction: Instruction, answer: str) -> bool:
    """Whether an answer refers to the value of an instruction, as people looked for in the paper."""
    return re.search(rf'\b{re.escape(instruction.value)}\b', answer, re.IGNORECASE) is not None


def find_grader(name: str) -> Grader:
    """The grader of a name: 'toy', which is exact, 'mentions', or a function of your own as 'module:function'.

    Raises:
      UserError: there is no such function.
    """
    known: dict[str, Grader] = {'toy': toy.obeys, 'mentions': mentions}
    if name in known:
        return known[name]
    module, _, function = name.partition(':')
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'grader={name} is not toy, mentions or module:function ({error}).') from None


def obeyed(engine: Engine, talks: Sequence[Talk], grader: Grader, max_new_tokens: int) -> list[list[bool]]:
    """Whether the answer at each turn of each dialog obeys all instructions.

    Answers are greedy, and the model goes on from its own; after one that nothing can follow all others count as failed.
    """
    systems, questions = [talk.system for talk in talks], [talk.questions for talk in talks]
    held = multi_turn_rollout(engine, questions, systems, temperature=0.0, max_new_tokens=max_new_tokens)
    good = [
        [all(grader(instruction, answer['content']) for instruction in talk.instructions) for answer in answers]
        for talk, answers in zip(talks, held, strict=True)
    ]
    return [row + [False] * (len(talk.questions) - len(row)) for row, talk in zip(good, talks, strict=True)]


def recall(good: Sequence[Sequence[bool]]) -> dict[int, float]:
    """Turn, from 1 on -> share of the dialogs that come so far in which its answer obeys (of `obeyed`)."""
    longest = max(map(len, good), default=0)
    columns = {turn: [row[turn - 1] for row in good if len(row) >= turn] for turn in range(1, longest + 1)}
    return {turn: sum(column) / len(column) for turn, column in columns.items()}
