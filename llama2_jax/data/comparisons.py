"""Comparisons of answers out of the row formats in which they are published; `read_comparisons` gives all of them as pairs."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama2_jax.config import UserError, nearest, shown
from llama2_jax.data import schemas, sources
from llama2_jax.data.schemas import Fields, field, format_of, messages, number

RATINGS = ('negligibly', 'slightly', 'better', 'significantly')  # by how much the chosen answer is better (paper p10)
DROPS = ('tie', 'unsafe winner', 'no text', 'one answer')  # why a comparison is left out


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

    Raises:
      UserError: naming file and row: unknown fields, no common prompt, wrong roles, tags of the chat format.
    """
    for record in schemas.joined(sources.read_records(source), JOINS):
        yield record.where, to_comparisons(record)


def to_comparisons(record: sources.Record) -> Read:
    """The comparisons of a row, and why others are left out.

    Dropped are ties, pairs with an unsafe winner and a safe loser (p10), those with a message without text, and rows with one
    answer.

    Raises:
      UserError: naming the row: unknown fields, no common prompt, wrong roles, tags of the chat format.
    """
    format = schemas.recognise(
        record, FORMATS, 'preferences', "{'prompt': [{'role': 'user', 'content': …}], 'chosen': text, 'rejected': text}"
    )
    kept, dropped = [], []
    with schemas.row_errors(record.where):
        found = format.convert(record.fields, record.where)
    for comparison in found:
        reason = comparison if isinstance(comparison, str) else 'tie' if comparison is None else _why_not(comparison)
        if reason:
            dropped.append(reason)
            continue
        for answer in (comparison.chosen, comparison.rejected):
            schemas.check([*comparison.prompt, *answer], record.where)
        if not any(message['role'] == 'user' for message in comparison.prompt):
            raise UserError(f'{record.where}: the prompt has no message of the user.')
        kept.append(comparison)
    return kept, dropped if found else ['one answer']


def _why_not(comparison: Comparison) -> str | None:
    if comparison.chosen == comparison.rejected:
        return 'tie'
    if comparison.safe == (False, True):
        return 'unsafe winner'
    messages = (*comparison.prompt, *comparison.chosen, *comparison.rejected)
    if any(isinstance(message['content'], str) and not message['content'].strip() for message in messages):
        return 'no text'
    return None


def _pair(asked: str):
    """A prompt and two answers, which may hold the prompt once more."""

    def convert(fields: Fields, where: str) -> list[Comparison | None]:
        prompt = schemas.question(fields, asked, where)
        whole = []
        for name in ('chosen', 'rejected'):
            value = field(fields, name, where)
            if not isinstance(value, str | list | dict):
                raise UserError(f'{where}: {name!r} is {shown(value)}, neither a text nor a list of objects.')
            answer = (schemas.transcript(value) if isinstance(value, str) else None) or schemas.answer(value, where, name)
            bare = [message for message in prompt if message['role'] != 'system']
            again = next((start for start in (prompt, bare) if start and answer[: len(start)] == start), [])
            whole.append([*prompt, *answer[len(again) :]])
        safe = tuple(schemas.flag(fields, name, where) for name in ('chosen_safe', 'rejected_safe'))
        if {'score_chosen', 'score_rejected'} <= fields.keys():
            better, worse = (number(fields, name, where) for name in ('score_chosen', 'score_rejected'))
            if better == worse:
                return [None]
            if better < worse:
                raise UserError(f'{where}: the rejected answer has the higher score, {worse:g} against {better:g}.')
        rating = _choice(fields, 'rating', RATINGS, where)
        if prompt and prompt[-1]['role'] == 'user':
            return [Comparison(prompt, *(dialog[len(prompt) :] for dialog in whole), rating, safe)]
        if not all(any(message['role'] == 'user' for message in dialog) for dialog in whole):
            raise UserError(f'{where}: the prompt has no message of the user.')
        return [_parted(*whole, where, rating, safe)]

    return convert


def _choice(fields: schemas.Fields, name: str, valid: Sequence[Any], where: str) -> Any:
    value = fields.get(name)
    if value is None or (value in valid and isinstance(value, type(valid[0]))):
        return value
    help = nearest(value, valid) if isinstance(value, str) and isinstance(valid[0], str) else f'valid: {valid}.'
    raise UserError(f'{where}: {name} is {shown(value)}; {help}')


def _parted(
    chosen: schemas.Dialog, rejected: schemas.Dialog, where: str, rating=None, safe=(None, None)
) -> Comparison | str | None:
    """Two dialogs, parted after the last of the user's messages up to which they are equal; None if they are equal.

    NO_ANSWER if nobody answers in one of them.
    """
    chosen, rejected = schemas.trimmed(chosen), schemas.trimmed(rejected)
    if not (chosen and rejected):
        return schemas.NO_ANSWER
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    while common and chosen[common - 1]['role'] != 'user':
        common -= 1
    if not common:
        raise UserError(f'{where}: chosen and rejected share no prompt: their first messages differ.')
    return None if chosen == rejected else Comparison(chosen[:common], chosen[common:], rejected[common:], rating, safe)


def _transcripts(fields: Fields, where: str) -> list[Comparison | None]:
    sides = []
    for name in ('chosen', 'rejected'):
        value = field(fields, name, where)
        dialog = schemas.transcript(value) if isinstance(value, str) else messages(value, where, name)
        if dialog is None:
            raise UserError(f"{where}: {name!r} is no transcript: it does not begin with '\\n\\nHuman: '.")
        sides.append(schemas.with_system(dialog, fields, where))
    safe = tuple(schemas.flag(fields, name, where) for name in ('chosen_safe', 'rejected_safe'))
    return [_parted(*sides, where, _choice(fields, 'rating', RATINGS, where), safe)]


def _two(
    prompt: schemas.Dialog, answers: Sequence[Any], better: float, rating=None, safe=(None, None)
) -> list[Comparison | None]:
    """Two answers; the first is chosen if `better` is positive, none if it is 0."""
    if not better:
        return [None]
    order = (0, 1) if better > 0 else (1, 0)
    sides = ([{'role': 'assistant', 'content': answers[i]}] for i in order)
    return [Comparison(prompt, *sides, rating, tuple(safe[i] for i in order))]


def _ranked(
    prompt: schemas.Dialog, answers: Sequence[tuple[float, str]], safe: Sequence[bool | None] = ()
) -> list[Comparison | None]:
    """Every two answers (rank, text), the lower rank chosen; None for a tie."""
    labelled = zip(answers, safe or [None] * len(answers), strict=True)
    pairs = itertools.combinations(sorted(labelled, key=lambda answer: answer[0][0]), 2)
    return [
        None
        if a == b
        else Comparison(prompt, *([{'role': 'assistant', 'content': text}] for text in (better, worse)), safe=(one, other))
        for ((a, better), one), ((b, worse), other) in pairs
    ]


def _numbers(fields: Fields, name: str, count: int, where: str) -> list[float]:
    values = field(fields, name, where)
    if not isinstance(values, list) or len(values) != count or not all(type(value) in (int, float) for value in values):
        raise UserError(f'{where}: {name!r} is not a list of {count} numbers, one for each of the responses.')
    return values


def _list(fields: Fields, where: str) -> list[Comparison | None]:
    """Ranked answers (InstructGPT): the best first, or with `ranks` (the lowest is best) or `scores` (the highest is)."""
    responses = field(fields, 'responses', where)
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: 'responses' is not a list of texts.")
    given = [name for name in ('ranks', 'rank', 'scores') if name in fields]
    if len(given) > 1:
        raise UserError(f'{where}: the responses have {" and ".join(given)}; keep one of them.')
    ranks = _numbers(fields, given[0], len(responses), where) if given else range(len(responses))
    ranks = [-rank for rank in ranks] if given == ['scores'] else ranks
    return _ranked(schemas.question(fields, 'prompt', where), list(zip(ranks, responses, strict=True)), fields.get('safe', ()))


def _answers(asked: str, answers: str, text: str, rank: str, sign: int):
    """A list of objects, each an answer with its rank (sign 1: the lowest is best) or score (sign -1)."""

    def convert(fields: Fields, where: str) -> list[Comparison | None]:
        found = schemas.objects(field(fields, answers, where), where, answers)
        ranked = [(sign * number(a, rank, where), field(a, text, where)) for a in found if a.get(rank) is not None]
        return _ranked(schemas.question(fields, asked, where), ranked)

    return convert


def _safe_rlhf(fields: Fields, where: str) -> list[Comparison | None]:
    """The safer answer is chosen, as by the paper's annotators for safety (p10)."""
    safe = tuple(schemas.flag(fields, f'is_response_{i}_safe', where) for i in range(2))
    which = number(fields, 'safer_response_id', where)
    if which not in (0, 1):
        raise UserError(f"{where}: 'safer_response_id' is {which:g}, not 0 or 1.")
    answers = [fields['response_0'], fields['response_1']]
    return _two(schemas.question(fields, 'prompt', where), answers, 1 - 2 * which, safe=safe)


def _human_preferences(fields: Fields, where: str) -> list[Comparison | None]:
    which = number(fields, 'labels', where)
    if which not in (0, 1):
        raise UserError(f"{where}: 'labels' is {which:g}, not 0 or 1.")
    prompt = [{'role': 'user', 'content': fields['history']}]
    return _two(prompt, [fields['human_ref_A'], fields['human_ref_B']], 2 * which - 1)


def _webgpt(fields: Fields, where: str) -> list[Comparison | None]:
    asked = fields['question']
    prompt = [{'role': 'user', 'content': asked.get('full_text') if isinstance(asked, dict) else asked}]
    difference = number(fields, 'score_0', where) - number(fields, 'score_1', where)
    return _two(prompt, [fields['answer_0'], fields['answer_1']], difference)


def _summaries(fields: Fields, where: str) -> list[Comparison | None]:
    info, summaries = fields['info'], schemas.objects(fields['summaries'], where, 'summaries')
    which = number(fields, 'choice', where)
    if not isinstance(info, dict) or len(summaries) != 2 or which not in (0, 1):
        raise UserError(f"{where}: a comparison of summaries has 'info', two 'summaries' and a 'choice' of 0 or 1.")
    parts = (('SUBREDDIT', 'subreddit'), ('TITLE', 'title'), ('POST', 'post'), ('ARTICLE', 'article'))
    text = '\n\n'.join(f'{head}: {info[name]}' for head, name in parts if info.get(name))
    return _two([{'role': 'user', 'content': f'{text}\n\nTL;DR:'}], [field(s, 'text', where) for s in summaries], 1 - 2 * which)


def _strength(fields: Fields, where: str) -> list[Comparison | None]:
    """HelpSteer2's preferences: -3 (the first answer is much better) to 3."""
    strength = number(fields, 'preference_strength', where)
    if strength not in range(-3, 4):
        raise UserError(f"{where}: 'preference_strength' is {strength:g}, not a whole number from -3 to 3.")
    rating = RATINGS[int(abs(strength))] if strength else None
    answers = [fields['response_1'], fields['response_2']]
    return _two(schemas.question(fields, 'prompt', where), answers, -strength, rating)


def _stack_paired(fields: Fields, where: str) -> list[Comparison | None]:
    return _two([{'role': 'user', 'content': fields['question']}], [fields['response_j'], fields['response_k']], 1)


def _ordered(name: str):
    """Rows of single answers to one prompt, by a score or a label of theirs, as one row with `responses`."""

    def join(rows: list[Fields], where: str) -> dict[str, Any]:
        scores = [number(row, name, where) if name != 'is_safe' else float(schemas.flag(row, name, where)) for row in rows]
        safe = {'safe': [bool(score) for score in scores]} if name == 'is_safe' else {}
        return {'prompt': rows[0]['prompt'], 'responses': [row['response'] for row in rows], 'scores': scores} | safe

    return join


JOINS = (
    schemas.TREES,
    schemas.Join(frozenset({'prompt', 'response', 'helpfulness'}), 'prompt', _ordered('helpfulness')),  # HelpSteer2
    schemas.Join(frozenset({'prompt', 'response', 'is_safe'}), 'prompt', _ordered('is_safe')),  # BeaverTails
)


def _oasst(fields: schemas.Fields, where: str) -> list[Comparison | None]:
    def below(question: Mapping[str, Any], before: schemas.Dialog) -> Iterator[Comparison | None]:
        prompt = [*before, {'role': 'user', 'content': question.get('text')}]
        answers = schemas.replies(question, where)
        yield from _ranked(prompt, [(a['rank'], a.get('text')) for a in answers if a.get('rank') is not None])
        for answer in answers:
            for following in schemas.replies(answer, where):
                yield from below(following, [*prompt, {'role': 'assistant', 'content': answer.get('text')}])

    return list(below(fields['prompt'] if 'message_tree_id' in fields else fields, []))


_SAFE = ('chosen_safe', 'rejected_safe', 'rating')

FORMATS = (
    *(
        format_of(f'{asked} chosen rejected', _pair(asked), {*schemas.SYSTEM, 'history', 'input', *_SAFE})
        for asked in ('prompt', 'question', 'instruction')
    ),
    format_of('chosen rejected', _transcripts, {*schemas.SYSTEM, *_SAFE}),
    format_of('prompt responses', _list, {*schemas.SYSTEM, 'ranks', 'rank', 'scores', 'safe'}, strict=True),
    format_of('prompt response_0 response_1 safer_response_id', _safe_rlhf),
    format_of('prompt response_1 response_2 preference_strength', _strength),
    format_of('prompt answers', _answers('prompt', 'answers', 'answer', 'rank', 1)),  # Nectar
    format_of(
        'instruction completions', _answers('instruction', 'completions', 'response', 'overall_score', -1)
    ),  # UltraFeedback
    format_of('history human_ref_A human_ref_B labels', _human_preferences),  # SHP
    format_of('question answer_0 answer_1 score_0 score_1', _webgpt),
    format_of('info summaries choice', _summaries),  # summarize_from_feedback
    format_of('question answers', _answers('question', 'answers', 'text', 'pm_score', -1)),  # StackExchange preferences
    format_of('question response_j response_k', _stack_paired),
    format_of('message_tree_id prompt', _oasst),
    format_of('message_id replies', _oasst, {'rank'}),
)
