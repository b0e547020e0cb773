"""A conversation with a model, in memory and on a terminal."""

import contextlib
import json
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

from llama2_jax.config import UserError
from llama2_jax.model.engine import Engine, Request, Sample
from llama2_jax.text.dialog import SPECIAL_TAGS_ERROR, encode_prompt, fit_dialog, has_special_tags

HELP = """/reset          begins a new conversation
/system [TEXT]  gives a system message, or takes it away; begins a new conversation
/save FILE      adds the conversation to a .jsonl file, as experiments/sft.py reads it
/exit           ends, as does the end of the input"""


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
        """Begins a new conversation."""
        self.messages = [{'role': 'system', 'content': system}] if system else []

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; notes stand in brackets on lines of their own. Where it ends early, what was given counts.

        Raises:
          UserError: the question is empty or too long by itself, or it holds a tag of the chat format.
        """
        messages = [*self.messages, {'role': 'user', 'content': question}]
        if has_special_tags(messages):
            raise UserError(SPECIAL_TAGS_ERROR.removeprefix('Error: '))
        context = self._engine.config.context
        longest = self._settings.get('max_new_tokens', Request([0]).max_new_tokens)
        fitting, dropped = fit_dialog(messages, self._engine.tokenizer, context - min(longest, context // 2))
        if dropped:
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
            yield '\n[the answer is cut off: it is as long as it may be]'

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
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '').strip()
        except EOFError:
            return
        command, _, rest = line.partition(' ')
        if command == '/exit':
            return
        try:
            _obey(chat, command, rest.strip(), line)
        except UserError as error:
            print(f'[{error}]', flush=True)


def _obey(chat: Chat, command: str, rest: str, line: str) -> None:
    if command == '/reset':
        system = chat.messages[0]['content'] if chat.messages and chat.messages[0]['role'] == 'system' else ''
        chat.reset(system)
    elif command == '/system':
        chat.reset(rest)
    elif command == '/save':
        if not rest:
            raise UserError('/save FILE: the name of the file is missing.')
        chat.save(rest)
        print(f'[saved to {rest}]', flush=True)
    elif command == '/help' or command.startswith('/'):
        print(HELP, flush=True)
    elif line:
        try:
            for piece in chat.ask(line):
                print(piece, end='', flush=True)
        except KeyboardInterrupt:
            pass
        print('\n', flush=True)
