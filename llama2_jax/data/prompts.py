"""Prompts to sample answers from: {"messages": […], "is_safety": bool, "category": …}, the last two optional.

Batch k of a run is a function of (seed, k, mixture) alone. Prompts are few and short, so every process holds them all.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np

from llama2_jax.config import Config, Names, UserError, between, listed, shown
from llama2_jax.data import comparisons, schemas
from llama2_jax.data.dialogs import held_out, question, shuffled
from llama2_jax.data.mixing import Interleave, amounts, parse_mixture, source_seed
from llama2_jax.data.sources import Record, Tally, read_records, skipped
from llama2_jax.text.dialog import encode_prompt

ROWS = 2**40  # of a run, which need not know how long it will be


@dataclasses.dataclass(frozen=True)
class PromptConfig(Config):
    """Which prompts.

    Attributes:
      mixture: `source[ + source…][:amount], …` (`data/mixing.py`): with `:2x` each prompt comes twice while others come once;
        `:0.1` is a share of the prompts asked.
      heldout: Share of each source's prompts held out, chosen by the first question.
      longest: Maximum tokens of a prompt; longer ones are dropped and counted.
    """

    mixture: Annotated[str, Names('mixture', 'prompts')] = 'toy:prompts'
    heldout: float = between(0.05, 1e-6, 0.999)
    longest: int = between(1024, 1)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A dialog that waits for an answer.

    Attributes:
      messages: ends with a user's.
      token_ids: BOS included, ready for the answer.
      is_safety: tagged as likely to elicit unsafe answers.
      category: for people.
      where: its place, such as 'a.jsonl:17'.
      row: the other fields of its row that JSON can hold, for reward functions.
    """

    messages: list[dict[str, str]]
    token_ids: list[int]
    is_safety: bool
    category: str
    where: str
    row: dict[str, Any] = dataclasses.field(default_factory=dict)


class PromptData:
    """The prompts of a mixture.

    Args:
      tokenizer: a `llama2_jax.text.tokenizer.Tokenizer`.
      batch_size: prompts in a batch.
      seed: any integer.

    Attributes:
      heldout: the held-out prompts of all sources, in a fixed shuffled order.
      dropped: how many were too long.
      bad: what is wrong with rows that were skipped.

    Raises:
      UserError: a row that is no prompt, naming it, or a source that has none.
    """

    def __init__(self, config: PromptConfig, tokenizer, *, batch_size: int, seed: int):
        components = parse_mixture(config.mixture)
        if limited := [component.source for component in components if component.epochs]:
            raise UserError(f'{limited[0]}: prompts are asked for as long as the run lasts, leave @epochs away.')
        self._batch_size = batch_size
        self._train: list[list[Prompt]] = []
        self.heldout: list[Prompt] = []
        self.dropped = 0
        self.bad: list[str] = []
        for component in components:
            tally, prompts = Tally(component.skip), []
            for record in read_records(component.source):
                try:
                    prompts.append(read_prompt(record, tokenizer))
                except UserError as error:
                    tally.refuse(error)
            self.bad += tally.bad
            short = [prompt for prompt in prompts if len(prompt.token_ids) <= config.longest]
            self.dropped += len(prompts) - len(short)
            split = [held_out(prompt.messages, config.heldout) for prompt in short]
            self._train.append([prompt for prompt, out in zip(short, split, strict=True) if not out])
            self.heldout += [prompt for prompt, out in zip(short, split, strict=True) if out]
            if not self._train[-1]:
                raise UserError(
                    f'Source {component.source} has no prompts to train on ({len(prompts) - len(short)} have more than '
                    f'prompts.longest={config.longest} tokens, {sum(split)} are held out)'
                    + (f': {_few(self.heldout)}' if any(split) else '.')
                )
        if not self.heldout:
            raise UserError(f'No prompt is held out of {config.mixture}: {_few(self.train)}')
        self.heldout = [self.heldout[shuffled(i, len(self.heldout), 0)] for i in range(len(self.heldout))]
        parts = amounts(components, [len(prompts) for prompts in self._train], None)
        self._order = Interleave([part / sum(parts) for part in parts], ROWS)
        self._seeds = [source_seed(seed, component.source) for component in components]

    @property
    def train(self) -> list[Prompt]:
        """The prompts to train on, each once."""
        return [prompt for prompts in self._train for prompt in prompts]

    def batch(self, number: int) -> list[Prompt]:
        """Batch `number`, from 0: each source's prompts are shuffled again at every epoch."""
        return [self._find(row) for row in range(number * self._batch_size, (number + 1) * self._batch_size)]

    def _find(self, row: int) -> Prompt:
        source, number = self._order[row]
        prompts = self._train[source]
        epoch, i = divmod(number, len(prompts))
        return prompts[shuffled(i, len(prompts), self._seeds[source] + epoch)]

    def __str__(self) -> str:
        tagged = sum(prompt.is_safety for prompt in self.train)
        counts = f'{len(self.train):,} prompts, {tagged:,} of them tagged safety'
        return f'{counts}; {len(self.heldout):,} held out, {self.dropped:,} too long.' + skipped(self.bad)


def _few(prompts: Sequence[Prompt]) -> str:
    """What to do where prompts cannot be divided into those to train on and those held out."""
    if len({question(prompt.messages) for prompt in prompts}) > 1:
        return 'change prompts.heldout, or give more prompts.'
    return f'all {len(prompts)} begin with the same question, and those stay together: give other prompts, too.'


def read_prompt(record: Record, tokenizer) -> Prompt:
    """A row as a prompt; of a row of a dialog or of comparisons, what the last answer answers.

    Raises:
      UserError: naming the row and what is wrong with it.
    """
    fields, where = record.fields, record.where
    with schemas.row_errors(where):
        messages = _question(record)
    schemas.check(messages, where)
    token_ids = encode_prompt(messages, tokenizer, where)
    if not isinstance(fields.get('is_safety', False), bool):
        raise UserError(f'{where}: "is_safety" is {shown(fields["is_safety"])}, not true or false.')
    messages = [{'role': message['role'], 'content': message['content']} for message in messages]
    row = {name: value for name, value in fields.items() if name != 'messages' and _is_json(value)}
    return Prompt(messages, token_ids, fields.get('is_safety', False), str(fields.get('category', '')), where, row)


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def read_questions(source: str) -> Iterator[schemas.Dialog]:
    """The messages of the prompts of a source.

    Raises:
      UserError: naming the file, and the row that is none.
    """
    for record in read_records(source):
        with schemas.row_errors(record.where):
            messages = _question(record)
        schemas.check(messages, record.where)
        yield messages


def _question(record: Record) -> schemas.Dialog:
    fields, where = record.fields, record.where
    if 'messages' in fields:
        messages = schemas.with_system(schemas.messages(fields['messages'], where, 'messages'), fields, where)
    elif any(format.needs <= fields.keys() for format in comparisons.FORMATS):
        kept, _ = comparisons.to_comparisons(record)
        if kept:
            return kept[0].prompt
        messages = schemas.question(fields, 'prompt', where)
    elif any(format.needs <= fields.keys() for format in schemas.FORMATS):
        messages = schemas.to_dialog(record)[0] or []
    elif 'prompt' in fields:
        schemas.recognise(record, [schemas.format_of('prompt', None, schemas.QUESTION)], 'prompts', '')
        messages = schemas.question(fields, 'prompt', where)
    else:
        raise UserError(f"{where} is no prompt: it has no field 'messages' or 'prompt' (it has: {listed(fields)}).")
    while len(messages) > 1 and messages[-1]['role'] == 'assistant':
        messages = messages[:-1]
    return messages


def different(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Each dialog once, in an order of the seed's."""
    found = list({json.dumps(prompt.messages): prompt for prompt in prompts}.values())
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
