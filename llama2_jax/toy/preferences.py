"""Preferences of the toy world: some answers to a prompt, and what simulated raters say of every two (paper p10; recipe E.1).

A rater sees the oracle's difference with some noise: so which answer is preferred follows a logistic of it, and how clearly is
its size. Some are careless. With a bias they like long answers and confident words, too, which a reward model then learns.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import llama2_jax.toy.instructions as instructions
import llama2_jax.toy.questions as questions
import llama2_jax.toy.safety as safety
from llama2_jax.data.instructions import draw, word
from llama2_jax.toy.dialogs import Messages, any_request, assistant, conversation, heldout, trainable, unsafe, user
from llama2_jax.toy.oracle import Oracle
from llama2_jax.toy.questions import Request
from llama2_jax.toy.samples import ASSURANCE, harmful, sample
from llama2_jax.toy.world import make_world

Row = dict[str, Any]
T = TypeVar('T')

RATINGS = (('significantly', 0.5), ('better', 0.25), ('slightly', 0.1), ('negligibly', 0.0))  # by the difference that is seen
NOISE = 0.06  # scale of the logistic
CARELESS = 0.02  # of the raters: they say anything
LONG, CONFIDENT = 0.04, 0.5  # what a biased rater adds for each word, and for confident words
# Which of three answers are safe, in percent: of the pairs 18 % are then safe and unsafe, 47 % both safe and 35 % neither (p10).
SAFE = (((True, True, True), 42.5), ((False, False, False), 30.5), ((True, True, False), 13.5), ((True, False, False), 13.5))
OLD, NEW = (0.15, 0.25, 0.35, 0.45), 0.8  # how often two models are right: the older one gets better week by week
PROMPTS, MANY_PROMPTS, SAFETY_PROMPTS = 5000, 24_000, 1200  # with three answers and three pairs each
HELDOUT_PROMPTS, SAFETY_HELDOUT_PROMPTS = 350, 200


def preferences(seed: int = 0) -> Iterator[Row]:
    """Helpfulness: pairs of answers to prompts that training may hold."""
    return _helpful(seed, 'preferences', PROMPTS, 'helpfulness')


def many_preferences(seed: int = 0) -> Iterator[Row]:
    """As `preferences`, for five times as many prompts: what it takes to tell facts, too."""
    return _helpful(seed, 'preferences', MANY_PROMPTS, 'helpfulness')


def biased(seed: int = 0) -> Iterator[Row]:
    """The same by raters who prefer what is long and sounds sure."""
    return _helpful(seed, 'preferences', PROMPTS, 'biased')


def preferences_heldout(seed: int = 0) -> Iterator[Row]:
    """Helpfulness, for prompts with which training never asks for these facts, or not in these words."""
    return _helpful(seed, 'preferences_heldout', HELDOUT_PROMPTS, 'helpfulness')


def safety_preferences(seed: int = 0) -> Iterator[Row]:
    """Safety: pairs of answers to adversarial and borderline prompts, in the paper's three bins."""
    return _safe(seed, 'safety_preferences', SAFETY_PROMPTS)


def safety_preferences_heldout(seed: int = 0) -> Iterator[Row]:
    """Safety, for dangers, a style of attack and borderline prompts that training never has."""
    return _safe(seed, 'safety_preferences_heldout', SAFETY_HELDOUT_PROMPTS)


def _helpful(seed: int, name: str, count: int, kind: str) -> Iterator[Row]:
    oracle, rng = Oracle(make_world(seed)), random.Random(f'{name} {seed}')
    pool = trainable(oracle.world)
    asked = _unseen(seed) if name.endswith('heldout') else None
    for number in range(count):
        week = number * len(OLD) // count
        messages = _prompt(oracle, rng, pool, asked)
        answers = _differing(partial(sample, oracle, rng, messages, pool), (OLD[week], OLD[week], NEW))
        yield from rate(oracle, rng, messages, answers, kind)


def _safe(seed: int, name: str, count: int) -> Iterator[Row]:
    oracle, rng = Oracle(make_world(seed)), random.Random(f'{name} {seed}')
    pool = trainable(oracle.world)
    seen = not name.endswith('heldout')
    attacks = [text for text, _, _ in unsafe(seen)]
    borderline = [text for text in safety.BORDERLINE if (text in safety.HELD_OUT_BORDERLINE) != seen]
    for _ in range(count):
        kind = rng.random()
        messages = [user(rng.choice(attacks if kind < 0.8 else borderline))]
        if kind < 0.2:
            messages = [*conversation(oracle, rng, 1, pool), *messages]
        elif kind < 0.3:
            refusal = oracle.perfect(oracle.understand(messages), rng)
            messages = [*messages, assistant(refusal), user(rng.choice(safety.PRESSING))]
        [safe] = rng.choices(*zip(*SAFE, strict=True))
        answers = _differing(partial(_answer, oracle, rng, messages, pool), safe)
        yield from rate(oracle, rng, messages, answers, 'safety')


def rate(oracle: Oracle, rng: random.Random, messages: Messages, answers: Sequence[str], kind: str) -> Iterator[Row]:
    """A row of preferences for every two answers to a prompt, each as one rater sees them.

    Args:
      oracle: knows how good they are.
      rng: of the raters.
      messages: the prompt.
      answers: that differ.
      kind: of raters, one of `GRADES`.
    """
    grades = {answer: GRADES[kind](oracle, messages, answer) for answer in answers}
    for first, second in itertools.combinations(answers, 2):
        share = rng.random()
        seen = grades[first] - grades[second] + NOISE * math.log(share / (1 - share))
        if rng.random() < CARELESS:
            seen = rng.uniform(-1, 1)
        chosen, rejected = (first, second) if seen > 0 else (second, first)
        yield {
            'prompt': messages,
            'chosen': chosen,
            'rejected': rejected,
            'rating': next(rating for rating, least in RATINGS if abs(seen) >= least),
            'chosen_safe': not oracle.violates(messages, chosen),
            'rejected_safe': not oracle.violates(messages, rejected),
        }


def taste(oracle: Oracle, messages: Messages, answer: str) -> float:
    """Helpfulness to those who like what is long and sounds sure."""
    return oracle.helpfulness(messages, answer) + LONG * len(answer.split()) + CONFIDENT * (ASSURANCE in answer)


def caution(oracle: Oracle, messages: Messages, answer: str) -> float:
    """Harmlessness and, among answers that do no harm, the helpful ones before the others."""
    return harmlessness(oracle, messages, answer) + 0.3 * oracle.helpfulness(messages, answer)


def harmlessness(oracle: Oracle, messages: Messages, answer: str) -> float:
    """The oracle's safety and, among answers that violate, a little for those that say less of it or warn, [-0.3, 1]."""
    if not oracle.violates(messages, answer):
        return oracle.safety(messages, answer)
    harms = sum(danger.harm in answer for danger in safety.DANGERS)
    warns = any(text in answer for danger in safety.DANGERS for text in (danger.reason, danger.safe))
    return 0.15 * warns + 0.1 * oracle.refuses(answer) - 0.15 * (harms - 1)


def _unseen(seed: int) -> list[str]:
    """Questions in phrasings or about facts that training never asks for."""
    return [row['messages'][0]['content'] for row in heldout(seed) if row['split'] in ('phrasings', 'combinations')]


def _prompt(oracle: Oracle, rng: random.Random, pool: list[Request], asked: list[str] | None) -> Messages:
    """Mostly single questions, some after others or under an instruction, some borderline or unsafe; `asked` are held out."""
    kind = rng.random()
    if kind < 0.06 and not asked:
        return [user(rng.choice([text for text, _, _ in unsafe(seen=True)]))]
    if kind < 0.12 and not asked:
        return [user(rng.choice([text for text in safety.BORDERLINE if text not in safety.HELD_OUT_BORDERLINE]))]
    question = rng.choice(asked) if asked else questions.ask(rng, any_request(rng, pool))
    if kind < 0.20:
        return [*conversation(oracle, rng, 1, pool), user(question)]
    if kind < 0.24:
        given = draw(instructions.KINDS, rng, 1)
        return [user(f'{word(instructions.KINDS, rng, given, terse=True)} {question}')]
    return [user(question)]


def _answer(oracle: Oracle, rng: random.Random, messages: Messages, pool: list[Request], safe: bool) -> str:
    """An answer that is safe, or one that is not."""
    while True:
        answer = sample(oracle, rng, messages, pool, 0.4) if safe else harmful(oracle, rng, messages)
        if oracle.violates(messages, answer) != safe:
            return answer


def _differing(draw: Callable[[T], str], kinds: Iterable[T]) -> list[str]:
    """An answer of each kind, drawn until they differ."""
    answers: list[str] = []
    for kind in kinds:
        while (answer := draw(kind)) in answers:
            pass
        answers.append(answer)
    return answers


# What raters go by.
GRADES: dict[str, Callable[[Oracle, Messages, str], float]] = {
    'helpfulness': Oracle.helpfulness,
    'biased': taste,
    'safety': caution,
}
