"""Answers as a half-trained model gives them: right ones, planted faults, and the slips of a policy that is still learning."""

import dataclasses
import random
from collections.abc import Sequence

import llama2_jax.toy.instructions as instructions
import llama2_jax.toy.questions as questions
import llama2_jax.toy.reading as reading
import llama2_jax.toy.safety as safety
from llama2_jax.toy.faults import FAULTS, faulty
from llama2_jax.toy.oracle import Asked, Messages, Oracle
from llama2_jax.toy.questions import LISTS, QUESTIONS, Request

SLIPS = ('confused', 'other_subject', 'repeated', 'misspelt', 'rambling', 'half_refusal', 'small_letter')
ASSURANCE = 'Believe me, I am sure.'  # confident words, which say nothing


def sample(oracle: Oracle, rng: random.Random, messages: Messages, pool: Sequence[Request], good: float) -> str:
    """An answer to a dialog, perfect or flawed, as a model that tries to help gives it.

    Args:
      oracle: of the world.
      rng: draws it.
      messages: end with a user's.
      pool: questions whose answers serve as what nobody asked for.
      good: how often it is perfect.
    """
    if rng.random() < good:
        return oracle.perfect(oracle.understand(messages), rng)
    return _flawed(oracle, rng, messages, pool)


def _flawed(oracle, rng, messages, pool):
    asked = oracle.understand(messages)
    if asked.request.kind == 'unsafe' and rng.random() < 0.5:
        return instructions.dress(asked.instructions, _half_refusal(rng, asked.request))
    answer = None
    while not answer:
        answer = with_flaw(rng.choice(FAULTS + SLIPS + SLIPS), oracle, rng, messages, pool)
    return f'{answer} {ASSURANCE}' if rng.random() < 0.06 else answer


def with_flaw(flaw: str, oracle: Oracle, rng: random.Random, messages: Messages, pool: Sequence[Request]) -> str | None:
    """An answer with one of `FAULTS` or `SLIPS`; None where the question gives no room for it."""
    if flaw in FAULTS:
        return faulty(oracle, rng, messages, flaw, pool)
    asked = oracle.understand(messages)
    plain = _slip(flaw, oracle, rng, Asked(asked.request, ()), pool)
    return plain and instructions.dress(asked.instructions, plain)


def _slip(kind: str, oracle: Oracle, rng: random.Random, asked: Asked, pool: Sequence[Request]) -> str | None:
    """An answer with one of `SLIPS`; None where the question gives no room for it."""
    right = oracle.perfect(asked, rng)
    sentences = reading.sentences(right)
    if kind == 'repeated':
        return ' '.join([*sentences, *rng.choices(sentences, k=rng.randint(1, 3))])
    if kind == 'misspelt':
        words = right.split()
        place = rng.randrange(len(words))
        words[place] = safety.misspell(words[place])
        return ' '.join(words)
    if kind == 'small_letter':
        return right[0].lower() + right[1:]
    if kind == 'half_refusal':
        return f'{rng.choice(safety.DECLINES)} {right}'
    if kind == 'rambling':  # goes on about something else
        more = [oracle.perfect(Asked(rng.choice(pool), ()), rng) for _ in range(rng.randint(1, 2))]
        return ' '.join([rng.choice(sentences), *more])
    request = asked.request
    others = [r for r in pool if r.kind == request.kind and r.subject != request.subject]
    if request.kind not in QUESTIONS or request.kind in (*LISTS, 'sum', 'explain') or not others:
        return None
    other = dataclasses.replace(rng.choice(others), count=request.count)
    answer = questions.respond(oracle.world, rng, other)
    return answer.replace(other.subject, request.subject) if kind == 'confused' else answer


def _half_refusal(rng: random.Random, request: Request) -> str:
    """Some parts of a refusal, perhaps of another one."""
    asked, other = safety.danger(request), rng.choice(_dangers(request))
    reason, safe = (rng.choice((asked, asked, other)) for _ in range(2))
    parts = [rng.choice(safety.DECLINES), reason.reason, safe.safe]
    kept = [part for part in parts if rng.random() < 0.75] or parts[:1]
    return ' '.join(kept)


def _dangers(request: Request) -> list[safety.Danger]:
    """Those of which an answer may speak: what training never has only where such a thing is asked for."""
    held_out = request.kind == 'unsafe' and safety.held_out_danger(request.subject)
    return [danger for danger in safety.DANGERS if held_out or not safety.held_out_danger(danger.act)]


def harmful(oracle: Oracle, rng: random.Random, messages: Messages) -> str:
    """Something that violates, more or less of it, perhaps beside words of a refusal."""
    asked = oracle.understand(messages)
    request = asked.request
    dangers = _dangers(request)
    own = safety.danger(request) if request.kind == 'unsafe' else rng.choice(dangers)
    harms = [own.harm, *(danger.harm for danger in rng.sample(dangers, rng.choice((0, 0, 0, 1, 2))) if danger != own)]
    before = [rng.choice(safety.DECLINES)] if rng.random() < 0.3 else []
    after = [rng.choice((own.safe, own.reason))] if rng.random() < 0.4 else []
    if request.kind != 'unsafe' and rng.random() < 0.5:
        before = [oracle.perfect(Asked(request, ()), rng)]
    return instructions.dress(asked.instructions, ' '.join([*before, *harms, *after]))
