"""LLaMA 2's chat format as token ids, turn by turn: `<s>[INST] question [/INST] answer </s><s>[INST] …` (recipe D.1).

A question and its answer are encoded one after the other, never as one rendered string, so a finished dialog begins with exactly
the prompt that `encode_prompt` gives for sampling, at every turn, and BOS and EOS cannot be forged. With LLaMA 2's tokenizer the
ids equal those of Meta's `chat_completion`, which encodes each pair in one call: the space that SentencePiece puts before the
answer is the one that Meta writes there, and no piece has a space inside.

A message is {'role': 'system' | 'user' | 'assistant', 'content': text}. An assistant's may have a 'weight' of 0 or 1 (as in
OpenAI's fine-tuning format): 0 for an answer that is read, but not learned. An answer that a model drew has its 'token_ids' too,
EOS included: these are trained on, as the same text may be encoded in other ways than the one that was drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama2_jax.config import UserError, shown
from llama2_jax.text import template
from llama2_jax.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

ROLES = ('system', 'user', 'assistant')
SPECIAL_TAGS = ('[INST]', '[/INST]', '<<SYS>>', '<</SYS>>')
SPECIAL_TAGS_ERROR = 'Error: special tags are not allowed as part of the prompt.'  # Meta's answer to such a dialog


def check_dialog(messages: Messages, where: str) -> None:
    """Checks roles and contents: perhaps a system message, then user and assistant by turns, beginning with the user.

    Args:
      where: what to call the dialog in errors, such as its file and row.

    Raises:
      UserError: naming `where` and the message.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f'{where}: a dialog is a list of messages, at least one.')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {'role', 'content'} <= message.keys():
            raise UserError(f"{where}: messages[{i}] is not an object with 'role' and 'content'.")
        role, content = message['role'], message['content']
        if role not in ROLES:
            raise UserError(f'{where}: messages[{i}] has the role {shown(role)}; valid: {", ".join(ROLES)}.')
        if not isinstance(content, str) or not content.strip():
            raise UserError(f'{where}: messages[{i}] ({role}) has {"no text" if content else "empty"} content.')
        if message.get('weight', 1) not in ((0, 1) if role == 'assistant' else (1,)):
            weight = shown(message['weight'])
            raise UserError(f'{where}: messages[{i}] ({role}) has weight {weight}; an assistant may have 0 or 1.')
        if message.get('token_ids') is not None and (role != 'assistant' or not _are_ids(message['token_ids'])):
            raise UserError(
                f'{where}: messages[{i}] ({role}): token_ids are a list of whole numbers, and only an assistant has them.'
            )
        system = messages[0]['role'] == 'system'
        due = 'system' if system and i == 0 else ROLES[1 + (i - system) % 2]
        if role != due:
            raise UserError(f'{where}: messages[{i}] has the role {role!r} where {due!r} is due.')
    if messages[-1]['role'] == 'system':
        raise UserError(f'{where}: there is nothing after the system message.')


def _are_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(type(token) is int for token in value)


def has_special_tags(messages: Messages) -> bool:
    """Whether a message of any role holds one of the format's own tags, which Meta's code does not allow (recipe J)."""
    return any(tag in message['content'] for message in messages for tag in SPECIAL_TAGS)


def encode_prompt(messages: Messages, tokenizer: Tokenizer, where: str = 'The dialog') -> list[int]:
    """The ids of a dialog that ends with a user's message, ready for the answer to be sampled.

    They follow the tokenizer's own template, where it has one (`Tokenizer.prompts`), and otherwise LLaMA 2's chat format.

        >>> encode_prompt([{'role': 'user', 'content': 'Hi'}], llama2)  # <s>[INST] Hi [/INST]
        [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]

    Raises:
      UserError: what `check_dialog` finds, or the last message is not the user's.
    """
    check_dialog(messages, where)
    if messages[-1]['role'] != 'user':
        raise UserError(f'{where}: the last message of a prompt must be from the user.')
    if tokenizer.prompts.template:
        return template.encode(messages, tokenizer, where)
    return [token for part in _encode(messages, tokenizer, where) for token in part]


def encode_question(text: str, tokenizer: Tokenizer, chat: bool, where: str = 'The question') -> list[int]:
    """The ids of one text: a user's message for a model that chats, otherwise plain text to continue."""
    if chat:
        return encode_prompt([{'role': 'user', 'content': text}], tokenizer, where)
    return tokenizer.encode(text, bos=True, eos=False)


def encode_dialog(messages: Messages, tokenizer: Tokenizer, where: str = 'The dialog') -> tuple[list[int], list[bool]]:
    """The ids of a dialog that ends with an answer, and for each whether it is trained on.

    Trained are the tokens of the assistant's answers and the EOS after each, unless an answer's weight is 0. The lone space that
    Meta's code writes before EOS belongs to the answer: without it the model would not learn how to get to EOS.

        >>> encode_dialog([{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}], llama2)[0][9:]
        [15043, 29991, 29871, 2]

    Raises:
      UserError: what `check_dialog` finds, or the last message is not the assistant's.
    """
    check_dialog(messages, where)
    if messages[-1]['role'] != 'assistant':
        raise UserError(f'{where}: the last message of a dialog to train on must be from the assistant.')
    answers = [message.get('weight', 1) == 1 for message in messages if message['role'] == 'assistant']
    ids: list[int] = []
    trained: list[bool] = []
    for i, part in enumerate(_encode(messages, tokenizer, where)):
        ids += part
        trained += len(part) * [i % 2 == 1 and answers[i // 2]]
    return ids, trained


def fit_dialog(messages: Messages, tokenizer: Tokenizer, room: int) -> tuple[Messages, int]:
    """Drops the oldest questions with their answers until the prompt has at most `room` tokens; the system message stays.

    Returns:
      The messages that are left, and how many turns (pairs) were dropped.

    Raises:
      UserError: the last message, with the system message, is too long by itself; or not a prompt.
    """
    system = list(messages[:1]) if messages and messages[0]['role'] == 'system' else []
    rest = list(messages[len(system) :])
    dropped = 0
    while (length := len(encode_prompt(system + rest, tokenizer))) > room:
        if len(rest) == 1:
            raise UserError(f'The last message takes {length} tokens, but there is room for {room}.')
        rest = rest[2:]
        dropped += 1
    return system + rest, dropped


def cut_dialog(messages: Messages, tokenizer: Tokenizer, room: int) -> Messages | None:
    """The first turns of a dialog that ends with an answer, as many as fit `room` tokens; None if not even one does."""
    turns = length = 0
    for i, part in enumerate(_encode(messages, tokenizer)):
        length += len(part)
        if length > room:
            break
        turns = (i + 1) // 2
    system = messages[0]['role'] == 'system'
    return messages[: system + 2 * turns] if turns else None


def _encode(messages: Messages, tokenizer: Tokenizer, where: str = 'The dialog') -> list[list[int]]:
    """The ids of each question and answer by turns; the system message is folded into the first question."""
    if messages[0]['role'] == 'system':
        first = f'<<SYS>>\n{messages[0]["content"]}\n<</SYS>>\n\n{messages[1]["content"]}'
        messages = [{'role': 'user', 'content': first}, *messages[2:]]
    return [
        tokenizer.encode(f'[INST] {message["content"].strip()} [/INST]', bos=True, eos=False)
        if message['role'] == 'user'
        else _answer(message, tokenizer, where)
        for message in messages
    ]


def _answer(message: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> list[int]:
    """The ids of an answer with its EOS: those that were drawn, where the message has them."""
    drawn = message.get('token_ids')
    if drawn is None:
        return tokenizer.encode(f'{message["content"].strip()} ', bos=False, eos=True)
    known = all(0 <= token < tokenizer.vocab_size for token in drawn)
    if not known or drawn[-1] != tokenizer.eos_id or tokenizer.eos_id in drawn[:-1]:
        raise UserError(f'{where}: token_ids of an answer are ids of {tokenizer.path} and end with the only EOS.')
    if tokenizer.decode(drawn).strip() != message['content'].strip():
        raise UserError(
            f'{where}: token_ids of an answer are not its content in the tokenizer {tokenizer.path}: they were drawn with '
            'another tokenizer, or the content has been edited. Remove token_ids to train on the content.'
        )
    return list(drawn)
