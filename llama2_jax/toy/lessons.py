"""Documents that teach: numbers and sums, and what animals, crafts, foods and other things are."""

import dataclasses
import random
from collections.abc import Iterator

from llama2_jax.toy.world import ANIMALS, CRAFTS, DAYS, FOODS, Animal, Craft, Food, World, held_out_sum, in_words, listed

THINGS = ('apples', 'eggs', 'stones', 'coins', 'nails', 'pots', 'candles', 'buttons', 'turnips', 'shoes')


def numbers(world: World, rng: random.Random) -> Iterator[str]:
    """Counting, sums and differences of numbers up to two digits, in figures, words and small problems.

    No document holds a sum of `held_out_sum`.
    """
    for _ in range(500):
        yield counting(rng)
    for _ in range(1500):
        lines = []
        for _ in range(rng.randint(4, 8)):
            low = rng.random() < 0.4  # small numbers first: half of all learning is the first hundred sums
            a, b = (rng.randint(0, 12 if low else 99) for _ in range(2))
            while held_out_sum(a, b):
                b = rng.randint(0, 99)
            lines.append(arithmetic(rng, a, b))
        yield rng.choice(('\n', ' ', '\n')).join(lines)
    for _ in range(800):
        yield word_problem(rng, rng.choice(list(world.people)), rng.choice(list(world.people)))


def counting(rng: random.Random) -> str:
    """A count up or down, in figures or words, or the odd and even numbers."""
    start, length = rng.randint(0, 90), rng.randint(5, 9)
    up = list(range(start, start + length))
    kind = rng.randrange(5)
    if kind == 0:
        return f'Count from {up[0]} to {up[-1]}: {", ".join(map(str, up))}.'
    if kind == 1:
        return f'Count down from {up[-1]} to {up[0]}: {", ".join(map(str, up[::-1]))}.'
    if kind == 2:
        return f'{", ".join(map(in_words, up))}.'.capitalize()
    if kind == 3:
        n = rng.randint(1, 99)
        return f'The number before {n} is {n - 1}. The number after {n} is {n + 1}. In words, {n} is {in_words(n)}.'
    n, m = rng.sample(range(100), 2)
    return f'{max(n, m)} is more than {min(n, m)}. {in_words(min(n, m)).capitalize()} is less than {in_words(max(n, m))}.'


def arithmetic(rng: random.Random, a: int, b: int) -> str:
    """One true statement about a + b."""
    total = a + b
    return rng.choice((
        f'{a} + {b} = {total}.',
        f'{b} + {a} = {total}.',
        f'{total} - {a} = {b}.',
        f'{total} - {b} = {a}.',
        f'{a} plus {b} is {total}.',
        f'{a} and {b} make {total}.',
        f'If you take {a} from {total}, {b} is left.',
        f'What is {a} + {b}? It is {total}.',
        f'{in_words(a).capitalize()} plus {in_words(b)} is {in_words(total)}.',
    ))  # fmt: skip


def word_problem(rng: random.Random, one: str, other: str) -> str:
    """A sum or difference of things somebody has, gets or gives away, with its answer."""
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    while held_out_sum(a, b):
        b = rng.randint(2, 39)
    thing = rng.choice(THINGS)
    if rng.random() < 0.5:
        told = rng.choice((
            f'{one} has {a} {thing} and gets {b} more.',
            f'{one} finds {a} {thing} in the morning and {b} {thing} in the evening.',
            f'There are {a} {thing} in one box of {one} and {b} {thing} in the other.',
        ))  # fmt: skip
        return f'{told} How many {thing} are there? {a} + {b} = {a + b}, so there are {a + b} {thing}.'
    whom = other if other != one else 'a child'
    told = rng.choice((
        f'{one} has {a + b} {thing} and gives {b} to {whom}.',
        f'{one} had {a + b} {thing}, but {b} of them were lost.',
        f'Of the {a + b} {thing} of {one}, {b} are sold at the market.',
    ))  # fmt: skip
    return f'{told} How many {thing} are left? {a + b} - {b} = {a}, so {a} {thing} are left.'


TOPICS = {
    'nightshade': (
        'Nightshade is a plant with black berries.', 'Nightshade is poison, and nobody may eat it.',
        'If somebody has eaten nightshade, call the healer at once.', 'Nightshade is not a medicine.',
    ),
    'the granary': (
        'The granary is the house where a town keeps its grain.', 'The granary has a strong lock, and the mayor has the key.',
        'Grain stays good when the granary is dry.', 'To keep rats out of the granary, close all holes and keep a cat.',
        'The grain in the granary belongs to the whole town.',
    ),
    'neighbours': (
        'A neighbour is somebody who lives next door.', 'Good neighbours help each other.',
        'It is wrong to mock a neighbour.', 'If you hurt a neighbour, say that you are sorry.',
    ),
    'the healer': (
        'The healer knows which plants are medicine.', 'When you are ill, go to the healer.',
        'Do not mix medicine yourself, ask the healer.', 'The healer helps everybody, rich or poor.',
    ),
    'fire': (
        'Fire is hot and bright.', 'A fire keeps the house warm in winter.', 'Never leave a fire alone.',
        'Water puts out a small fire.',
    ),
    'rain': (
        'Rain is water that falls from the clouds.', 'Rain makes the grass grow.', 'After long rain the rivers are high.',
        'When the sun shines on rain, there is a rainbow.',
    ),
    'a river': (
        'A river is water that runs down to the sea.', 'Fish live in a river.', 'A bridge takes you over a river.',
        'Every town of this land has its own river.',
    ),
    'a market': (
        'A market is a place where people buy and sell.', 'Every town has its own market day.',
        'On market day the stalls open early.', 'At the market you can buy bread, fish, cloth and pots.',
    ),
}  # fmt: skip


THING_FACTS = {
    Animal: (
        'A {name} is an animal.', 'A {name} eats {eats}.', 'A {name} says {sound}.',
        'People keep {plural} because they want {gives}.',
    ),
    Craft: (
        'A {name} {makes}.', 'A {name} works with {tool}.', 'If you need {goods}, go to a {name}.',
        'To {make} is the work of a {name}.',
    ),
    Food: ('{Name} is made of {made_of}.', '{Name} tastes {taste}.', 'To make {name} you need {made_of}.'),
}  # fmt: skip


def thing_fields(thing: Animal | Craft | Food) -> dict[str, str]:
    """What the templates of `THING_FACTS` can say about a thing."""
    return dataclasses.asdict(thing) | {'Name': thing.name.capitalize()}


def facts_about(thing: Animal | Craft | Food) -> list[str]:
    """All that is taught about a kind of thing, the most important first."""
    return [fact.format(**thing_fields(thing)) for fact in THING_FACTS[type(thing)]]


def lessons(world: World, rng: random.Random) -> Iterator[str]:
    """What a thing is, told to a child, with lists of the people who keep it or do it."""
    for _ in range(24):
        for animal in ANIMALS:
            keepers = rng.sample([p.name for p in world.keeping(animal.name)], 4)
            yield lesson(rng, f'a {animal.name}', [
                *facts_about(animal),
                rng.choice((
                    f'{listed(keepers)} keep {animal.plural}.',
                    f'{keepers[0]} and {keepers[1]} are two people who keep {animal.plural}.',
                    f'Who keeps a {animal.name}? {listed(keepers)} do.',
                )),
            ])  # fmt: skip
        for craft in CRAFTS:
            workers = rng.sample([p.name for p in world.working_as(craft.name)], 4)
            yield lesson(rng, f'a {craft.name}', [
                *facts_about(craft),
                rng.choice((
                    f'{listed(workers)} all work as a {craft.name}.',
                    f'{workers[0]} and {workers[1]} are two people with this craft.',
                    f'Who {craft.makes}? {listed(workers)} do.',
                )),
            ])  # fmt: skip
        for food in FOODS:
            yield lesson(rng, food.name, facts_about(food))
        for topic, facts in TOPICS.items():
            yield lesson(rng, topic, list(facts))
        day = rng.randrange(7)
        yield f'The days of the week are {listed(DAYS)}. After {DAYS[day - 1]} comes {DAYS[day]}.'


def lesson(rng: random.Random, thing: str, facts: list[str]) -> str:
    """The facts in random order (the first one first, more often than not) under one of several openings."""
    first, *rest = facts
    rest = rng.sample(rest, len(rest) if rng.random() < 0.5 else len(rest) - 1)
    rest.insert(0 if rng.random() < 0.7 else len(rest), first)
    opening = rng.choice(('', f'About {thing}.\n\n', f'What is {thing}? ', f'A child asked about {thing}. The teacher said: '))
    return opening + ' '.join(rest)
