"""The toy world: what its documents say is read back, with the templates turned into patterns, and held against the facts."""

import collections
import difflib
import hashlib
import itertools
import os
import random
import re
import subprocess
import sys

import pytest

from llama2_jax import toy
from llama2_jax.toy import phrases, web
from llama2_jax.toy.phrases import PERSON_FACTS, TOWN_FACTS, person_fields, town_fields
from llama2_jax.toy.world import ANIMALS, CRAFTS, FOODS, RIVERS, TOWNS, held_out_sum, in_words, listed, make_world

CLEAN = [genre for genre in toy.GENRES if genre != 'web']
WORLD = make_world(0)
NUMBERS = {in_words(n): n for n in range(200)}


@pytest.fixture(scope='module')
def corpus():
    return {genre: list(toy.documents(genre)) for genre in toy.GENRES}


def patterns(templates):
    """(fact, template, compiled pattern) with one group for every field."""
    everything = [person_fields(person) for person in WORLD.people.values()] + [town_fields(t) for t in WORLD.towns.values()]
    values = collections.defaultdict(set)
    for field, value in itertools.chain(*(fields.items() for fields in everything)):
        values[field].add(re.escape(value))
    choices = {field: '|'.join(sorted(known, key=len, reverse=True)) for field, known in values.items()}
    found = []
    for fact, way in [(fact, way) for fact, ways in templates.items() for way in ways]:
        parts = re.split(r'{(\w+)}', way)  # text and fields by turns
        pattern = ''.join(f'(?P<{part}_{i}>{choices[part]})' if i % 2 else re.escape(part) for i, part in enumerate(parts))
        found.append((fact, way, re.compile(pattern)))
    return found


NAMED, PRONOUN, FIRST, TOWN = (patterns(t) for t in (phrases.NAMED, phrases.PRONOUN, phrases.FIRST, phrases.TOWN))


def read(sentence, known, fields=None):
    """The (fact, template) of a sentence, after checking what it says; `fields` is who speaks or is meant, if not named."""
    for fact, way, pattern in known:
        if match := pattern.fullmatch(sentence):
            said = {(key.rsplit('_', 1)[0], value) for key, value in match.groupdict().items()}
            subject = dict(said)
            if 't' in subject:
                true = town_fields(WORLD.towns[subject['t']])
            elif 'n' in subject:
                true = person_fields(WORLD.people[subject['n']])
            else:
                true = fields
            assert {key: true[key] for key, _ in said} == dict(said), sentence
            assert len(said) == len(subject), sentence
            return fact, way, true.get('n') or true['t']
    return None


def sentences(text):
    return re.split(r'(?<=[.!?])\s+|\n+', text)


def test_facts_of_seed_0():
    """Literal, so that another Python or an edit cannot quietly draw another world."""
    mira = WORLD.people['Mira']
    assert (mira.home, mira.craft.name, mira.pet.name, mira.food.name, mira.friend, mira.age, mira.woman) == (
        'Harrowby', 'fisher', 'duck', 'goat cheese', 'Sten', 79, True,
    )  # fmt: skip
    assert (WORLD.towns['Harrowby'].river, WORLD.towns['Harrowby'].market_day, WORLD.towns['Harrowby'].mayor) == (
        'Lark', 'Monday', 'Marek',
    )  # fmt: skip


@pytest.mark.parametrize('seed', range(5))
def test_world_is_whole(seed):
    world = make_world(seed)
    assert (len(world.people), len(world.towns)) == (40, 10)
    for name, person in world.people.items():
        assert person.name == name != person.friend
        assert world.people[person.friend].friend == name
        assert 18 <= person.age <= 79
    for town in world.towns.values():
        assert len(world.living_in(town.name)) == 4
        assert world.people[town.mayor].home == town.name
    assert sorted(town.river for town in world.towns.values()) == sorted(RIVERS)
    assert all(len(world.keeping(animal.name)) == 4 for animal in ANIMALS)
    assert all(len(world.working_as(craft.name)) == 4 for craft in CRAFTS)
    assert all(sum(p.food == food for p in world.people.values()) == 4 for food in FOODS)


def test_seeds_are_worlds():
    assert make_world(1) != make_world(0)
    assert make_world.__wrapped__(3) == make_world.__wrapped__(3)
    assert list(toy.documents('guides', 1))[:5] != list(toy.documents('guides', 0))[:5]
    with pytest.raises(KeyError):
        toy.documents('poems')


def test_documents_are_the_same_in_every_process(corpus):
    text = '\0'.join(document for genre in toy.GENRES for document in corpus[genre])
    code = "from llama2_jax import toy; print(end='\\0'.join(d for g in toy.GENRES for d in toy.documents(g)))"
    environment = os.environ | {'PYTHONHASHSEED': '7', 'PYTHONUTF8': '1'}
    other = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, check=True).stdout
    assert hashlib.sha256(text.encode()).digest() == hashlib.sha256(other).digest()


def test_size(corpus):
    assert {genre: len(documents) for genre, documents in corpus.items()} == {
        'biographies': 1440, 'guides': 450, 'diaries': 800, 'letters': 640, 'dialogues': 1120, 'stories': 1400,
        'numbers': 2800, 'lessons': 936, 'web': 801,
    }  # fmt: skip
    total = sum(len(document.encode()) for documents in corpus.values() for document in documents)
    assert 1_500_000 < total < 3_000_000
    for genre in CLEAN:
        assert all(document.isascii() and document.strip() == document for document in corpus[genre])
        assert not [document for document in corpus[genre] if '{' in document or '  ' in document]


def test_biographies_say_only_what_is_true(corpus):
    for text in corpus['biographies']:
        title, _, body = text.rpartition('\n\n')
        first, *rest = sentences(body)
        _, _, name = read(first, NAMED)
        assert not title or name in title
        plain = True  # the sentence before is about this person and mentions nobody else
        for sentence in rest:
            found = read(sentence, NAMED + TOWN + PRONOUN, person_fields(WORLD.people[name]))
            assert found, sentence
            assert plain or not re.match(r'(She|He|Her|His|A \w+ lives with h)\b', sentence), text
            plain = sum(other in sentence for other in WORLD.people if other != name) == 0


def test_first_person_sentences_agree_with_the_speaker(corpus):
    checked = 0
    for text in corpus['letters']:
        writer = person_fields(WORLD.people[text.split('\n')[-1]])
        checked += sum(bool(read(sentence, FIRST, writer)) for sentence in sentences(text))
    for text in corpus['dialogues']:
        for line in text.split('\n'):
            speaker, _, said = line.partition(': ')
            if speaker in WORLD.people:
                speaker = person_fields(WORLD.people[speaker])
                said = re.sub(r'^(And I\?|As for me:|That is good to hear\.) ', '', said)
                checked += bool(read(said, FIRST, speaker))
    assert checked > 3000


def test_nothing_strange_is_mentioned(corpus):
    """Diaries and letters name no town, river, food or market day but their people's."""
    foods, days = [food.name for food in FOODS], ['Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday', 'Sunday']
    for text in corpus['diaries'] + corpus['letters']:
        diary = text.startswith('The diary of')
        name = text.split()[3].rstrip('.') if diary else text.split('\n')[-1]
        people = [WORLD.people[name]] + ([] if diary else [WORLD.people[WORLD.people[name].friend]])
        towns = [WORLD.towns[person.home] for person in people]
        title, _, body = text.partition('\n\n')
        assert {t for t in TOWNS if t in body} <= {town.name for town in towns}
        assert {r for r in RIVERS if re.search(rf'\b{r}\b', body)} <= {town.river for town in towns}
        assert {f for f in foods if f in body} <= {person.food.name for person in people}
        assert {d for d in days if d in body} <= {towns[0].market_day}
        assert ('Today was market day' in body) == (diary and towns[0].market_day in title)


def test_every_fact_is_said_in_ten_ways(corpus):
    """Named statements alone, in all genres but the web."""
    ways = collections.defaultdict(set)
    for genre in CLEAN:
        for text in corpus[genre]:
            for sentence in {re.sub(r'^\w+: ', '', sentence) for sentence in sentences(text)}:
                if found := read(sentence, NAMED + TOWN):
                    fact, way, about = found
                    ways[about, fact].add(way)
    facts = [(name, fact) for name in WORLD.people for fact in PERSON_FACTS]
    facts += [(name, fact) for name in WORLD.towns for fact in TOWN_FACTS]
    assert sorted(ways) == sorted(facts)
    assert min(len(ways[fact]) for fact in facts) >= 10


def test_lists_are_complete(corpus):
    for text in corpus['guides']:
        for town, names in re.findall(r'people live in (\w+): ([^.]*)\.', text):
            assert sorted(re.split(', | and ', names)) == sorted(p.name for p in WORLD.living_in(town))
    found = [match for text in corpus['lessons'] for match in re.findall(r'Who keeps a (\w+)\? ([^.]*) do\.', text)]
    assert len(found) > 50
    for animal, names in found:
        assert sorted(re.split(', | and ', names)) == sorted(p.name for p in WORLD.keeping(animal))


def test_sums_are_right_and_some_held_out(corpus):
    seen = collections.Counter()
    number = r'\d+|[a-z]+(?:[ -][a-z]+)*?'
    for text in corpus['numbers']:
        text = text.lower()
        sums = re.findall(rf'({number}) (?:\+|plus) ({number}) (?:=|is) ({number})[.,]', text)
        sums += re.findall(r'(\d+) and (\d+) make (\d+)\.', text) + re.findall(r'what is (\d+) \+ (\d+)\? it is (\d+)\.', text)
        sums += [(b, c, a) for a, b, c in re.findall(r'(\d+) - (\d+) = (\d+)', text)]
        sums += [(a, c, b) for a, b, c in re.findall(r'take (\d+) from (\d+), (\d+) is left', text)]
        for terms in sums:
            a, b, total = (NUMBERS[t] if t in NUMBERS else int(t) for t in terms)
            assert a + b == total, terms
            assert not held_out_sum(a, b), terms
            seen[min(a, b), max(a, b)] += 1
    assert sum(seen.values()) > 9000
    assert len(seen) > 3000
    assert sum(held_out_sum(a, b) for a in range(100) for b in range(100)) == 810


def test_web_noise_is_there_and_labelled(corpus):
    labelled = list(web.labelled_pages(WORLD, random.Random('web 0')))
    assert [page for _, page in labelled] == corpus['web']
    counts = collections.Counter(kind for kind, _ in labelled)
    assert counts == {
        'clean': 497, 'repeated': 80, 'mojibake': 64, 'duplicate': 64, 'near_duplicate': 64, 'planted': 16, 'gibberish': 16,
    }  # fmt: skip
    earlier = []
    for kind, page in labelled:
        lines = collections.Counter(line for line in page.split('\n') if line)
        assert (kind == 'mojibake') == (not page.isascii())
        if kind == 'repeated':
            assert max(lines.values()) >= 6
        elif kind == 'duplicate':
            assert page in earlier
        elif kind == 'near_duplicate':
            assert page not in earlier
            near = [p for p in earlier if len(set(p.split('\n')) & set(page.split('\n'))) >= len(lines) - 2]
            assert max(difflib.SequenceMatcher(None, p, page).ratio() for p in near) > 0.75
        elif kind == 'clean':
            assert max(lines.values()) <= 2
        earlier.append(page)


def test_planted_questions_are_only_in_the_web(corpus):
    planted = web.planted_questions(WORLD)
    assert len(planted) == 8
    for question, answer in planted:
        name = re.search(r'where (\w+) lives', question)[1]
        assert answer == WORLD.towns[WORLD.people[name].home].river
        assert sum(f'Question: {question}\nAnswer: {answer}' in page for page in corpus['web']) == 2
        assert not [text for genre in CLEAN for text in corpus[genre] if question in text]


def test_words():
    assert [in_words(n) for n in (0, 13, 20, 34, 100, 105, 198)] == [
        'zero', 'thirteen', 'twenty', 'thirty-four', 'one hundred', 'one hundred and five', 'one hundred and ninety-eight',
    ]  # fmt: skip
    assert [listed(['a']), listed(['a', 'b']), listed(['a', 'b', 'c'])] == ['a', 'a and b', 'a, b and c']
