"""Dialogs out of the row formats in which they are published; `read_dialogs` gives them all as checked messages."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama2_jax.config import UserError
from llama2_jax.data import sources
from llama2_jax.text.dialog import SPECIAL_TAGS, check_dialog, has_special_tags

Fields = Mapping[str, Any]
Dialog = list[dict[str, Any]]  # messages, see text/dialog.py

SHAREGPT_ROLES = {'system': 'system', 'human': 'user', 'user': 'user'} | dict.fromkeys(
    ('gpt', 'chatgpt', 'bing', 'bard', 'assistant'), 'assistant'
)


def read_dialogs(source: str) -> Iterator[tuple[str, Dialog | None]]:
    """The dialogs of a source with their places ('a.jsonl:17'); None for a row in which nobody answers.

    The format is that of the first row of each file, known by its fields:

    - messages: a list of {'role', 'content'};
    - prompt, and completion, response or output;
    - instruction, output or response, perhaps input or context (Alpaca, Dolly): the latter follows the instruction after a
      blank line;
    - conversations: a list of {'from', 'value'} (ShareGPT); an answer before the first question and a question after the last
      answer go;
    - message_tree_id and prompt, or message_id and replies (OASST trees): one dialog a tree, of the best-ranked answers.

    Raises:
      UserError: naming file and row: unknown fields, a field missing, wrong roles, no text, tags of the chat format inside.
    """
    formats: dict[str, Callable[[Fields, str], Dialog]] = {}
    for record in sources.read_records(source):
        if record.file not in formats:
            formats[record.file] = _format(record)
        dialog = formats[record.file](record.fields, record.where)
        if dialog:
            check(dialog, record.where)
        yield record.where, dialog or None


def _format(record: sources.Record) -> Callable[[Fields, str], Dialog]:
    fields = record.fields.keys()
    for needed, convert in _FORMATS:
        if needed <= fields:
            return convert
    raise UserError(
        f'{record.where} has the fields {", ".join(fields) or "(none)"}, which are no known format of dialogs; the plainest one '
        "is {'messages': [{'role': 'user', 'content': …}, {'role': 'assistant', 'content': …}]}."
    )


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


def field(fields: Fields, name: str, where: str) -> Any:
    """The value of a field that every row must have."""
    if name not in fields:
        raise UserError(f'{where} has no field {name!r}, unlike the first row of its file (it has: {", ".join(fields)}).')
    return fields[name]


def _messages(fields: Fields, where: str) -> Dialog:
    messages = objects(field(fields, 'messages', where), where, 'messages')
    blank = messages and messages[0].get('role') == 'system' and messages[0].get('content') == ''  # as some sets say 'none'
    return messages[1:] if blank else messages


def objects(value: Any, where: str, name: str) -> Dialog:
    """A list of objects; TFDS gives an object of lists."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f'{where}: {name!r} is not a list of objects.')
    return value


def _sharegpt(fields: Fields, where: str) -> Dialog:
    dialog = []
    for i, turn in enumerate(objects(field(fields, 'conversations', where), where, 'conversations')):
        if turn.get('from') not in SHAREGPT_ROLES:
            raise UserError(f'{where}: conversations[{i}] is from {turn.get("from")!r}; known: {", ".join(SHAREGPT_ROLES)}.')
        dialog.append({'role': SHAREGPT_ROLES[turn['from']], 'content': turn.get('value')})
    system = [message for message in dialog[:1] if message['role'] == 'system']
    rest = dialog[len(system) :]
    while rest and rest[0]['role'] == 'assistant':
        del rest[0]
    while rest and rest[-1]['role'] == 'user':
        del rest[-1]
    return rest and [message for message in system if message['content']] + rest


def _pair(question: Any, answer: Any) -> Dialog:
    return [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]


def _prompt_and(answer: str) -> Callable[[Fields, str], Dialog]:
    def convert(fields: Fields, where: str) -> Dialog:
        return _pair(field(fields, 'prompt', where), field(fields, answer, where))

    return convert


def _instruction_and(answer: str) -> Callable[[Fields, str], Dialog]:
    def convert(fields: Fields, where: str) -> Dialog:
        question = field(fields, 'instruction', where)
        more = fields.get('input') or fields.get('context')
        if isinstance(question, str) and isinstance(more, str) and more.strip():
            question = f'{question.strip()}\n\n{more.strip()}'
        return _pair(question, field(fields, answer, where))

    return convert


def _oasst(fields: Fields, where: str) -> Dialog:
    """The path of the best-ranked answers; of several questions that follow an answer, the first that has one."""
    dialog: Dialog = []
    question = fields['prompt'] if 'message_tree_id' in fields else fields
    while question:
        answers = sorted(replies(question, where), key=lambda reply: (reply.get('rank') is None, reply.get('rank') or 0))
        if not answers:
            break
        dialog += _pair(question.get('text'), answers[0].get('text'))
        question = next((reply for reply in replies(answers[0], where) if replies(reply, where)), None)
    return dialog


def replies(message: Fields, where: str) -> Dialog:
    """What follows a message of an OASST tree, but for what was deleted."""
    return [reply for reply in objects(field(message, 'replies', where), where, 'replies') if not reply.get('deleted')]


_FORMATS = (
    ({'messages'}, _messages),
    ({'conversations'}, _sharegpt),
    ({'message_tree_id', 'prompt'}, _oasst),
    ({'message_id', 'replies'}, _oasst),
    *(({'prompt', answer}, _prompt_and(answer)) for answer in ('completion', 'response', 'output')),
    *(({'instruction', answer}, _instruction_and(answer)) for answer in ('output', 'response')),
)
