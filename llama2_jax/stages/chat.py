"""A conversation with a model, in memory and on a terminal."""

import contextlib
import io
import json
import re
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

from llama2_jax.config import UserError
from llama2_jax.inference.engine import Engine, Request, Sample
from llama2_jax.text.dialog import SPECIAL_TAGS_ERROR, encode_prompt, fit_dialog, has_special_tags
from llama2_jax.text.printable import printable

HELP = """/reset          begins a new conversation
/system [TEXT]  gives a system message, or takes it away; begins a new conversation
/save FILE      adds the conversation to a .jsonl file, as experiments/sft.py reads it
/exit           ends, as does the end of the input
A message that begins like a command is asked with a backslash before it: \\/reset"""


class Chat:
    """Questions and answers so far.

    Args:
      engine: of a chat model.
      system: a system message; '' for none.
      settings: fields of `Request`, such as temperature.

    Attributes:
      messages: of the conversation, the system message first.
    """

    def __init__(self, engine: Engine, system: str = '', **settings: float):
        self._engine, self._settings = engine, settings
        self.reset(system)

    def reset(self, system: str) -> None:
        """Begins a new conversation.

        Raises:
          UserError: the system message is blank, holds a tag of the chat format or does not fit the context.
        """
        if system:
            self._check_system(system)
        self.messages = [{'role': 'system', 'content': system}] if system else []

    def _room(self) -> int:
        """Tokens that a prompt may have: the answer needs the rest of the context."""
        context = self._engine.config.context
        return context - min(self._settings.get('max_new_tokens', Request([0]).max_new_tokens), context // 2)

    def _check_system(self, system: str) -> None:
        if not system.strip():
            raise UserError('The system message is blank: leave it out, or write one.')
        message = {'role': 'system', 'content': system}
        if has_special_tags([message]):
            raise UserError(f'The system message: {SPECIAL_TAGS_ERROR.removeprefix("Error: ")}')
        prompt = [message, {'role': 'user', 'content': '?'}]
        if (length := len(encode_prompt(prompt, self._engine.tokenizer, 'The system message'))) > self._room():
            raise UserError(f'The system message takes {length} tokens, but there is room for {self._room()}.')

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; notes stand in brackets on lines of their own. Where it ends early, what was given counts.

        Raises:
          UserError: the question is empty or too long by itself, or it holds a tag of the chat format.
        """
        asked = {'role': 'user', 'content': question}
        messages = [*self.messages, asked]
        if has_special_tags([asked]):  # not in what the model has written itself
            raise UserError(SPECIAL_TAGS_ERROR.removeprefix('Error: '))
        fitting, dropped = fit_dialog(messages, self._engine.tokenizer, self._room())
        if dropped:
            context = self._engine.config.context
            yield f'[the oldest {dropped} of {len(messages) // 2} turns no longer fit the context of {context} tokens]\n'
        # Other draws for each turn, the same for the same conversation.
        seed = zlib.crc32(f'{self._settings.get("seed", 0)} {len(messages)}'.encode())
        prompt = encode_prompt(fitting, self._engine.tokenizer)
        request = Request(prompt, answer=True, **{**self._settings, 'seed': seed})
        given: list[str] = []
        try:
            sample = yield from _noted(self._engine.stream(request), given)
        finally:
            if answer := ''.join(given).strip():
                self.messages = [*messages, {'role': 'assistant', 'content': answer}]
        if sample.stop_reason == 'length':
            yield '\n[truncated at max_new_tokens]'

    def save(self, path: str) -> None:
        """Adds the conversation to a .jsonl file.

        Raises:
          UserError: there is nothing to save, or the file cannot be written.
        """
        if not any(message['role'] == 'assistant' for message in self.messages):
            raise UserError('There is nothing to save yet.')
        try:
            with Path(path).open('a', encoding='utf-8') as file:
                file.write(json.dumps({'messages': self.messages}, ensure_ascii=False) + '\n')
        except OSError as error:
            raise UserError(f'{path} cannot be written: {error.strerror}.') from None


def _noted(stream: Generator[str, None, Sample], given: list[str]) -> Generator[str, None, Sample]:
    """The stream, its pieces noted in `given`."""
    with contextlib.closing(stream):
        while True:
            try:
                piece = next(stream)
            except StopIteration as end:
                return end.value
            given.append(piece)
            yield piece


def converse(chat: Chat) -> None:
    """Talks with whoever types; without a terminal, with the lines of the input. Ctrl-C ends an answer."""
    if sys.stdin.isatty():
        print(f'Type a message, or\n{HELP}\n')
    for message in typed():
        command, _, rest = message.partition(' ')
        if command == '/exit':
            return
        try:
            _obey(chat, command, rest.strip(), message)
        except UserError as error:
            print(f'[{printable(str(error))}]', flush=True)


def typed() -> Iterator[str]:
    """What is typed, message by message; what is not UTF-8 becomes U+FFFD.

    On a terminal readline edits a line and keeps a history, and lines that are pasted together are one message.
    """
    if not sys.stdin.isatty():
        for line in io.TextIOWrapper(sys.stdin.buffer, 'utf-8', 'replace') if hasattr(sys.stdin, 'buffer') else sys.stdin:
            yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # `input` uses it from then on

        # A paste would end at its first newline otherwise; the terminal says where it begins and ends, and readline listens.
        readline.parse_and_bind('set enable-bracketed-paste on')
    while True:
        try:
            yield input('> ').encode('utf-8', 'replace').decode().strip()
        except (EOFError, UnicodeDecodeError) as error:
            if isinstance(error, EOFError):
                return
            print('[This is not UTF-8: type it again.]', flush=True)


def _obey(chat: Chat, command: str, rest: str, message: str) -> None:
    if command == '/reset':
        system = chat.messages[0]['content'] if chat.messages and chat.messages[0]['role'] == 'system' else ''
        chat.reset(system)
    elif command == '/system':
        chat.reset(rest)
    elif command == '/save':
        if not rest:
            raise UserError('/save FILE: the name of the file is missing.')
        chat.save(rest)
        print(f'[saved to {printable(rest)}]', flush=True)
    elif command == '/help':
        print(HELP, flush=True)
    elif re.fullmatch('/[a-z]*', command):
        raise UserError(f'{command} is not a command; /help lists them. To ask about it, write \\{command} ….')
    elif message:
        try:
            for piece in chat.ask(message.removeprefix('\\') if message.startswith('\\/') else message):
                print(printable(piece), end='', flush=True)
        except KeyboardInterrupt:
            pass
        print('\n', flush=True)
