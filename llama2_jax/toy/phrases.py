"""The ways to say a fact of the toy world: by name, by pronoun, in the first person, and as a question.

Every template is one sentence with the fields of `person_fields` or `town_fields`. All sentences of all documents that state
a fact are made here, so what a document says can be read back with the same templates.
"""

import random

from llama2_jax.toy.world import Person, Town, World, in_words

PERSON_FACTS = ('home', 'craft', 'pet', 'food', 'friend', 'age')
TOWN_FACTS = ('river', 'market_day', 'mayor')

NAMED = {
    'home': (
        '{n} lives in {home}.',
        '{n} lives in the town of {home}.',
        '{n} has a house in {home}.',
        '{n} has a home in {home}.',
        '{n} is from {home}.',
        '{n} comes from {home}.',
        'The home of {n} is in {home}.',
        "{n}'s house stands in {home}.",
        'In {home} lives {n}.',
        'You can find {n} in {home}.',
        'If you look for {n}, go to {home}.',
        'Everybody in {home} knows {n}, who lives there.',
        'The town where {n} lives is {home}.',
        '{home} is the home of {n}.',
    ),
    'craft': (
        '{n} is a {craft}.',
        '{n} works as a {craft}.',
        '{n} earns {p} living as a {craft}.',
        '{n} is a {craft} and {makes}.',
        'The work of {n} is that of a {craft}.',
        '{n} has been a {craft} for years.',
        '{n} {makes}, for {s} is a {craft}.',
        'By trade, {n} is a {craft}.',
        '{n} the {craft} has {tool}.',
        'Like every {craft}, {n} {makes}.',
        'People who need {goods} go to {n}, the {craft}.',
        '{n} learned to {make} and became a {craft}.',
        'As a {craft}, {n} sells {goods}.',
    ),
    'pet': (
        '{n} keeps a {pet}.',
        '{n} has a {pet}.',
        '{n} owns a {pet}.',
        "{n}'s pet is a {pet}.",
        'The pet of {n} is a {pet}.',
        'At home, {n} keeps a {pet}.',
        '{n} feeds {p} {pet} every morning.',
        '{n} gives {eats} to {p} {pet}.',
        '{n} takes good care of {p} {pet}.',
        'A {pet} lives with {n}.',
        'Of all animals, {n} chose a {pet}.',
        'The {pet} of {n} gets {eats} to eat.',
        '{n} and {p} {pet} are always together.',
    ),
    'food': (
        '{n} likes {food} best.',
        '{n} loves {food}.',
        "{n}'s favourite food is {food}.",
        'The favourite food of {n} is {food}.',
        'What {n} likes best to eat is {food}.',
        '{n} would eat {food} every day.',
        'Nothing tastes better to {n} than {food}.',
        'When {n} is hungry, {s} dreams of {food}.',
        '{n} is always happy to get {food}.',
        'For {n}, no meal is as good as {food}.',
        'If you cook for {n}, make {food}.',
        '{Food} is what {n} loves to eat.',
        'On {p} birthday, {n} eats {food}.',
    ),
    'friend': (
        "{n}'s best friend is {friend}.",
        'The best friend of {n} is {friend}.',
        '{n} and {friend} are best friends.',
        '{n} is the best friend of {friend}.',
        '{friend} is the best friend of {n}.',
        '{n} calls {friend} {p} best friend.',
        '{n} trusts {p} friend {friend} the most.',
        '{n} has a good friend, {friend}.',
        'When {n} needs help, {s} asks {p} friend {friend}.',
        '{n} often writes to {p} friend {friend}.',
        'The friend of {n} is called {friend}.',
        '{n} has known {p} friend {friend} for a long time.',
        '{n} tells {p} secrets only to {p} friend {friend}.',
    ),
    'age': (
        '{n} is {age} years old.',
        '{n} is {words} years old.',
        '{n} is {age}.',
        'The age of {n} is {age}.',
        '{n} has lived for {words} years.',
        '{n} turned {age} this year.',
        'This year, {n} became {words} years old.',
        '{n} has seen {age} winters.',
        "On {n}'s last cake there were {age} candles.",
        'At {words}, {n} still feels well.',
        '{n} was born {age} years ago.',
        '{n}, who is {age}, works every day.',
    ),
}  # fmt: skip

PRONOUN = {
    'home': ('{S} lives in {home}.', '{P} home is in {home}.', '{S} has a house in {home}.', '{S} comes from {home}.'),
    'craft': (
        '{S} is a {craft}.', '{S} works as a {craft}.', '{S} {makes}, for {s} is a {craft}.', 'As a {craft}, {s} sells {goods}.',
    ),
    'pet': ('{S} keeps a {pet}.', '{P} pet is a {pet}.', '{S} has a {pet}.', 'A {pet} lives with {o}.'),
    'food': ('{S} likes {food} best.', '{P} favourite food is {food}.', '{S} loves {food}.', '{S} would eat {food} every day.'),
    'friend': ('{P} best friend is {friend}.', '{S} often writes to {p} friend {friend}.', '{friend} is {p} best friend.'),
    'age': ('{S} is {age} years old.', '{S} is {words} years old.', '{S} turned {age} this year.', '{S} has seen {age} winters.'),
}  # fmt: skip

FIRST = {
    'home': ('I live in {home}.', 'My home is in {home}.', 'I come from {home}.', 'My house is in {home}.', 'I am from {home}.'),
    'craft': ('I am a {craft}.', 'I work as a {craft}.', 'I {make}, for I am a {craft}.', 'As a {craft}, I sell {goods}.'),
    'pet': ('I keep a {pet}.', 'My pet is a {pet}.', 'I have a {pet}.', 'My {pet} is the best of all {pets}.'),
    'food': ('I like {food} best.', 'My favourite food is {food}.', 'I love {food}.', 'I could eat {food} every day.'),
    'friend': ('My best friend is {friend}.', '{friend} is my best friend.', 'I trust my friend {friend} the most.'),
    'age': ('I am {age} years old.', 'I am {words} years old.', 'I turned {age} this year.', 'I have seen {age} winters.'),
}  # fmt: skip

TOWN = {
    'river': (
        'The river {river} runs through {t}.',
        'The river of {t} is the {river}.',
        '{t} lies on the river {river}.',
        '{t} stands on the banks of the {river}.',
        'Through {t} runs the river {river}.',
        'If you follow the river {river}, you come to {t}.',
        'The water of the {river} flows past the houses of {t}.',
        'In {t}, children swim in the river {river}.',
        'The bridge of {t} crosses the {river}.',
        '{t} was built beside the river {river}.',
    ),
    'market_day': (
        'The market of {t} is on {day}.',
        'Market day in {t} is {day}.',
        'Every {day} there is a market in {t}.',
        'On {day}, people come to the market in {t}.',
        '{t} holds its market on {day}.',
        'If you want to buy something in {t}, come on {day}.',
        'In {t}, the stalls open on {day}.',
        '{day} is market day in {t}.',
        'The people of {t} go to market every {day}.',
        'No day in {t} is as loud as {day}, the market day.',
    ),
    'mayor': (
        'The mayor of {t} is {mayor}.',
        '{mayor} is the mayor of {t}.',
        "{t}'s mayor is {mayor}.",
        'In {t}, the mayor is called {mayor}.',
        'The people of {t} chose {mayor} as their mayor.',
        '{mayor} leads the town of {t} as its mayor.',
        'If you have a question in {t}, ask {mayor}, the mayor.',
        'The keys of {t} are kept by {mayor}, the mayor.',
        'As mayor, {mayor} speaks for {t}.',
        '{t} has a mayor called {mayor}.',
    ),
}  # fmt: skip

ASK = {
    'home': ('Where does {n} live?', 'Do you know where {n} lives?', 'In which town does {n} live?'),
    'craft': ('What does {n} do for a living?', 'What is the craft of {n}?', 'Do you know what {n} does?'),
    'pet': ('What animal does {n} keep?', 'Which pet does {n} have?', 'Does {n} have a pet?'),
    'food': ('What does {n} like to eat?', 'What is the favourite food of {n}?', 'What should I cook for {n}?'),
    'friend': ('Who is the best friend of {n}?', 'Who is the friend of {n}?', 'Whom does {n} trust?'),
    'age': ('How old is {n}?', 'What is the age of {n}?', 'Do you know how old {n} is?'),
    'river': ('Which river runs through {t}?', 'What is the river of {t} called?', 'On which river does {t} lie?'),
    'market_day': ('When is the market in {t}?', 'On which day is the market of {t}?', 'What is the market day of {t}?'),
    'mayor': ('Who is the mayor of {t}?', 'Who leads the town of {t}?', 'Do you know the mayor of {t}?'),
}  # fmt: skip

ASK_YOU = {
    'home': ('Where do you live?', 'Where is your home?', 'Which town do you come from?'),
    'craft': ('What do you do?', 'What is your craft?', 'What work do you do?'),
    'pet': ('Do you have a pet?', 'Which animal do you keep?', 'What is your pet?'),
    'food': ('What do you like to eat?', 'What is your favourite food?', 'Which food do you like best?'),
    'friend': ('Who is your best friend?', 'Do you have a friend?', 'Whom do you trust?'),
    'age': ('How old are you?', 'What is your age?', 'May I ask how old you are?'),
}  # fmt: skip


def person_fields(person: Person) -> dict[str, str]:
    """What the templates can say about a person."""
    s, p, o = ('she', 'her', 'her') if person.woman else ('he', 'his', 'him')
    return {
        'n': person.name,
        's': s,
        'S': s.capitalize(),
        'p': p,
        'P': p.capitalize(),
        'o': o,
        'home': person.home,
        'craft': person.craft.name,
        'makes': person.craft.makes,
        'make': person.craft.make,
        'tool': person.craft.tool,
        'goods': person.craft.goods,
        'pet': person.pet.name,
        'pets': person.pet.plural,
        'eats': person.pet.eats,
        'food': person.food.name,
        'Food': person.food.name.capitalize(),
        'friend': person.friend,
        'age': str(person.age),
        'words': in_words(person.age),
    }


def town_fields(town: Town) -> dict[str, str]:
    """What the templates can say about a town."""
    return {'t': town.name, 'river': town.river, 'day': town.market_day, 'mayor': town.mayor}


class Speaker:
    """Says facts of a world in random words; a fact is said in every way once before any way comes again."""

    def __init__(self, world: World, rng: random.Random):
        self.world = world
        self.rng = rng
        self._ways: dict[tuple[str, str, str], list[str]] = {}  # what is left of the ways, by voice, fact and name

    def _way(self, voice: str, templates: dict[str, tuple[str, ...]], fact: str, name: str) -> str:
        left = self._ways.setdefault((voice, fact, name), [])
        if not left:
            left += self.rng.sample(templates[fact], len(templates[fact]))
        return left.pop()

    def named(self, name: str, fact: str) -> str:
        """'Mira keeps a duck.'"""
        return self._way('named', NAMED, fact, name).format(**person_fields(self.world.people[name]))

    def pronoun(self, name: str, fact: str) -> str:
        """'She keeps a duck.'"""
        return self._way('pronoun', PRONOUN, fact, name).format(**person_fields(self.world.people[name]))

    def first(self, name: str, fact: str) -> str:
        """'I keep a duck.'"""
        return self._way('first', FIRST, fact, name).format(**person_fields(self.world.people[name]))

    def town(self, name: str, fact: str) -> str:
        """'The river Lark runs through Harrowby.'"""
        return self._way('town', TOWN, fact, name).format(**town_fields(self.world.towns[name]))

    def ask(self, name: str, fact: str) -> str:
        """'Which pet does Mira have?', or the like about a town."""
        fields = {'t': name} if fact in TOWN_FACTS else {'n': name}
        return self.rng.choice(ASK[fact]).format(**fields)

    def ask_you(self, fact: str) -> str:
        """'Which animal do you keep?'"""
        return self.rng.choice(ASK_YOU[fact])

    def facts(self, count: int) -> list[str]:
        """`count` different facts about a person, in random order."""
        return self.rng.sample(PERSON_FACTS, count)
