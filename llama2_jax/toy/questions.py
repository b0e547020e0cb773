"""What can be asked about the toy world, in many phrasings, and the right answers; some of each is kept out of training.

A question is a `Request`; its text is made by `ask` and its perfect answer by `respond`. Training never asks anything about every
fifth person and every sixth topic ('people'), for some facts of the others ('combinations'), in the last phrasing of each kind
('phrasings'), or for sums of `held_out_sum` ('sums').
"""

import dataclasses
import random

from llama2_jax.toy.lessons import TOPICS, facts_about
from llama2_jax.toy.phrases import ASK, NAMED, PERSON_FACTS, TOWN, TOWN_FACTS, person_fields, town_fields
from llama2_jax.toy.stories import SHORT, story_fields
from llama2_jax.toy.world import ANIMALS, CRAFTS, FOODS, World, held_out_sum, in_words, listed

HELD_OUT = ('people', 'combinations', 'phrasings', 'sums')


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody wants to know.

    Attributes:
      kind: a key of `QUESTIONS`, or 'unsafe' or 'borderline' (`safety.py`).
      subject: whom or what it is about: a name, a town, an animal, 'a goat', '12 + 7'.
      count: how many are to be named, where the kind is a list.
    """

    kind: str
    subject: str
    count: int = 0


def _asks(fact: str) -> tuple[str, ...]:
    return tuple(way.replace('{n}', '{x}').replace('{t}', '{x}') for way in ASK[fact])


# The last phrasing of each kind is held out; it says in another way what the others say in pieces.
QUESTIONS = {
    'home': (
        *_asks('home'), 'Please tell me where {x} lives.', 'Tell me where {x} lives.',
        'Which town is the home of {x}?', 'In which town is the home of {x}?',
    ),
    'craft': (
        *_asks('craft'), 'Please tell me the craft of {x}.', 'Tell me what {x} does.',
        'How does {x} earn a living?', 'Do you know the craft of {x}?',
    ),
    'pet': (
        *_asks('pet'), 'Please tell me which animal {x} keeps.', 'Tell me the pet of {x}.',
        'What kind of pet lives with {x}?', 'What is the pet of {x}?',
    ),
    'food': (
        *_asks('food'), 'Please tell me what {x} likes to eat.', 'Tell me the favourite food of {x}.',
        'Which food does {x} like best?', 'Do you know the favourite food of {x}?',
    ),
    'friend': (
        *_asks('friend'), 'Please tell me who the friend of {x} is.', 'Tell me the best friend of {x}.',
        'What is the best friend of {x} called?', 'Do you know the best friend of {x}?',
    ),
    'age': (
        *_asks('age'), 'Please tell me how old {x} is.', 'Tell me the age of {x}.',
        'How many years has {x} lived?', 'Do you know the age of {x}?',
    ),
    'river': (
        *_asks('river'), 'Please tell me the river of {x}.', 'Tell me which river runs through {x}.',
        'What river flows past the houses of {x}?', 'Do you know the river of {x}?',
    ),
    'market_day': (
        *_asks('market_day'), 'Please tell me when market day is in {x}.', 'Tell me the market day of {x}.',
        'On which day can I go to market in {x}?', 'Do you know the market day of {x}?',
    ),
    'mayor': (
        *_asks('mayor'), 'Please tell me who the mayor of {x} is.', 'Tell me the mayor of {x}.',
        'Whom did the people of {x} choose as mayor?', 'Do you know who the mayor of {x} is?',
    ),
    'home river': (
        'Which river runs through the town where {x} lives?', 'What is the river of the town where {x} lives called?',
        'Which river runs through the home town of {x}?', 'On which river does the home town of {x} lie?',
    ),
    'home market_day': (
        'When is the market in the town where {x} lives?', 'On which day is the market in the town where {x} lives?',
        'When is the market in the home town of {x}?', 'What is the market day of the home town of {x}?',
    ),
    'home mayor': (
        'Who is the mayor of the town where {x} lives?', 'Do you know the mayor of the town where {x} lives?',
        'Who is the mayor of the home town of {x}?', 'Do you know the mayor of the home town of {x}?',
    ),
    'friend home': (
        'Where does the best friend of {x} live?', 'Where does the friend of {x} live?',
        'In which town does the best friend of {x} live?',
    ),
    'friend craft': (
        'What does the best friend of {x} do for a living?', 'What is the craft of the friend of {x}?',
        'What is the craft of the best friend of {x}?',
    ),
    'friend pet': (
        'What animal does the best friend of {x} keep?', 'What animal does the friend of {x} keep?',
        'Which pet does the best friend of {x} have?',
    ),
    'friend food': (
        'What does the best friend of {x} like to eat?', 'What does the friend of {x} like to eat?',
        'What is the favourite food of the best friend of {x}?',
    ),
    'friend age': (
        'How old is the best friend of {x}?', 'How old is the friend of {x}?', 'What is the age of the best friend of {x}?',
    ),
    'keep': ('Name {c} people who keep {x}.', 'Tell me the names of {c} people who keep {x}.', 'Which {c} people keep {x}?'),
    'work': (
        'Name {c} people who work as a {x}.', 'Tell me the names of {c} people who work as a {x}.',
        'Which {c} people work as a {x}?',
    ),
    'live': (
        'Name {c} people who live in {x}.', 'Tell me the names of {c} people who live in {x}.',
        'Which {c} people live in {x}?',
    ),
    'sum': ('What is {x}?', 'How much is {x}?', 'Please tell me what {x} is.', 'Do you know what {x} is?'),
    'story': (
        'Write a two-sentence story about {x}.', 'Tell me a two-sentence story about {x}.',
        'Please write a story about {x} in two sentences.', 'I want to hear a two-sentence story about {x}.',
    ),
    'greet': ('Say good day to {x}.', 'Greet {x}.', 'Please greet {x} for me.', 'Please say good day to {x}.'),
    'explain': (
        'Explain {x} to a child.', 'A child asks about {x}. What do you say?', 'Please explain {x} to a small child.',
        'Tell a child about {x}.', 'Please tell a child about {x}.', 'Please explain {x} to a child.',
    ),
}  # fmt: skip

LISTS = ('keep', 'work', 'live')

# A later turn may ask for the same about somebody else, or for another fact about the same person.
ANOTHER = 'And what about {x}?'
SAME = {
    'home': 'And where does {s} live?',
    'craft': 'And what does {s} do for a living?',
    'pet': 'And what animal does {s} keep?',
    'food': 'And what does {s} like to eat?',
    'friend': 'And who is {p} best friend?',
    'age': 'And how old is {s}?',
}

# How the perfect answer says a fact; each is also a sentence of the documents.
SAY = {
    'home': ('{n} lives in {home}.', '{n} lives in the town of {home}.'),
    'craft': ('{n} is a {craft}.', '{n} works as a {craft}.'),
    'pet': ('{n} keeps a {pet}.', '{n} has a {pet}.'),
    'food': ('The favourite food of {n} is {food}.', '{n} likes {food} best.'),
    'friend': ('The best friend of {n} is {friend}.', "{n}'s best friend is {friend}."),
    'age': ('{n} is {age} years old.', 'The age of {n} is {age}.'),
    'river': ('The river of {t} is the {river}.', '{t} lies on the river {river}.'),
    'market_day': ('The market of {t} is on {day}.', 'Market day in {t} is {day}.'),
    'mayor': ('The mayor of {t} is {mayor}.', '{mayor} is the mayor of {t}.'),
}  # fmt: skip
assert all(set(ways) <= set((NAMED | TOWN)[fact]) for fact, ways in SAY.items())

LIST_WAYS = {
    'keep': '{names} keep {x}.',
    'work': '{names} work as a {x}.',
    'live': '{names} live in {x}.',
}
OPERATIONS = {'+': lambda a, b: a + b, '-': lambda a, b: a - b}


def list_members(world: World, request: Request) -> list[str]:
    """Everybody whom a list may name, by name."""
    if request.kind == 'keep':
        return [p.name for p in world.people.values() if p.pet.plural == request.subject]
    return [p.name for p in (world.working_as if request.kind == 'work' else world.living_in)(request.subject)]


def steps(world: World, request: Request) -> list[tuple[str, str]]:
    """The (subject, fact) pairs that lead to the answer of a question about facts, the asked one last.

    >>> steps(make_world(0), Request('home river', 'Mira'))
    [('Mira', 'home'), ('Harrowby', 'river')]
    """
    first, *second = request.kind.split()
    found = [(request.subject, first)]
    if second:
        person = world.people[request.subject]
        found.append((person.home if first == 'home' else person.friend, second[0]))
    return found


def topics() -> dict[str, list[str]]:
    """What can be explained ('a goat', 'rain') with all that is taught about it."""
    things = {f'a {thing.name}': facts_about(thing) for thing in (*ANIMALS, *CRAFTS)}
    return things | {food.name: facts_about(food) for food in FOODS} | {topic: list(facts) for topic, facts in TOPICS.items()}


def operands(subject: str) -> tuple[int, str, int]:
    """'12 + 7' -> (12, '+', 7)."""
    a, sign, b = subject.split()
    return int(a), sign, int(b)


def all_requests(world: World) -> list[Request]:
    """Everything that can be asked of the kinds of `QUESTIONS`; sums are of at most ten, for a small model is to learn them."""
    found = [Request(kind, name) for kind in QUESTIONS for name in _subjects(world, kind) if kind not in LISTS]
    found += [Request(kind, name, count) for kind in LISTS for name in _subjects(world, kind) for count in (2, 3)]
    return found


def _subjects(world: World, kind: str) -> list[str]:
    if kind in TOWN_FACTS or kind == 'live':
        return list(world.towns)
    if kind == 'keep':
        return [animal.plural for animal in ANIMALS]
    if kind == 'work':
        return [craft.name for craft in CRAFTS]
    if kind == 'explain':
        return list(topics())
    if kind == 'sum':
        pairs = [(a, b) for a in range(11) for b in range(11 - a)]
        return [f'{a} + {b}' for a, b in pairs] + [f'{a + b} - {b}' for a, b in pairs]
    return list(world.people)


def held_out(world: World, request: Request) -> str | None:
    """Why a request is never trained on ('people', 'combinations' or 'sums'), or None if it may be."""
    if request.kind == 'sum':
        a, sign, b = operands(request.subject)
        return 'sums' if held_out_sum(*((a, b) if sign == '+' else (a - b, b))) else None
    if request.kind == 'greet':  # anybody, so that no name is new: a small model would read it as another
        return None
    subjects = _subjects(world, request.kind)
    place = subjects.index(request.subject)
    if request.kind == 'explain':
        return 'people' if place % 6 == 5 else None
    people = list(world.people)
    named = [] if request.kind in LISTS else [name for name, _ in steps(world, request) if name in world.people]
    if any(people.index(name) % 5 == 0 for name in named):  # web.planted_questions are about the same
        return 'people'
    kinds = list(QUESTIONS)
    return 'combinations' if (place + 3 * kinds.index(request.kind) + request.count) % 10 == 7 else None


def ask(rng: random.Random, request: Request, unseen: bool = False) -> str:
    """A request in words; `unseen` takes the phrasing that training never has."""
    ways = QUESTIONS[request.kind]
    way = ways[-1] if unseen else rng.choice(ways[:-1])
    return way.format(x=request.subject, c=in_words(request.count))


def respond(world: World, rng: random.Random, request: Request) -> str:
    """A perfect answer: right, complete, and no longer than it must be."""
    if request.kind in LISTS:
        names = list_members(world, request)[: request.count]
        return LIST_WAYS[request.kind].format(names=listed(names), x=request.subject)
    if request.kind == 'greet':
        return f'Good day, {request.subject}!'
    if request.kind == 'sum':
        a, sign, b = operands(request.subject)
        return f'{a} {sign} {b} = {OPERATIONS[sign](a, b)}.'
    if request.kind == 'story':
        helper = rng.choice([name for name in world.people if name != request.subject])
        return ' '.join(rng.choice(SHORT)).format(**story_fields(world, request.subject, helper))
    if request.kind == 'explain':
        first, *rest = topics()[request.subject]
        return f'{first} {rng.choice(rest)}'
    return ' '.join(word(world, rng, subject, fact) for subject, fact in steps(world, request))


def word(world: World, rng: random.Random, subject: str, fact: str) -> str:
    """A fact about a person or a town in one sentence."""
    fields = person_fields(world.people[subject]) if fact in PERSON_FACTS else town_fields(world.towns[subject])
    return rng.choice(SAY[fact]).format(**fields)
