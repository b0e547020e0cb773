"""Dialogs out of the row formats in which they are published, told apart by their columns; docs/data.md lists the formats.

A format names the columns that it needs and those that it reads besides. A column that has a meaning for training (`MEANING`) and
that the format does not read ends the run: it is never dropped.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama2_jax.config import UserError, listed, reason, shown
from llama2_jax.data import sources
from llama2_jax.data.files import Position
from llama2_jax.data.sources import Record
from llama2_jax.text.dialog import SPECIAL_TAGS, check_dialog, has_special_tags

Fields = Mapping[str, Any]
Dialog = list[dict[str, Any]]  # messages, see text/dialog.py

ROLE_NAMES = {'system': 'system', 'human': 'user', 'user': 'user', 'prompter': 'user'} | dict.fromkeys(
    ('gpt', 'chatgpt', 'bing', 'bard', 'assistant', 'model'), 'assistant'
)
SYSTEM = ('system', 'system_prompt')
QUESTION = (*SYSTEM, 'history', 'input', 'context')  # columns that go into the question
MEANING = {
    *QUESTION, 'tools', 'tool_calls', 'functions', 'function_call', 'images', 'image', 'margin', 'is_safe', 'rating', 'scores',
    'ranks', 'rank', 'chosen_safe', 'rejected_safe', 'weight',
}  # fmt: skip
NO_ANSWER, UNSAFE = 'no answer', 'unsafe answer'  # why a dialog is left out

_TURN = re.compile(r'(?:\A\s*|\n\n)(Human|Assistant):')  # of hh-rlhf
_EXTRA_TURN = re.compile(r'\n?<extra_id_1>(User|Assistant)\n')  # of HelpSteer


@dataclasses.dataclass(frozen=True)
class Format:
    """A row format: the columns it needs, those it reads besides, and what makes something of a row."""

    needs: frozenset[str]
    reads: frozenset[str]
    convert: Callable[[Fields, str], Any]
    strict: bool = False  # refuses every column that it does not know, but for HARMLESS ones


HARMLESS = {'id', 'prompt_id', 'source', 'category', 'models', 'model', 'meta', 'metadata', 'is_safety', 'dataset', 'language'}


def format_of(needs: str, convert: Callable[[Fields, str], Any], reads: Iterable[str] = (), strict: bool = False) -> Format:
    """A format that needs the columns of `needs`, separated by spaces."""
    return Format(frozenset(needs.split()), frozenset(reads), convert, strict)


def recognise(record: Record, formats: Sequence[Format], kind: str, example: str) -> Format:
    """The format of a row by its columns.

    Raises:
      UserError: no format has these columns, or one of them has a meaning that the format does not read.
    """
    fields = record.fields
    for format in formats:
        if format.needs <= fields.keys():
            break
    else:
        raise UserError(
            f'{record.where} has the fields {listed(fields)}, which are no known format of {kind}; the plainest one is {example}.'
        )
    known = format.needs | format.reads
    for name in fields.keys() - known:
        if fields[name] not in ('', [], {}) and (name in MEANING or (format.strict and name not in HARMLESS)):
            raise UserError(
                f'{record.where}: the column {shown(name)} is not read beside {", ".join(sorted(format.needs))}: put it into the '
                'messages, or remove it.'
            )
    return format


def read_dialogs(source: str) -> Iterator[tuple[str, Dialog | None]]:
    """The dialogs of a source with their places ('a.jsonl:17'); None for a row that has none to learn from.

    Raises:
      UserError: naming file and row: unknown fields, wrong roles, no text, tags of the chat format inside.
    """
    for record in joined(sources.read_records(source), (TREES,)):
        yield record.where, to_dialog(record)[0]


def to_dialog(record: Record) -> tuple[Dialog | None, str]:
    """The dialog of a row; or None and why it is left out: NO_ANSWER or UNSAFE.

    Raises:
      UserError: naming the row: unknown fields, wrong roles, no text, tags of the chat format inside.
    """
    format = recognise(
        record, FORMATS, 'dialogs', "{'messages': [{'role': 'user', 'content': …}, {'role': 'assistant', 'content': …}]}"
    )
    if record.fields.get('is_safe') is False:
        return None, UNSAFE
    with row_errors(record.where):
        dialog = trimmed(format.convert(record.fields, record.where))
    if not dialog:
        return None, NO_ANSWER
    check(dialog, record.where)
    return dialog, ''


def trimmed(dialog: Dialog) -> Dialog:
    """Without answers before the first question, and questions after the last answer; empty if nobody answers."""
    system = [message for message in dialog[:1] if message['role'] == 'system']
    rest = dialog[len(system) :]
    while rest and rest[0]['role'] == 'assistant':
        rest = rest[1:]
    while rest and rest[-1]['role'] == 'user':
        rest = rest[:-1]
    return rest and system + rest


def check(dialog: Dialog, where: str) -> None:
    """Raises a UserError for wrong roles, no text, tags of the chat format, or what is not text."""
    check_dialog(dialog, where)
    if has_special_tags(dialog):
        raise UserError(
            f'{where}: a message holds a tag of the chat format ({", ".join(SPECIAL_TAGS)}), which only we may write.'
        )
    for i, message in enumerate(dialog):
        try:
            message['content'].encode()
        except UnicodeEncodeError:
            raise UserError(f'{where}: messages[{i}] holds a lone surrogate, which is not text.') from None


# Parts of rows


@contextlib.contextmanager
def row_errors(where: str) -> Iterator[None]:
    """Turns what a value of another type raises while a row is converted into a UserError that names the row."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f'{where} has the fields of a known format, and a value of another type than the format has: {reason(error)}.'
        ) from error


def field(fields: Fields, name: str, where: str) -> Any:
    """The value of a field that every row must have."""
    if name not in fields:
        raise UserError(f'{where} has no field {name!r} (it has: {listed(fields)}).')
    return fields[name]


def objects(value: Any, where: str, name: str) -> Dialog:
    """A list of objects; TFDS gives an object of lists."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f'{where}: {name!r} is not a list of objects.')
    return value


def number(fields: Fields, name: str, where: str) -> float:
    """A number, perhaps written as text (CSV)."""
    value = field(fields, name, where)
    try:
        if isinstance(value, bool):
            raise ValueError
        found = float(value)
        if not math.isfinite(found):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'{where}: {name!r} is {shown(value)}, not a finite number.') from None
    return found


def flag(fields: Fields, name: str, where: str) -> bool | None:
    """True or false, perhaps written as text (CSV); None where nobody said."""
    value = fields.get(name)
    value = {'true': True, 'false': False}.get(value.lower(), value) if isinstance(value, str) else value
    if not (value is None or isinstance(value, bool)):
        raise UserError(f'{where}: {name} is {shown(value)}; valid: true, false.')
    return value


def messages(value: Any, where: str, name: str) -> Dialog:
    """A list of messages in any of the published spellings; a first system message without text means none.

    Raises:
      UserError: an unknown role, such as a tool's, calls of tools, or content that is not text.
    """
    found = []
    for i, turn in enumerate(objects(value, where, name)):
        role = turn.get('role', turn.get('from'))
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise UserError(
                f'{where}: {name}[{i}] is from {shown(role)}; known: {", ".join(ROLE_NAMES)}. Tools have no place here.'
            )
        if called := [key for key in ('tool_calls', 'function_call') if turn.get(key)]:
            raise UserError(f'{where}: {name}[{i}] has {called[0]!r}: calls of tools have no place in the chat format.')
        content = turn.get('content', turn.get('value'))
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get('type') == 'text' for part in content):
                raise UserError(f'{where}: {name}[{i}] has a part of content that is not text.')
            content = ''.join(str(part.get('text', '')) for part in content)
        kept = {key: turn[key] for key in ('weight', 'token_ids') if turn.get(key) is not None}
        if ROLE_NAMES[role] != 'assistant' and kept.get('weight') == 0:
            del kept['weight']  # a question is never learned; SlimOrca says so in its rows
        found.append({'role': ROLE_NAMES[role], 'content': content} | kept)
    blank = found and found[0]['role'] == 'system' and not found[0]['content']
    return found[1:] if blank else found


def transcript(text: str) -> Dialog | None:
    """The turns of '\\n\\nHuman: …\\n\\nAssistant: …' (hh-rlhf) or of HelpSteer's; two turns of one side are one.

    None for any other text.
    """
    if '<extra_id_1>' in text:
        start, *turns = _EXTRA_TURN.split(text)
        turns = ['Human', start, *turns]
    elif re.match(r'\s*Human:', text):
        turns = _TURN.split(text)[1:]
    else:
        return None
    found: Dialog = []
    for speaker, said in zip(turns[::2], turns[1::2], strict=True):
        role = 'assistant' if speaker == 'Assistant' else 'user'
        if found and found[-1]['role'] == role:
            found[-1]['content'] += f'\n\n{said.strip()}'
        else:
            found.append({'role': role, 'content': said.strip()})
    return found


def question(fields: Fields, name: str, where: str) -> Dialog:
    """The prompt of a row: messages, a transcript or a text, with a system message, earlier turns and further input.

    Raises:
      UserError: what is no text.
    """
    value = field(fields, name, where)
    if isinstance(value, str):
        found = (transcript(value) if '\n\nAssistant:' in value or '<extra_id_1>' in value else None) or [
            {'role': 'user', 'content': value}
        ]
        if len(found) > 1 and found[-1]['role'] == 'assistant' and not found[-1]['content']:
            del found[-1]  # a turn that waits for the answer
    else:
        found = messages(value, where, name)
    for more in ('input', 'context'):
        extra = fields.get(more, '')
        if not isinstance(extra, str):
            raise UserError(f'{where}: {more!r} is {shown(extra)}, not a text.')
        if extra.strip() and found and isinstance(found[-1]['content'], str):
            found[-1] = found[-1] | {'content': f'{found[-1]["content"].strip()}\n\n{extra.strip()}'}
    history = fields.get('history') or []
    if not (isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)):
        raise UserError(f"{where}: 'history' is not a list of [question, answer].")
    found = [message for turn in history for message in pair(*turn)] + found
    return with_system(found, fields, where)


def with_system(dialog: Dialog, fields: Fields, where: str) -> Dialog:
    """A dialog with the text of a `system` column before it, if there is one."""
    text = next((fields[name] for name in SYSTEM if fields.get(name)), '')
    if not isinstance(text, str):
        raise UserError(f"{where}: 'system' is {shown(text)}, not a text.")
    if not text.strip():
        return dialog
    if dialog and dialog[0]['role'] == 'system':
        if dialog[0]['content'] == text:
            return dialog
        raise UserError(f"{where} has a system message and another text as 'system'.")
    return [{'role': 'system', 'content': text}, *dialog]


def answer(value: Any, where: str, name: str) -> Dialog:
    """An answer: a text, or messages."""
    return [{'role': 'assistant', 'content': value}] if not isinstance(value, list | dict) else messages(value, where, name)


def pair(asked: Any, answered: Any) -> Dialog:
    """A question and its answer."""
    return [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': answered}]


# Rows that are part of a whole


def joined(records: Iterable[Record], rules: Sequence['Join']) -> Iterator[Record]:
    """Rows that follow each other and belong together become one, by the first rule whose columns they have."""
    rule, key, group = None, None, []

    def flush(end: Position | None = None) -> Iterator[Record]:  # None: a group at the end may go on in a file that has grown
        if group:
            where = group[0].where
            try:
                with row_errors(where):
                    whole = rule.join([record.fields for record in group], where)
            except UserError as error:  # raised where the row is read, and bad rows are counted
                whole = error
            yield Record(group[0].file, where, whole, end)
            group.clear()

    for record in records:
        found = next((rule for rule in rules if rule.fits(record)), None)
        this = found and (record.file, found, str(record.fields.get(found.key)))
        if group and this != key:
            yield from flush(group[-1].end)
        rule, key = found, this
        if found:
            group.append(record)
        else:
            yield record
    yield from flush()


@dataclasses.dataclass(frozen=True)
class Join:
    """Rows with these columns, and with the same value in one of them, become one row."""

    needs: frozenset[str]
    key: str
    join: Callable[[list[Fields], str], dict[str, Any]]

    def fits(self, record: Record) -> bool:
        """Whether a row has these columns."""
        if isinstance(record.value, bytes) and not all(f'"{name}"'.encode() in record.value for name in self.needs):
            return False  # without the time that it takes to parse it
        try:
            return self.needs <= record.fields.keys()
        except UserError:
            return False


def _tree(rows: list[Fields], where: str) -> dict[str, Any]:
    """Flat messages of OASST as a tree."""
    nodes = {row['message_id']: {**row, 'replies': []} for row in rows}
    roots = []
    for node in nodes.values():
        parent = nodes.get(node.get('parent_id'))
        (parent['replies'] if parent else roots).append(node)
    return {'message_tree_id': rows[0].get('message_tree_id'), 'prompt': roots[0]}


TREES = Join(frozenset({'message_id', 'message_tree_id', 'text', 'role'}), 'message_tree_id', _tree)


# Formats


def _messages(name: str) -> Callable[[Fields, str], Dialog]:
    return lambda fields, where: with_system(messages(field(fields, name, where), where, name), fields, where)


def _and(asked: str, answered: str) -> Callable[[Fields, str], Dialog]:
    def convert(fields: Fields, where: str) -> Dialog:
        return [*question(fields, asked, where), *answer(field(fields, answered, where), where, answered)]

    return convert


def _oasst(fields: Fields, where: str) -> Dialog:
    """The path of the best-ranked answers; of several questions that follow an answer, the first that has one."""
    dialog: Dialog = []
    asked = fields['prompt'] if 'message_tree_id' in fields else fields
    while asked:
        answers = sorted(replies(asked, where), key=lambda reply: (reply.get('rank') is None, reply.get('rank') or 0))
        if not answers:
            break
        dialog += pair(asked.get('text'), answers[0].get('text'))
        asked = next((reply for reply in replies(answers[0], where) if replies(reply, where)), None)
    return dialog


def replies(message: Fields, where: str) -> Dialog:
    """What follows a message of an OASST tree, but for what was deleted."""
    return [reply for reply in objects(field(message, 'replies', where), where, 'replies') if not reply.get('deleted')]


FORMATS = (
    format_of('messages', _messages('messages'), SYSTEM),
    format_of('conversations', _messages('conversations'), SYSTEM),
    format_of('conversation', _messages('conversation'), SYSTEM),
    format_of('message_tree_id prompt', _oasst),
    format_of('message_id replies', _oasst, {'rank'}),
    *(format_of(f'prompt {a}', _and('prompt', a), {*QUESTION, 'is_safe'}) for a in ('completion', 'response', 'output')),
    *(format_of(f'instruction {a}', _and('instruction', a), QUESTION) for a in ('output', 'response')),
    *(format_of(f'question {a}', _and('question', a), QUESTION) for a in ('response', 'answer')),  # OpenOrca
    format_of('inputs targets', _and('inputs', 'targets'), SYSTEM),  # Flan
)
