"""Answers with a planted fault, of known kind: the worse half of a preference, and the test bed of the oracle."""

import dataclasses
import random
from collections.abc import Sequence

import llama2_jax.toy.instructions as instructions
import llama2_jax.toy.questions as questions
import llama2_jax.toy.reading as reading
import llama2_jax.toy.safety as safety
from llama2_jax.toy.lessons import facts_about
from llama2_jax.toy.oracle import Asked, Messages, Oracle
from llama2_jax.toy.questions import LISTS, Request
from llama2_jax.toy.world import ANIMALS, CRAFTS, make_world

FAULTS = ('wrong', 'incomplete', 'off_topic', 'padded', 'unfinished', 'disobedient', 'refusal', 'harmful')
OTHER_WORLD = 1000  # the same people and towns with other facts


def faulty(oracle: Oracle, rng: random.Random, messages: Messages, fault: str, pool: Sequence[Request]) -> str | None:
    """An answer to the dialog with one fault of `FAULTS`, worse than perfect, or None where this question did not give one.

    Args:
      pool: questions whose answers serve as what nobody asked for.
    """
    asked = oracle.understand(messages)
    plain = Asked(asked.request, ())
    if fault == 'disobedient':
        text = oracle.perfect(plain, rng)
        return None if all(instructions.obeys(instruction, text) for instruction in asked.instructions) else text
    text = {
        'wrong': _wrong,
        'incomplete': _incomplete,
        'off_topic': lambda *_: _other(oracle, rng, plain, pool),
        'padded': lambda *_: _padded(oracle, rng, plain, pool),
        'unfinished': _unfinished,
        'refusal': lambda *_: None if asked.request.kind == 'unsafe' else rng.choice(safety.DECLINES),
        'harmful': lambda *_: safety.danger(asked.request).harm if asked.request.kind == 'unsafe' else None,
    }[fault](oracle, rng, plain)
    text = text and instructions.dress(asked.instructions, text)
    return text if text and oracle.helpfulness(messages, text) < 1 else None  # by chance it may be no fault


def _wrong(oracle: Oracle, rng: random.Random, asked: Asked) -> str | None:
    """What would be right in another world."""
    request = asked.request
    if request.kind in ('unsafe', 'borderline'):
        return None
    if request.kind == 'sum':
        a, sign, b = questions.operands(request.subject)
        return f'{a} {sign} {b} = {questions.OPERATIONS[sign](a, b) + rng.choice((1, 2, 10))}.'
    if request.kind == 'explain':
        things = {f'a {thing.name}': thing for thing in (*ANIMALS, *CRAFTS)}
        if request.subject not in things:
            return None
        thing = things[request.subject]
        other = rng.choice([t for t in things.values() if type(t) is type(thing) and t != thing])
        return ' '.join(facts_about(dataclasses.replace(other, name=thing.name))[1:3])
    right = oracle.perfect(asked, rng)
    for seed in range(OTHER_WORLD, OTHER_WORLD + 20):
        text = questions.respond(make_world(seed), rng, request)
        parts = oracle.parts([{'role': 'user', 'content': questions.ask(rng, request)}], text)
        if text != right and parts['correct'] * parts['complete'] < 0.6:
            return text
    return None


def _incomplete(oracle: Oracle, rng: random.Random, asked: Asked) -> str | None:
    """The first sentence of several, or a list with a name less."""
    request = asked.request
    if request.kind in LISTS:
        return (
            oracle.perfect(Asked(dataclasses.replace(request, count=request.count - 1), ()), rng) if request.count > 2 else None
        )
    sentences = reading.sentences(oracle.perfect(asked, rng))
    return sentences[0] if len(sentences) > 1 else None


def _other(oracle: Oracle, rng: random.Random, asked: Asked, pool: Sequence[Request]) -> str:
    """The right answer to another kind of question."""
    fact, _ = reading.LIST_FIELDS.get(asked.request.kind, (asked.request.kind.split()[-1], None))
    request = rng.choice([r for r in pool if fact not in r.kind.split() and r.kind not in LISTS])
    return oracle.perfect(Asked(request, ()), rng)


def _padded(oracle: Oracle, rng: random.Random, asked: Asked, pool: Sequence[Request]) -> str:
    extra = [_other(oracle, rng, asked, pool) for _ in range(rng.randint(1, 3))]
    return ' '.join([oracle.perfect(asked, rng), *extra])


def _unfinished(oracle: Oracle, rng: random.Random, asked: Asked) -> str:
    words = oracle.perfect(asked, rng).split()
    return ' '.join(words[: rng.randint(1, max(1, len(words) - 1))]).rstrip('.!?')
