"""What a task is: examples, how a model is asked, and how its outputs are graded. A task is data; `evals.tasks` lists them."""

import dataclasses
import math
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llama2_jax.config import UserError
from llama2_jax.evals.files import Files

Record = dict[str, Any]  # 'prediction', and measures: floats, of which means are taken
Given = Mapping[str, Sequence[Any]]  # by the name of a helper, its answer about each sample


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      target: what grading compares with.
      prompt: a text to continue, or the messages of a dialog to answer.
      chat: what a chat model is asked without solved examples, where that is something else.
      choices: or pairs (context, continuation), whose likelihoods are compared.
      group: part of the set, such as a subject, or several; measures are also given for each.
      data: what else grading reads.
    """

    target: Any
    prompt: str | Sequence[Mapping[str, str]] = ''
    chat: str = ''
    choices: tuple[tuple[str, str], ...] = ()
    group: str | tuple[str, ...] = ''
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How continuations are drawn; a chat model's answer also ends with EOS, and is not cut at `stop`.

    Attributes:
      max_new_tokens: Of a continuation.
      chat_tokens: Of a chat model's answer, which explains itself; 0: as many as of a continuation.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    chat_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      read: (files, shots) -> its examples.
      grade: (example, outputs, given) -> record; outputs are the log-likelihoods of the choices, or the samples.
      home: where its files are to be had.
      shots: solved examples in the prompt, as in the paper.
      chat_shots: those that a chat model is shown; None: as many.
      max_shots: of solved examples, at most; None: as many as there are in a train file.
      decoding: None where choices are compared.
      measures: of the records, the first that they have is the headline.
      helpers: what is asked of whom about each sample before grading: name -> (example, text of the sample) -> question;
        the helpers are those of `stages.evaluate`.
      requires: helpers without which the task cannot be graded.
    """

    name: str
    read: Callable[[Files, int], list[Example]]
    grade: Callable[[Example, Sequence[Any], Given], Record]
    home: str
    shots: int = 0
    chat_shots: int | None = None
    max_shots: int | None = 0
    decoding: Decoding | None = None
    measures: tuple[str, ...] = ('correct',)
    helpers: Mapping[str, Callable[[Example, str], Any]] = dataclasses.field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def examples(self, files: Files) -> list[Example]:
        """What `read` finds.

        Raises:
          UserError: A file is damaged, or a row is none of this benchmark's; or there are no examples.
        """
        try:
            examples = self.read(files, self.shots)
        except (LookupError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError) as error:
            reason = f'{type(error).__name__}: {error}'
            raise UserError(f'{files.place} is no row of {self.name} as {self.home} publishes it ({reason}).') from error
        if not examples:
            raise UserError(f'{self.name}: {", ".join(files.used)} holds no examples.')
        return examples

    def headline(self, means: Mapping[str, float]) -> str:
        """The measure that stands for the task."""
        return next(name for name in self.measures if name in means)


def best(example: Example, logprobs: Sequence[float], given: Given) -> Record:
    """The likeliest choice."""
    return _chosen(example, logprobs)


def best_per_character(example: Example, logprobs: Sequence[float], given: Given) -> Record:
    """The choice of the highest likelihood per character (LLaMA 1's rule, recipe I.1)."""
    lengths = [len(continuation.strip()) for _, continuation in example.choices]
    return _chosen(example, [logprob / max(length, 1) for logprob, length in zip(logprobs, lengths, strict=True)])


def best_against_answer(example: Example, logprobs: Sequence[float], given: Given) -> Record:
    """The choice of the highest P(choice | question) / P(choice | "Answer:"); the second half of the choices are the latter."""
    half = len(logprobs) // 2
    return _chosen(example, np.subtract(logprobs[:half], logprobs[half:]).tolist())


def against_answer(choices: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Choices, and the same ones again after "Answer:" alone."""
    return (*choices, *(('Answer:', continuation) for _, continuation in choices))


def _chosen(example: Example, scores: Sequence[float]) -> Record:
    prediction = int(np.argmax(scores))
    return {'prediction': prediction, 'correct': float(prediction == example.target)}


def pass_at(k: int, samples: int, passed: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right (Chen et al. 2021).

    >>> pass_at(1, 5, 2)
    0.4
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def passes(outcomes: Sequence[bool]) -> Record:
    """The estimates for 1, 10, 80 and 100, as far as there are samples; 'correct' is that for 1."""
    rates = {k: pass_at(k, len(outcomes), sum(outcomes)) for k in (1, 10, 80, 100) if k <= len(outcomes)}
    return {'correct': rates[1]} | {f'pass@{k}': rate for k, rate in rates.items()}


def votes(answers: Sequence[str], right: Callable[[str], bool]) -> Record:
    """The most frequent answer of several samples (the first of equals), and how often a single one is right."""
    given = [answer for answer in answers if answer] or ['']
    prediction = max(given, key=given.count)
    record = {'prediction': prediction, 'correct': float(right(prediction))}
    if len(answers) > 1:
        record |= {f'maj1@{len(answers)}': record['correct'], 'maj1@1': float(np.mean([right(answer) for answer in answers]))}
    return record


# Answers in words


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces (recipe I.1; SQuAD's own rule, and Unicode's punctuation).

    A text of nothing else, such as the band "The The", stays as it is: what is empty would equal an empty answer.

    >>> normalise('The  Eiffel-Tower.')
    'eiffeltower'
    """
    lower = unicodedata.normalize('NFC', text).lower().strip()
    bare = ''.join(letter for letter in lower if letter not in string.punctuation and unicodedata.category(letter)[0] != 'P')
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', bare).split()) or lower


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Whether it is one of the answers, normalised."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers} - {''})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best overlap of normalised words with an answer, as SQuAD measures it."""

    def one(answer: str) -> float:
        ours, theirs = normalise(prediction).split(), normalise(answer).split()
        common = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
        return 2 * common / (len(ours) + len(theirs)) if common else 0.0

    return max((one(answer) for answer in answers), default=0.0)


def short_answer(text: str) -> str:
    """The first line, cut at its first comma, without a final dot (recipe I.1).

    >>> short_answer(' St. Paul, Minnesota.\\nQ:')
    'St. Paul'
    """
    return re.split(r'\n|,(?=\s|$)', text.strip(), maxsplit=1)[0].strip().rstrip('.')
