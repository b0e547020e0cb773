"""Dialogs with a model in which it goes on from its own answers: many at a time, turn by turn."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llama2_jax.inference.engine import Engine, Request
from llama2_jax.text.dialog import encode_prompt, fit_dialog, has_special_tags


def multi_turn_rollout(
    engine: Engine,
    questions: Sequence[Sequence[str]],
    systems: Sequence[str] = (),
    names: Sequence[int] = (),
    tries: int = 1,
    accept: Callable[[int, str], bool] = lambda place, answer: True,
    **settings: float,
) -> list[list[dict[str, Any]]]:
    """The answers of each dialog as messages (`answered`); where the context is full, the model no longer sees the oldest turns.

    A dialog ends early where no answer is accepted, and at one that nothing can follow (`usable`). The model reads its earlier
    answers as text, as it does in a chat.

    Args:
      engine: of the model.
      questions: what the user says, turn by turn, of each dialog.
      systems: the system message of each; '' or no list for none.
      names: of each, of which with `seed` its draws are made; by default its place.
      tries: answers drawn at a turn until one is accepted.
      accept: of a dialog's place and an answer, whether it will do.
      **settings: fields of `Request`: max_new_tokens, and others such as temperature.
    """
    dialogs = [[{'role': 'system', 'content': text}] if text else [] for text in systems or [''] * len(questions)]
    answers: list[list[dict[str, Any]]] = [[] for _ in questions]
    room = engine.config.context - settings['max_new_tokens']

    def request(i: int, turn: int, number: int) -> Request:
        prompt = encode_prompt(fit_dialog(dialogs[i], engine.tokenizer, room)[0], engine.tokenizer)
        seed = zlib.crc32(f'{settings.get("seed", 0)} {names[i] if names else i} {turn} {number}'.encode())
        return Request(prompt, answer=True, **{**settings, 'seed': seed})

    for turn in range(max(map(len, questions), default=0)):
        waiting = [i for i in range(len(questions)) if len(answers[i]) == turn < len(questions[i])]
        for i in waiting:
            dialogs[i].append({'role': 'user', 'content': questions[i][turn]})
        for number in range(tries):
            samples = engine.generate([request(i, turn, number) for i in waiting])
            for i, [sample] in zip(waiting, samples, strict=True):
                text = usable(sample)
                if text and accept(i, text):
                    dialogs[i].append({'role': 'assistant', 'content': text})
                    answers[i].append(answered(sample))
            waiting = [i for i in waiting if len(answers[i]) == turn]
    return answers


class Answer(Protocol):
    """What a model drew: a `Sample`, or a rollout made of one."""

    @property
    def text(self) -> str:
        """The answer."""

    @property
    def token_ids(self) -> list[int]:
        """Its ids as drawn."""

    @property
    def stop_reason(self) -> str:
        """'eos', if it is whole."""


def usable(answer: Answer) -> str:
    """The text of an answer; '' for one that cannot be part of a dialog.

    That is one without text, with a tag of the chat format, cut off, or with bytes that are no text (U+FFFD stands for them).
    """
    text = answer.text.strip()
    bad = answer.stop_reason != 'eos' or '\N{REPLACEMENT CHARACTER}' in text or has_special_tags([{'content': text}])
    return '' if bad else text


def answered(answer: Answer) -> dict[str, Any]:
    """The assistant's message of a usable answer, with the ids that were drawn, so that no other encoding is trained on."""
    return {'role': 'assistant', 'content': usable(answer), 'token_ids': answer.token_ids}
