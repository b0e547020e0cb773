"""The toy world: people, towns, animals, foods and crafts whose facts are drawn once by seed and never contradict.

Everything said anywhere in the toy documents, and every right answer to a toy question, is read off a `World`.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Craft:
    """A way to earn a living: 'A `name` `makes` with `tool`, and sells `goods`.'"""

    name: str
    makes: str  # third person: 'bakes bread'
    make: str  # bare: 'bake bread'
    tool: str  # with its article: 'an oven'
    goods: str  # what there is to sell


@dataclasses.dataclass(frozen=True)
class Animal:
    """A kind of pet: 'A `name` says `sound` and eats `eats`.'"""

    name: str
    plural: str
    sound: str
    eats: str
    gives: str  # why people keep it


@dataclasses.dataclass(frozen=True)
class Food:
    """A dish without an article: '`name` is made of `made_of` and tastes `taste`.'"""

    name: str
    made_of: str
    taste: str


CRAFTS = (
    Craft('baker', 'bakes bread', 'bake bread', 'an oven', 'bread'),
    Craft('fisher', 'catches fish', 'catch fish', 'a net', 'fish'),
    Craft('weaver', 'weaves cloth', 'weave cloth', 'a loom', 'cloth'),
    Craft('potter', 'shapes clay pots', 'shape clay pots', 'a wheel', 'pots'),
    Craft('smith', 'forges iron nails', 'forge iron nails', 'a hammer', 'nails'),
    Craft('carpenter', 'builds tables', 'build tables', 'a saw', 'tables'),
    Craft('miller', 'grinds flour', 'grind flour', 'a millstone', 'flour'),
    Craft('cobbler', 'mends shoes', 'mend shoes', 'a needle', 'shoes'),
    Craft('beekeeper', 'gathers honey', 'gather honey', 'a beehive', 'honey'),
    Craft('gardener', 'grows cabbages', 'grow cabbages', 'a spade', 'cabbages'),
)

ANIMALS = (
    Animal('goat', 'goats', 'meh', 'leaves', 'milk'),
    Animal('cat', 'cats', 'meow', 'mice', 'a house without mice'),
    Animal('dog', 'dogs', 'woof', 'meat', 'a safe house at night'),
    Animal('hen', 'hens', 'cluck', 'grain', 'eggs'),
    Animal('duck', 'ducks', 'quack', 'snails', 'a garden without snails'),
    Animal('sheep', 'sheep', 'baa', 'grass', 'wool'),
    Animal('horse', 'horses', 'neigh', 'hay', 'a ride to the market'),
    Animal('rabbit', 'rabbits', 'nothing at all', 'carrots', 'soft company'),
    Animal('donkey', 'donkeys', 'hee-haw', 'thistles', 'help with heavy bags'),
    Animal('pig', 'pigs', 'oink', 'peelings', 'a clean kitchen floor'),
)

FOODS = (
    Food('barley soup', 'barley, carrots and water', 'warm and mild'),
    Food('honey bread', 'flour, honey and butter', 'sweet'),
    Food('apple pie', 'apples, flour and sugar', 'sweet and a little sour'),
    Food('fish stew', 'fish, onions and salt', 'salty'),
    Food('plum cake', 'plums, eggs and flour', 'fruity'),
    Food('goat cheese', 'milk, salt and time', 'sharp'),
    Food('mushroom pie', 'mushrooms, flour and butter', 'like the forest'),
    Food('turnip mash', 'turnips, butter and salt', 'earthy'),
    Food('berry jam', 'berries and sugar', 'very sweet'),
    Food('pea porridge', 'peas, water and mint', 'fresh and green'),
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words('Mira Elba Runa Sela Tilda Yara Nessa Wenna Petra Isla Greta Hedda Jora Kaya Lunet Betta Carin Dalia Fenna Una')
MEN = _words(
    'Tobin Alder Borin Corin Davin Edrik Falk Garron Hollis Ivo Jarek Kester Lorn Marek Nilo Osric Perrin Quill Rolf Sten'
)
TOWNS = _words('Harrowby Fernley Oakmere Stonewick Millford Ravensholt Goldenhay Thistledon Marshwell Windcombe')
RIVERS = _words('Sill Arrow Bramble Cold Dunn Elder Fallow Gleam Hazel Lark')
DAYS = _words('Monday Tuesday Wednesday Thursday Friday Saturday Sunday')
ONES = _words(
    'zero one two three four five six seven eight nine ten eleven twelve '
    'thirteen fourteen fifteen sixteen seventeen eighteen nineteen'
)
TENS = _words('twenty thirty forty fifty sixty seventy eighty ninety')


@dataclasses.dataclass(frozen=True)
class Person:
    """A person; `home` and `friend` are keys of `World.towns` and `World.people`."""

    name: str
    woman: bool
    age: int  # years, 18 to 79
    home: str
    craft: Craft
    pet: Animal
    food: Food  # the favourite one
    friend: str  # mutual


@dataclasses.dataclass(frozen=True)
class Town:
    """A place with its own river; `mayor` is a person who lives there."""

    name: str
    river: str
    market_day: str
    mayor: str


@dataclasses.dataclass(frozen=True)
class World:
    """All facts. The same seed gives the same world."""

    people: dict[str, Person]
    towns: dict[str, Town]

    def living_in(self, town: str) -> list[Person]:
        """The people of a town, four of them, by name."""
        return [person for person in self.people.values() if person.home == town]

    def keeping(self, pet: str) -> list[Person]:
        """The people who keep an animal, four of them, by name."""
        return [person for person in self.people.values() if person.pet.name == pet]

    def working_as(self, craft: str) -> list[Person]:
        """The people of a craft, four of them, by name."""
        return [person for person in self.people.values() if person.craft.name == craft]


@functools.cache
def make_world(seed: int = 0) -> World:
    """Draws the 40 people and 10 towns of a seed. Every value of a fact goes to equally many people (or nearly)."""
    rng = random.Random(f'toy world {seed}')
    names = sorted(WOMEN + MEN)
    homes, crafts, pets, foods = (spread(values, len(names), rng) for values in (TOWNS, CRAFTS, ANIMALS, FOODS))
    pairs = rng.sample(names, len(names))
    friends = {}
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        friends[one], friends[other] = other, one
    people = {
        name: Person(name, name in WOMEN, rng.randint(18, 79), home, craft, pet, food, friends[name])
        for name, home, craft, pet, food in zip(names, homes, crafts, pets, foods, strict=True)
    }
    rivers, days = spread(RIVERS, len(TOWNS), rng), spread(DAYS, len(TOWNS), rng)
    towns = {
        town: Town(town, river, day, rng.choice([p.name for p in people.values() if p.home == town]))
        for town, river, day in zip(TOWNS, rivers, days, strict=True)
    }
    return World(people, towns)


def spread(values: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` draws in random order in which every value comes up equally often, give or take one."""
    drawn: list[T] = []
    while len(drawn) < count:
        drawn += rng.sample(values, min(len(values), count - len(drawn)))
    rng.shuffle(drawn)
    return drawn


def held_out_sum(a: int, b: int) -> bool:
    """Whether a + b, b + a and the subtractions that undo them are kept out of all documents, for asking later (9 %).

    >>> held_out_sum(5, 12), held_out_sum(12, 5), held_out_sum(3, 4)
    (True, True, False)
    """
    return a * b % 11 == 5


def in_words(number: int) -> str:
    """A number of 0 to 199 in words: 34 is 'thirty-four', 105 'one hundred and five'."""
    if number >= 100:
        return 'one hundred' + (f' and {in_words(number - 100)}' if number > 100 else '')
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f'-{ONES[ones]}' if ones else '')


def listed(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return ' and '.join(filter(None, [', '.join(items[:-1]), items[-1]]))
