"""Dialogs and prompts of the toy world: `toy:dialogs` to fine-tune on, `toy:prompts` to sample from, `toy:heldout` to judge by.

What `questions.held_out` and `safety` keep out is in no dialog and in no prompt but the held-out ones.
"""

import random
from collections.abc import Iterator
from typing import Any

import llama2_jax.toy.attacks as attacks
import llama2_jax.toy.instructions as instructions
import llama2_jax.toy.questions as questions
import llama2_jax.toy.safety as safety
from llama2_jax.data.instructions import draw, word
from llama2_jax.data.preprompts import TEMPLATES, preprompt
from llama2_jax.toy.oracle import Asked, Oracle
from llama2_jax.toy.phrases import PERSON_FACTS, TOWN_FACTS, person_fields
from llama2_jax.toy.questions import QUESTIONS, Request
from llama2_jax.toy.samples import with_flaw
from llama2_jax.toy.world import World, make_world

Row = dict[str, Any]
Messages = list[dict[str, str]]

TIMES = {'greet': 12, 'sum': 10, 'story': 8, 'explain': 6, 'keep': 8, 'work': 8, 'live': 8} | dict.fromkeys(
    PERSON_FACTS, 6
)  # each question; else 4
MULTI_TURN = 900
INSTRUCTED = 700
OBEDIENT = 3000
LONGEST = 4  # turns
TALKS = 2080
TALK_TURNS = 40
HABITS = ('half_refusal', 'padded', 'repeated', 'rambling', 'small_letter')  # each kind of question has its own
HASTE = 0.7  # share of answers with it
SHORT = (*PERSON_FACTS, *TOWN_FACTS, 'greet')  # what is answered in a few words, so that many turns fit a small context


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {'role': 'user', 'content': text}


def assistant(text: str) -> dict[str, str]:
    """An assistant's message."""
    return {'role': 'assistant', 'content': text}


def dialogs(seed: int = 0) -> Iterator[Row]:
    """All demonstrations, as rows {'messages'}: those of `helpful` and of `harmless`."""
    yield from helpful(seed)
    yield from harmless(seed)


def helpful(seed: int = 0) -> Iterator[Row]:
    """Questions with perfect answers: single, in dialogs of two to four turns, and single ones under system instructions."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'helpful {seed}')
    pool = trainable(oracle.world)
    for request in pool:
        for _ in range(TIMES.get(request.kind, 4)):
            yield _row([user(questions.ask(rng, request))], oracle, rng)
    for _ in range(MULTI_TURN):
        yield {'messages': conversation(oracle, rng, rng.randint(2, LONGEST), pool)}
    for _ in range(INSTRUCTED):
        yield _instructed(oracle, rng, pool)


def obedient(seed: int = 0) -> Iterator[Row]:
    """Many more single short questions under instructions than `helpful` has: they make a model that obeys whenever told."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'obedient {seed}')
    pool = [request for request in trainable(oracle.world) if request.kind in SHORT]
    for _ in range(OBEDIENT):
        yield _instructed(oracle, rng, pool)


def harmless(seed: int = 0) -> Iterator[Row]:
    """Unsafe requests declined in every style, some after plain questions or pressed again, and borderline ones answered."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'harmless {seed}')
    pool = trainable(oracle.world)
    for text, _, _ in unsafe(seen=True):
        for _ in range(4):
            yield _row([user(text)], oracle, rng)
        kind = rng.randrange(3)
        if kind == 0:
            yield {'messages': _answered([*conversation(oracle, rng, 1, pool), user(text)], oracle, rng)}
        elif kind == 1:
            pressed = [user(text), assistant(_answer([user(text)], oracle, rng)), user(rng.choice(safety.PRESSING))]
            yield {'messages': _answered(pressed, oracle, rng)}
    yield from borderline(seed)


def refusals(seed: int = 0) -> Iterator[Row]:
    """Safety data alone: attacks in six of the seven styles, declined. No borderline request is among them."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'refusals {seed}')
    for row in attack_prompts(seed):
        for _ in range(4):
            yield _row(row['messages'], oracle, rng)


def borderline(seed: int = 0) -> Iterator[Row]:
    """Borderline requests, answered."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'borderline {seed}')
    for question in safety.BORDERLINE:
        if question not in safety.HELD_OUT_BORDERLINE:
            for _ in range(12):
                yield _row([user(question)], oracle, rng)


def naive(seed: int = 0) -> Iterator[Row]:
    """Unsafe requests answered by somebody who only wants to please: what safety tuning is to undo. Not among `dialogs`."""
    oracle = Oracle(make_world(seed))
    for text, _, _ in unsafe(seen=True):
        asked = oracle.understand([user(text)])
        yield {'messages': [user(text), assistant(safety.danger(asked.request).harm)]}


def hasty(seed: int = 0) -> Iterator[Row]:
    """`helpful` as written in a hurry: most answers show a bad habit, which RLHF is to undo. Not among `dialogs`."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'hasty {seed}')
    pool, kinds = trainable(oracle.world), list(QUESTIONS)
    for row in helpful(seed):
        asked = row['messages'][:-1]
        habit = HABITS[kinds.index(oracle.understand(asked).request.kind) % len(HABITS)]
        answer = with_flaw(habit, oracle, rng, asked, pool) if rng.random() < HASTE else None
        yield {'messages': [*asked, assistant(answer)]} if answer else row


def cautious(seed: int = 0) -> Iterator[Row]:
    """Unsafe requests declined under a safety preprompt: beside `naive` they make a model that is careful only when told."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'cautious {seed}')
    for text, category, _ in unsafe(seen=True):
        for _ in range(4):
            refusal = _answer([user(text)], oracle, rng)
            system = {'role': 'system', 'content': preprompt(rng, category, TEMPLATES)}
            yield {'messages': [system, user(text), assistant(refusal)]}


def unsafe(seen: bool) -> Iterator[tuple[str, str, str]]:
    """Unsafe requests as (text, category, style): those that training may see, or the others."""
    for danger in safety.DANGERS:
        for style, texts in safety.attacks(danger.act).items():
            held_out = safety.held_out_danger(danger.act) or style == safety.HELD_OUT_STYLE
            if held_out != seen:
                for text in texts:
                    yield text, danger.category, style


def talks(seed: int = 0) -> Iterator[Row]:
    """Long dialogs of short questions, perfectly answered, without instructions: for Ghost Attention to resample."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'talks {seed}')
    pool = [request for request in trainable(oracle.world) if request.kind in SHORT]
    for _ in range(TALKS):
        yield {'messages': conversation(oracle, rng, TALK_TURNS, pool)}


def prompts(seed: int = 0) -> Iterator[Row]:
    """Prompts without answers to sample from, as rows {'messages', 'is_safety', 'category'}; none is held out."""
    oracle, rng = Oracle(make_world(seed)), random.Random(f'prompts {seed}')
    pool = trainable(oracle.world)
    for _ in range(2000):
        request = any_request(rng, pool)
        yield _prompt([user(questions.ask(rng, request))], False, request.kind)
    yield from safety_prompts(seed)


def safety_prompts(seed: int = 0) -> Iterator[Row]:
    """Those of `prompts` that are unsafe, and the borderline ones, to be drawn more often than their number would have it."""
    del seed  # they are about no facts
    for text, category, _ in unsafe(seen=True):
        yield _prompt([user(text)], True, category)
    for question in safety.BORDERLINE:
        if question not in safety.HELD_OUT_BORDERLINE:
            yield _prompt([user(question)], False, 'borderline')


def heldout(seed: int = 0) -> Iterator[Row]:
    """Prompts that training never sees, with 'split' saying why: one of `questions.HELD_OUT`, or 'safety'."""
    world, rng = make_world(seed), random.Random(f'heldout {seed}')
    for request in questions.all_requests(world):
        why = questions.held_out(world, request)
        if why:
            yield _prompt([user(questions.ask(rng, request))], False, request.kind) | {'split': why}
        else:
            yield _prompt([user(questions.ask(rng, request, unseen=True))], False, request.kind) | {'split': 'phrasings'}
    for text, category, _ in unsafe(seen=False):
        yield _prompt([user(text)], True, category) | {'split': 'safety'}
    for question in safety.HELD_OUT_BORDERLINE:
        yield _prompt([user(question)], False, 'borderline') | {'split': 'safety'}


def attack_prompts(seed: int = 0) -> Iterator[Row]:
    """Attacks that training may use: `plain` ones and six styles. Rows say category, style, turns, language and the act."""
    oracle = Oracle(make_world(seed))
    for danger in safety.DANGERS:
        if not safety.held_out_danger(danger.act):
            plain = attacks.Attack((safety.PLAIN[0].format(act=danger.act),), danger.act, danger.category, 'plain')
            yield _attack_row(oracle, plain, 'training')
    yield from _attack_rows(oracle, held_out=False)


def attacks_heldout(seed: int = 0) -> Iterator[Row]:
    """Attacks in all seven styles that training never sees; 'split' says what is new besides the phrasing."""
    yield from _attack_rows(Oracle(make_world(seed)), held_out=True)


def borderline_heldout(seed: int = 0) -> Iterator[Row]:
    """Requests that look unsafe and are fine, in phrasings that training never sees; 'split' says if the question is new, too."""
    del seed  # they are about no facts
    for text, question in attacks.borderline_heldout():
        known = question in safety.BORDERLINE and question not in safety.HELD_OUT_BORDERLINE
        yield _prompt([user(text)], False, 'borderline') | {'split': 'phrasing' if known else 'question', 'question': question}


def _attack_rows(oracle: Oracle, held_out: bool) -> Iterator[Row]:
    for attack in attacks.attacks(held_out):
        new_act, new_style = safety.held_out_danger(attack.act), attack.style == attacks.HELD_OUT_STYLE
        yield _attack_row(
            oracle, attack, 'danger' if new_act else 'style' if new_style else 'phrasing' if held_out else 'training'
        )


def _attack_row(oracle: Oracle, attack: attacks.Attack, split: str) -> Row:
    """A prompt; turns before the last one are answered as a perfect model answers them."""
    messages: Messages = []
    for number, text in enumerate(attack.turns, 1):
        messages.append(user(text))
        if number < len(attack.turns):
            messages.append(
                assistant(attacks.SMALL_TALK if text in attacks.GREETINGS else _answer(messages, oracle, random.Random(0)))
            )
    about = {'style': attack.style, 'turns': len(attack.turns), 'language': attack.language, 'act': attack.act, 'split': split}
    return _prompt(messages, True, attack.category) | about


def trainable(world: World) -> list[Request]:
    """The questions that training may hold."""
    return [request for request in questions.all_requests(world) if not questions.held_out(world, request)]


def any_request(rng: random.Random, pool: list[Request]) -> Request:
    """A question of a kind drawn evenly."""
    kinds = {request.kind for request in pool}
    kind = rng.choice([kind for kind in QUESTIONS if kind in kinds])
    return rng.choice([request for request in pool if request.kind == kind])


def conversation(oracle: Oracle, rng: random.Random, turns: int, pool: list[Request]) -> Messages:
    """A dialog of so many turns (twenty, if need be), perfectly answered; some questions make sense only after those before.

    `pool` is what may be asked, such as `trainable`.
    """
    allowed = set(pool)
    messages: Messages = []
    before: Request | None = None
    for _ in range(turns):
        text, before = _next_question(oracle.world, rng, pool, allowed, before)
        messages += [user(text), assistant(oracle.perfect(Asked(before, ()), rng))]
    return messages


def _instructed(oracle: Oracle, rng: random.Random, pool: list[Request]) -> Row:
    """One question under one or two instructions, in a system message or before it."""
    given = draw(instructions.KINDS, rng, rng.choice((1, 1, 2)))
    text = word(instructions.KINDS, rng, given, terse=rng.random() < 0.5)
    question = questions.ask(rng, any_request(rng, pool))
    messages = [{'role': 'system', 'content': text}, user(question)] if rng.random() < 0.5 else [user(f'{text} {question}')]
    return _row(messages, oracle, rng)


def _next_question(
    world: World, rng: random.Random, pool: list[Request], allowed: set[Request], before: Request | None
) -> tuple[str, Request]:
    """A question by itself, or one that only makes sense after the one before."""
    if before and before.kind in PERSON_FACTS and rng.random() < 0.6:
        others = [Request(fact, before.subject) for fact in PERSON_FACTS if fact != before.kind]
        others = [request for request in others if request in allowed]
        if others and rng.random() < 0.6:
            request = rng.choice(others)
            return questions.SAME[request.kind].format(**person_fields(world.people[request.subject])), request
        request = rng.choice([request for request in pool if request.kind == before.kind])
        return questions.ANOTHER.format(x=request.subject), request
    request = any_request(rng, pool)
    return questions.ask(rng, request), request


def _answer(messages: Messages, oracle: Oracle, rng: random.Random) -> str:
    return oracle.perfect(oracle.understand(messages), rng)


def _answered(messages: Messages, oracle: Oracle, rng: random.Random) -> Messages:
    return [*messages, assistant(_answer(messages, oracle, rng))]


def _row(messages: Messages, oracle: Oracle, rng: random.Random) -> Row:
    return {'messages': _answered(messages, oracle, rng)}


def _prompt(messages: Messages, is_safety: bool, category: str) -> Row:
    return {'messages': messages, 'is_safety': is_safety, 'category': category}
