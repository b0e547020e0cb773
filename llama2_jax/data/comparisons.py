"""Comparisons of answers out of the row formats in which they are published; `read_comparisons` gives all of them as pairs."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llama2_jax.config import UserError, nearest
from llama2_jax.data import schemas, sources

RATINGS = ('negligibly', 'slightly', 'better', 'significantly')  # by how much the chosen answer is better (paper p10)
DROPS = ('tie', 'unsafe winner', 'no text')  # why a comparison is left out

_TURN = re.compile(r'(?:\A|\n\n)(Human|Assistant):')  # of hh-rlhf


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two continuations of one prompt, the better one first.

    Attributes:
      prompt: messages that both begin with, up to a user's.
      chosen, rejected: what follows, up to an answer: one message, or where a whole transcript differs, more.
      rating: one of RATINGS; None where nobody said.
      safe: whether each is, where somebody said.
    """

    prompt: schemas.Dialog
    chosen: schemas.Dialog
    rejected: schemas.Dialog
    rating: str | None = None
    safe: tuple[bool | None, bool | None] = (None, None)

    @property
    def turns(self) -> int:
        """Questions up to the answer that is chosen."""
        return sum(message['role'] == 'user' for message in (*self.prompt, *self.chosen))


Read = tuple[list[Comparison], list[str]]  # of a row: comparisons, and the reasons of those that were dropped


def read_comparisons(source: str) -> Iterator[tuple[str, Read]]:
    """The comparisons of each row of a source with its place ('a.jsonl:17'), those of one prompt together.

    The format is that of the first row of each file, known by its fields:

    - prompt, chosen, rejected: messages or a user's text; an answer's text or messages; perhaps rating, chosen_safe and
      rejected_safe;
    - chosen, rejected: two transcripts, as text of '\\n\\nHuman: ' and '\\n\\nAssistant: ' turns (hh-rlhf) or as messages;
      paired on the turns that they share;
    - prompt, responses: ranked answers (InstructGPT), the best first or with ranks (0 is best); every two make a pair;
    - OASST trees: the ranked answers of every question in them.

    Dropped are ties, pairs with an unsafe winner and a safe loser (p10), and those with a message without text.

    Raises:
      UserError: naming file and row: unknown fields, a field missing, no common prompt, wrong roles, tags of the chat format.
    """
    formats: dict[str, Callable[[schemas.Fields, str], list[Comparison | None]]] = {}
    for record in sources.read_records(source):
        if record.file not in formats:
            formats[record.file] = _format(record)
        kept, dropped = [], []
        for comparison in formats[record.file](record.fields, record.where):
            reason = 'tie' if comparison is None else _why_not(comparison)
            if reason:
                dropped.append(reason)
                continue
            for answer in (comparison.chosen, comparison.rejected):
                schemas.check([*comparison.prompt, *answer], record.where)
            kept.append(comparison)
        yield record.where, (kept, dropped)


def _why_not(comparison: Comparison) -> str | None:
    if comparison.chosen == comparison.rejected:
        return 'tie'
    if comparison.safe == (False, True):
        return 'unsafe winner'
    messages = (*comparison.prompt, *comparison.chosen, *comparison.rejected)
    if any(isinstance(message['content'], str) and not message['content'].strip() for message in messages):
        return 'no text'
    return None


def _format(record: sources.Record) -> Callable[[schemas.Fields, str], list[Comparison | None]]:
    for needed, convert in _FORMATS:
        if needed <= record.fields.keys():
            return convert
    raise UserError(
        f'{record.where} has the fields {", ".join(record.fields) or "(none)"}, which are no known format of preferences; the '
        "plainest one is {'prompt': [{'role': 'user', 'content': …}], 'chosen': text, 'rejected': text}."
    )


def _messages(value: Any, role: str, where: str, name: str) -> schemas.Dialog:
    """A text is one message of the role."""
    if isinstance(value, str):
        return [{'role': role, 'content': value}]
    return [{'role': message.get('role'), 'content': message.get('content')} for message in schemas.objects(value, where, name)]


def _pair(fields: schemas.Fields, where: str) -> list[Comparison | None]:
    prompt = _messages(schemas.field(fields, 'prompt', where), 'user', where, 'prompt')
    chosen, rejected = (
        _messages(schemas.field(fields, name, where), 'assistant', where, name) for name in ('chosen', 'rejected')
    )
    # Some sets write the prompt into the answers once more.
    chosen, rejected = (answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in (chosen, rejected))
    safe = tuple(_choice(fields, name, (True, False), where) for name in ('chosen_safe', 'rejected_safe'))
    return [Comparison(prompt, chosen, rejected, _choice(fields, 'rating', RATINGS, where), safe)]


def _choice(fields: schemas.Fields, name: str, valid: Sequence[Any], where: str) -> Any:
    value = fields.get(name)
    if value is None or (value in valid and isinstance(value, type(valid[0]))):
        return value
    help = nearest(value, valid) if isinstance(value, str) and isinstance(valid[0], str) else f'valid: {valid}.'
    raise UserError(f'{where}: {name} is {value!r}; {help}')


def _transcripts(fields: schemas.Fields, where: str) -> list[Comparison | None]:
    chosen, rejected = (_transcript(schemas.field(fields, name, where), where, name) for name in ('chosen', 'rejected'))
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    while common and chosen[common - 1]['role'] != 'user':
        common -= 1
    if not common:
        raise UserError(f'{where}: chosen and rejected share no prompt: their first messages differ.')
    if chosen == rejected:
        return [None]
    return [Comparison(chosen[:common], chosen[common:], rejected[common:])]


def _transcript(value: Any, where: str, name: str) -> schemas.Dialog:
    """Turns of '\\n\\nHuman: …\\n\\nAssistant: …', or messages; two turns of one side are one."""
    if not isinstance(value, str):
        return _messages(value, '', where, name)
    start, *turns = _TURN.split(value)
    if start.strip() or not turns:
        raise UserError(f"{where}: {name!r} is no transcript: it does not begin with '\\n\\nHuman: '.")
    messages: schemas.Dialog = []
    for speaker, text in zip(turns[::2], turns[1::2], strict=True):
        role = {'Human': 'user', 'Assistant': 'assistant'}[speaker]
        if messages and messages[-1]['role'] == role:
            messages[-1]['content'] += f'\n\n{text.strip()}'
        else:
            messages.append({'role': role, 'content': text.strip()})
    return messages


def _ranked(prompt: schemas.Dialog, answers: Sequence[tuple[int, str]]) -> list[Comparison | None]:
    """Every two answers (rank, text), the lower rank chosen; None for a tie."""
    pairs = itertools.combinations(sorted(answers, key=lambda answer: answer[0]), 2)
    return [
        None if a == b else Comparison(prompt, *([{'role': 'assistant', 'content': text}] for text in (better, worse)))
        for (a, better), (b, worse) in pairs
    ]


def _list(fields: schemas.Fields, where: str) -> list[Comparison | None]:
    prompt = _messages(schemas.field(fields, 'prompt', where), 'user', where, 'prompt')
    responses = schemas.field(fields, 'responses', where)
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: 'responses' is not a list of texts.")
    ranks = fields.get('ranks', list(range(len(responses))))
    if not isinstance(ranks, list) or len(ranks) != len(responses) or not all(type(rank) is int for rank in ranks):
        raise UserError(f"{where}: 'ranks' is not a list of {len(responses)} whole numbers, one for each of the responses.")
    return _ranked(prompt, list(zip(ranks, responses, strict=True)))


def _oasst(fields: schemas.Fields, where: str) -> list[Comparison | None]:
    def below(question: Mapping[str, Any], before: schemas.Dialog) -> Iterator[Comparison | None]:
        prompt = [*before, {'role': 'user', 'content': question.get('text')}]
        answers = schemas.replies(question, where)
        yield from _ranked(prompt, [(a['rank'], a.get('text')) for a in answers if a.get('rank') is not None])
        for answer in answers:
            for following in schemas.replies(answer, where):
                yield from below(following, [*prompt, {'role': 'assistant', 'content': answer.get('text')}])

    return list(below(fields['prompt'] if 'message_tree_id' in fields else fields, []))


_FORMATS = (
    ({'prompt', 'chosen', 'rejected'}, _pair),
    ({'chosen', 'rejected'}, _transcripts),
    ({'prompt', 'responses'}, _list),
    ({'message_tree_id', 'prompt'}, _oasst),
    ({'message_id', 'replies'}, _oasst),
)
