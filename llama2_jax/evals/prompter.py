"""Examples as a model reads them: plain text for base models, a user's message for chat models; and the model's outputs."""

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama2_jax.evals.task import Example, Task
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.text.dialog import encode_prompt, encode_question
from llama2_jax.text.tokenizer import Tokenizer


class Output(NamedTuple):
    """What a model makes of an example.

    Attributes:
      index: of the example.
      outputs: log-likelihoods of the choices, or samples {'text', 'stop_reason'}.
      prompt_hash: of the token ids that it was asked with.
      tokens: read and written.
    """

    index: int
    outputs: list[Any]
    prompt_hash: str
    tokens: int


class Prompter:
    """Asks one model.

    Args:
      engine: of the model.
      chat: whether the chat format is used; dialogs always use it.
      seed: of the samples, with the name of the task and the number of the example.

    Attributes:
      chat: as given.
      cut: how many prompts were too long for the context, and so lost their beginnings.
    """

    def __init__(self, engine: Engine, chat: bool, seed: int = 0):
        self._engine, self.chat, self._seed = engine, chat, seed
        self.cut = 0

    def ask(self, task: Task, examples: Mapping[int, Example]) -> Iterator[Output]:
        """The outputs for examples by their numbers, in whatever order is quick."""
        return self._compare(examples) if task.decoding is None else self._continue(task, examples)

    def _compare(self, examples: Mapping[int, Example]) -> Iterator[Output]:
        numbers = list(examples)
        questions = [self._choices(examples[number].choices) for number in numbers]
        for place, logprobs in self._engine.log_likelihoods(questions):
            ids = [[*context, *continuation] for context, continuation in questions[place]]
            yield Output(numbers[place], logprobs, _hash(ids), sum(map(len, ids)))

    def _choices(self, choices: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """The ids of contexts and continuations, which fit the context."""
        tokenizer, most = self._engine.tokenizer, self._engine.config.context
        if self.chat:
            prompts = {context: encode_question(context, tokenizer, chat=True) for context, _ in choices}
            pairs = [(prompts[context], tokenizer.encode(text.strip(), bos=False, eos=False)) for context, text in choices]
        else:
            pairs = encode_pairs(choices, tokenizer)
        self.cut += any(len(context) + len(ids) > most for context, ids in pairs)
        return [(cut_left(context, most - len(ids)), ids) for context, ids in pairs]

    def _continue(self, task: Task, examples: Mapping[int, Example]) -> Iterator[Output]:
        requests = {number: self._request(task, number, example) for number, example in examples.items()}
        numbers = sorted(requests, key=lambda number: len(requests[number].token_ids))
        results = self._engine.generate(requests[number] for number in numbers)
        for number, samples in zip(numbers, results, strict=True):
            ids = requests[number].token_ids
            outputs = [{'text': sample.text, 'stop_reason': sample.stop_reason} for sample in samples]
            yield Output(number, outputs, _hash([ids]), len(ids) + sum(len(sample.token_ids) for sample in samples))

    def _request(self, task: Task, number: int, example: Example) -> Request:
        tokenizer, how, prompt = self._engine.tokenizer, task.decoding, example.prompt
        chat = self.chat or not isinstance(prompt, str)
        if chat:
            question = prompt if task.shots else example.chat or prompt
            messages = [{'role': 'user', 'content': question}] if isinstance(prompt, str) else prompt
            ids = encode_prompt(messages, tokenizer, f'{task.name} example {number}')
        else:
            ids = tokenizer.encode(prompt, bos=True, eos=False)
        new = chat and how.chat_tokens or how.max_new_tokens
        room = max(self._engine.config.context - new, self._engine.config.context // 2)
        self.cut += len(ids) > room
        return Request(
            cut_left(ids, room),
            max_new_tokens=new,
            num_samples=how.samples,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=zlib.crc32(f'{self._seed} {task.name} {number}'.encode()),
            stop=() if chat else how.stop,
            answer=chat,
        )


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """The ids of (context, continuation) pairs, encoded together as the text they make, so that no token ends at their border.

    Spaces at the end of a context belong to the continuation (as in lm-evaluation-harness).
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs], bos=True, eos=False)
    lengths = {context: len(tokenizer.encode(context, bos=True, eos=False)) for context in set(contexts)}
    cuts = [min(lengths[context], len(whole) - 1) for context, whole in zip(contexts, wholes, strict=True)]
    return [(whole[:cut], whole[cut:]) for whole, cut in zip(wholes, cuts, strict=True)]


def cut_left(ids: list[int], room: int) -> list[int]:
    """The last ids, but BOS stays."""
    return ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


def _hash(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(repr([list(ids) for ids in sequences]).encode()).hexdigest()[:12]
