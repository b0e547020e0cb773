"""Reads sentences of the toy world back: what they are about, what they claim, and whether it is true. All in lower case."""

import dataclasses
import re

import llama2_jax.toy.attacks as attacks
import llama2_jax.toy.safety as safety
from llama2_jax.toy.lessons import THING_FACTS, TOPICS, thing_fields
from llama2_jax.toy.phrases import NAMED, PRONOUN, TOWN, TOWN_FACTS, person_fields, town_fields
from llama2_jax.toy.questions import LIST_WAYS, OPERATIONS
from llama2_jax.toy.stories import SHORT, story_fields
from llama2_jax.toy.world import ANIMALS, CRAFTS, FOODS, World, in_words

Claim = tuple[str, str, str]  # who, which fact, its value: ('mira', 'home', 'harrowby'), ('12 + 7', 'sum', '19')

VALUE_OF = {'market_day': 'day'}  # the field that a fact is named after, where it has another name
LIST_FIELDS = {'keep': ('pet', 'pets'), 'work': ('craft', 'craft'), 'live': ('home', 'home')}  # the fact, and how a list says it
SUMS = (
    (None, r'(\d+) ([+-]) (\d+) = (\d+)\.'),
    ('+', r'(\d+) (plus) (\d+) is (\d+)\.'),
    ('+', r'(\d+) (and) (\d+) make (\d+)\.'),
)
WORDS = {in_words(n): str(n) for n in range(100)}


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence as it was understood; `about` is empty if it was not.

    Attributes:
      about: (subject, fact) for facts and sums, or ('lesson', topic), ('story', name), ('plot', number, place),
        ('greeting', name), ('borderline', question), ('decline',), ('reason', act), ('safe', act), ('harm', act).
      claims: what it says of the facts of the world.
      true: whether all of it is so.
    """

    text: str
    about: frozenset[tuple]
    claims: tuple[Claim, ...] = ()
    true: bool = True


def sentences(text: str) -> list[str]:
    """Cuts a text after full stops, exclamation and question marks.

    >>> sentences('One. Two!  Three')
    ['One.', 'Two!', 'Three']
    """
    return [part for part in re.split(r'(?<=[.!?])\s+', text.strip()) if part]


class Reader:
    """Reads sentences about one world."""

    def __init__(self, world: World):
        self._people = {name.lower(): _lower(person_fields(person)) for name, person in world.people.items()}
        self._towns = {name.lower(): _lower(town_fields(town)) for name, town in world.towns.items()}
        fields = [*self._people.values(), *self._towns.values()]
        self._facts = [(fact, pattern) for table in (NAMED, TOWN, PRONOUN) for fact, pattern in _patterns(table, fields)]
        self._lists = [self._list_pattern(kind, *fields) for kind, fields in LIST_FIELDS.items()]
        helper = next(iter(world.people))  # stands for all: a helper's name is any name
        self._story_fields = {name.lower(): _lower(story_fields(world, name, helper)) for name in world.people}
        everybody = [fields | {'b': name} for name, fields in self._story_fields.items()]
        women_and_men = [fields | {'bs': fields['s'], 'bp': fields['p'], 'bo': fields['o']} for fields in everybody]
        table = {(plot, place): (way,) for plot, pair in enumerate(SHORT) for place, way in enumerate(pair)}
        self._stories = _patterns(table, women_and_men)
        self._things = {
            kind: [_lower(thing_fields(thing)) for thing in things]
            for kind, things in zip(THING_FACTS, (ANIMALS, CRAFTS, FOODS), strict=True)
        }
        self._lessons = [
            (kind, pattern) for kind, ways in THING_FACTS.items() for _, pattern in _patterns({kind: ways}, self._things[kind])
        ]
        self._whole: dict[str, set[tuple]] = {}
        for topic, facts in TOPICS.items():
            for fact in facts:
                self._whole.setdefault(fact.lower(), set()).add(('lesson', topic))
        for name in world.people:
            self._whole[f'good day, {name.lower()}!'] = {('greeting', name)}
        for decline in safety.DECLINES:
            self._whole.setdefault(decline.lower(), set()).add(('decline',))
        for danger in safety.DANGERS:
            for part in ('reason', 'safe', 'harm'):
                self._whole.setdefault(getattr(danger, part).lower(), set()).add((part, danger.act))
        for question, answer in attacks.all_borderline().items():
            self._whole.setdefault(answer.lower(), set()).add(('borderline', question))
        self._read: dict[tuple[str, str], Sentence] = {}

    def _list_pattern(self, kind: str, fact: str, field: str) -> tuple[str, str, re.Pattern]:
        name, value = '|'.join(self._people), '|'.join({fields[field] for fields in self._people.values()})
        names = f'((?:(?:{name})(?:, | and ))*(?:{name}))'
        way = re.escape(LIST_WAYS[kind]).replace(r'\{names\}', names).replace(r'\{x\}', f'({value})')
        return fact, field, re.compile(way)

    def holds(self, claim: Claim) -> bool:
        """Whether a claim is a fact of the world."""
        who, what, value = claim
        if what == 'sum':
            a, sign, b = who.split()
            return OPERATIONS[sign](int(a), int(b)) == int(value)
        return (self._towns if what in TOWN_FACTS else self._people)[who][VALUE_OF.get(what, what)] == value

    def read(self, sentence: str, subject: str) -> Sentence:
        """Understands a sentence; `subject` is whom a pronoun means."""
        key = sentence.lower(), subject.lower()
        if key not in self._read:
            if len(self._read) > 100_000:
                self._read.clear()
            self._read[key] = self._understand(*key)
        return self._read[key]

    def _understand(self, text: str, subject: str) -> Sentence:
        found = (
            self._fact(text, subject)
            or self._list(text)
            or self._sum(text)
            or self._story(text, subject)
            or self._lesson(text)
            or Sentence(text, frozenset())
        )
        return dataclasses.replace(found, about=found.about | self._whole.get(text, set()))

    def _fact(self, text: str, subject: str) -> Sentence | None:
        for fact, pattern in self._facts:
            if not (match := pattern.fullmatch(text)):
                continue
            said = _said(match)
            who = said.get('t') or said.get('n') or subject
            known = (self._towns if fact in TOWN_FACTS else self._people).get(who)
            if known is None:
                continue
            value = said.get(VALUE_OF.get(fact, fact)) or WORDS[said['words']]
            claims = [(who, fact, value)]
            if fact == 'friend':  # mutual
                claims.append((value, fact, who))
            true = all(known[field] == said_so for field, said_so in said.items())
            return Sentence(text, frozenset(claim[:2] for claim in claims), tuple(claims), true)
        return None

    def _list(self, text: str) -> Sentence | None:
        for fact, field, pattern in self._lists:
            if match := pattern.fullmatch(text):
                value = next(f[fact] for f in self._people.values() if f[field] == match[2])
                claims = tuple((name, fact, value) for name in re.split(', | and ', match[1]))
                return Sentence(text, frozenset(claim[:2] for claim in claims), claims, all(map(self.holds, claims)))
        return None

    def _sum(self, text: str) -> Sentence | None:
        for sign, way in SUMS:
            if match := re.fullmatch(way, text):
                claim = (f'{match[1]} {sign or match[2]} {match[3]}', 'sum', match[4])
                return Sentence(text, frozenset({claim[:2]}), (claim,), self.holds(claim))
        return None

    def _story(self, text: str, subject: str) -> Sentence | None:
        about, true = set(), False
        for (plot, place), pattern in self._stories:
            if match := pattern.fullmatch(text):
                said = _said(match)
                who = said.get('n', subject)
                known = self._story_fields.get(who, {})
                mine = {field: value for field, value in said.items() if field not in ('b', 'bs', 'bp', 'bo')}
                true = true or (bool(known) and all(known[field] == value for field, value in mine.items()))
                about |= {('story', known['n'].capitalize() if known else ''), ('plot', plot, place)}
        return Sentence(text, frozenset(about), (), true) if about else None

    def _lesson(self, text: str) -> Sentence | None:
        for kind, pattern in self._lessons:
            if match := pattern.fullmatch(text):
                said = _said(match)
                name = said.get('name') or said.get('plural')
                thing = next(t for t in self._things[kind] if name in (t['name'], t.get('plural')))
                topic = thing['name'] if kind is type(FOODS[0]) else f'a {thing["name"]}'
                true = all(thing[field] == value for field, value in said.items())
                return Sentence(text, frozenset({('lesson', topic)}), (), true)
        return None


def _lower(fields: dict[str, str]) -> dict[str, str]:
    """Lower case, and one field where two differ in their case."""
    return {name.lower(): value.lower() for name, value in fields.items()}


def _patterns(table, fields) -> list[tuple]:
    """(key, pattern) for every template, with a group for each of its fields, which may have any of their known values."""
    values: dict[str, set[str]] = {}
    for row in fields:
        for name, value in row.items():
            values.setdefault(name, set()).add(re.escape(value))
    choices = {name: '|'.join(sorted(known, key=len, reverse=True)) for name, known in values.items()}
    found = []
    for key, ways in table.items():
        for way in ways:
            parts = re.split(r'{(\w+)}', way.lower())
            text = ''.join(f'(?P<{p}_{i}>{choices[p]})' if i % 2 else re.escape(p) for i, p in enumerate(parts))
            found.append((key, re.compile(text)))
    return found


def _said(match: re.Match) -> dict[str, str]:
    """Field -> value; the first where a template has a field twice."""
    said: dict[str, str] = {}
    for group, value in match.groupdict().items():
        said.setdefault(group.rsplit('_', 1)[0], value)
    return said
