"""How a model is prompted: as plain text, in LLaMA 2's chat format, or with a chat template that its own files bring.

The ids of a template equal those of `apply_chat_template` of transformers, but for special tokens that a person types.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from llama2_jax.config import UserError
from llama2_jax.text.jinja import render

Messages = Sequence[Mapping[str, Any]]

# What Meta's chat_completion renders, in Jinja (recipe D.1).
LLAMA2_TEMPLATE = """\
{%- set turn = namespace(due='user', opening='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set turn.opening = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] != turn.due -%}
{{- raise_exception('After an optional system message, user and assistant take turns, and the user begins.') -}}
{%- elif turn.due == 'user' -%}
{{- bos_token + '[INST] ' + (turn.opening + message['content']).strip() + ' [/INST]' -}}
{%- set turn.due = 'assistant' -%}{%- set turn.opening = '' -%}
{%- else -%}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{%- set turn.due = 'user' -%}
{%- endif -%}
{%- endfor -%}
"""
MAX_TEMPLATE = 100_000  # characters
# Where the marker ▁ of a leading space goes when a prompt is cut at its special tokens: before each piece of text, as
# SentencePiece does; before each that does not begin with a space; only at the beginning of the prompt; or nowhere.
SPACES = ('prepend', 'always', 'first', 'never')


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a model wants its prompts; the section `prompts` of a model directory's config.json.

    Attributes:
      chat: whether the model answers dialogs; otherwise it continues plain text.
      template: Jinja source of the model's own chat template; '': LLaMA 2's chat format.
      spaces: with a template: one of SPACES.
    """

    chat: bool = False
    template: str = ''
    spaces: str = 'prepend'

    def describe(self, chat: bool | None = None) -> str:
        """The line that tools print before they use a model; `chat` overrides the model's own."""
        if not (self.chat if chat is None else chat):
            return 'prompts: plain text'
        return f'prompts: {"the model’s own template" if self.template else "LLaMA 2’s chat format"}'.replace('’', "'")


def foreign_format(template: Any, name: str, where: str, spaces: str = 'prepend') -> PromptFormat:
    """The format of a model that was not made here: it chats if it has a template, or "chat" or "instruct" in its name.

    Args:
      template: Jinja source, or a list of {'name', 'template'}; None: the model brings none.
      name: of the model's directory or file.
      where: what to call the template in errors.
      spaces: one of SPACES.

    Raises:
      UserError: the template is not text, or too long.
    """
    if isinstance(template, list):  # several, by purpose
        named = {entry.get('name'): entry.get('template') for entry in template if isinstance(entry, dict)}
        template = named.get('default')
    if template is not None and (not isinstance(template, str) or len(template) > MAX_TEMPLATE):
        raise UserError(f'{where}: the chat template is not a text of at most {MAX_TEMPLATE} characters.')
    if not template:
        return PromptFormat('chat' in name.lower() or 'instruct' in name.lower())
    return PromptFormat(True) if _is_llama2(template) else PromptFormat(True, template, spaces)


def _is_llama2(template: str) -> bool:
    """Whether a template renders what Meta's code does: a question, a conversation, and one with a system message."""
    user, answer = {'role': 'user', 'content': ' a\nb '}, {'role': 'assistant', 'content': ' c '}
    system = {'role': 'system', 'content': ' d\n'}
    try:
        return all(
            render(template, dialog, '<s>', '</s>') == render(LLAMA2_TEMPLATE, dialog, '<s>', '</s>')
            for dialog in ([user], [user, answer, user], [system, user, answer, user])
        )
    except UserError:
        return False


def encode(messages: Messages, tokenizer: Any, where: str) -> list[int]:
    """The ids of a dialog in the tokenizer's own template, ready for the answer.

    Raises:
      UserError: what `render` raises, or a message holds one of the special tokens, which only the template may write.
    """
    special, whole = special_tokens(tokenizer)
    for i, message in enumerate(messages):
        if found := next((token for token in special if token in message['content']), None):
            raise UserError(f'{where}: messages[{i}] holds {found!r}, a special token of the model.')
    form = tokenizer.prompts
    text = render(form.template, messages, tokenizer.piece(tokenizer.bos_id), tokenizer.piece(tokenizer.eos_id), where)
    ids: list[int] = []
    for start, part in _split(text, whole):
        ids += [whole[part]] if part in whole else _encode(part, tokenizer, form.spaces, start == 0)
    return ids


def special_tokens(tokenizer: Any) -> tuple[set[str], dict[str, int]]:
    """The tokens that are not text, such as `<s>`; and all that a template's text is cut at, with their ids."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model).pieces
    special = {piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)}
    return special, {p.piece: i for i, p in enumerate(pieces) if p.piece in special or p.type == p.USER_DEFINED}


def _split(text: str, special: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    """The text cut before and after special tokens, each part with its place; of two that begin alike the longer counts."""
    place = 0
    for part in re.split(f'({"|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))})', text):
        if part:
            yield place, part
        place += len(part)


def _encode(text: str, tokenizer: Any, spaces: str, first: bool) -> list[int]:
    if spaces == 'prepend':
        return tokenizer.encode(text, bos=False, eos=False)
    marked = text.startswith((' ', '▁')) or spaces == 'never' or (spaces == 'first' and not first)
    return tokenizer.encode(text, bos=False, eos=False) if not marked else _unprefixed(tokenizer.model).encode(text)


@functools.cache
def _unprefixed(model: bytes) -> SentencePieceProcessor:
    """A tokenizer that puts no space before a text."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())
