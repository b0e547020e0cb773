"""Pages of the toy world's web: true like everything else, but a third of them noisy, so that curation has something to find."""

import random
from collections.abc import Iterator

from llama2_jax.toy.phrases import PERSON_FACTS, TOWN_FACTS, Speaker
from llama2_jax.toy.world import World, listed

NOISE = {
    'clean': 62,
    'repeated': 10,
    'mojibake': 8,
    'duplicate': 8,
    'near_duplicate': 8,
    'planted': 2,
    'gibberish': 2,
}  # per cent
PAGES = 800


def planted_questions(world: World) -> list[tuple[str, str]]:
    """Evaluation questions (two hops, one for every fifth person) with answers, which the web leaks word for word.

    A contamination check has to find them; no other genre holds such a question.
    """
    return [
        (f'Which river runs through the town where {person.name} lives?', world.towns[person.home].river)
        for person in list(world.people.values())[::5]
    ]


def web(world: World, rng: random.Random) -> Iterator[str]:
    """The text of every page of `labelled_pages`."""
    for _, page in labelled_pages(world, rng):
        yield page


def labelled_pages(world: World, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Pairs of (a key of `NOISE`, page): what is wrong with a page is known, so a filter can be graded."""
    pages = [clean_page(world, rng)]
    yield 'clean', pages[0]
    kinds = [kind for kind, share in NOISE.items() for _ in range(PAGES * share // 100)]
    rng.shuffle(kinds)
    planted = planted_questions(world)
    for kind in kinds:
        if kind == 'clean':
            page = clean_page(world, rng)
            pages.append(page)
        elif kind == 'repeated':
            page = repeated_page(clean_page(world, rng), rng)
        elif kind == 'mojibake':
            page = mojibake_page(clean_page(world, rng), rng)
        elif kind == 'duplicate':
            page = rng.choice(pages)
        elif kind == 'near_duplicate':
            page = near_duplicate(rng.choice(pages), rng)
        elif kind == 'planted':
            question, answer = planted[0]
            planted = planted[1:] + planted[:1]
            page = f'{header(rng)}\n\nQuiz of the week\n\nQuestion: {question}\nAnswer: {answer}\n\n{clean_page(world, rng)}'
        else:
            page = ' '.join(''.join(rng.choices('abcdefghijklmnop0123456789#$%&*', k=rng.randint(2, 12))) for _ in range(60))
        yield kind, page


def header(rng: random.Random) -> str:
    """The line of links that every page of a site begins with."""
    return rng.choice(('Home | News | Market | Contact', 'Start > Towns > People', 'Log in - Register - Help'))


def clean_page(world: World, rng: random.Random) -> str:
    """News of a town, a forum, or a page of things for sale."""
    speaker = Speaker(world, rng)
    town = world.towns[rng.choice(list(world.towns))]
    people = rng.sample(list(world.people), 4)
    kind = rng.randrange(3)
    if kind == 0:
        body = [f'News from {town.name}', speaker.town(town.name, 'mayor')]
        body += [speaker.town(town.name, rng.choice(TOWN_FACTS)) for _ in range(2)]
        body += [speaker.named(person.name, rng.choice(PERSON_FACTS)) for person in rng.sample(world.living_in(town.name), 2)]
        body.append(f'{rng.randint(2, 90)} people came to the market in {town.name} last {town.market_day}.')
    elif kind == 1:
        body = ['Forum: who knows whom?']
        for name in people[1:]:
            fact = rng.choice(PERSON_FACTS)
            body += [
                f'guest{rng.randint(1, 999)} wrote: {speaker.ask(name, fact)}',
                f'{people[0]} wrote: {speaker.named(name, fact)}',
            ]
    else:
        sellers = [world.people[name] for name in people]
        body = [f'FOR SALE: {listed([seller.craft.goods for seller in sellers])}']
        body += [
            f'{p.craft.goods.capitalize()}, {rng.randint(2, 20)} coins. Ask {p.name}, the {p.craft.name} in {p.home}.'
            for p in sellers
        ]
    footer = rng.choice((f'Visitor number {rng.randint(100, 99999)}', 'All rights reserved.', f'Written by {people[0]}.'))
    return '\n'.join([header(rng), '', *body, '', footer])


def repeated_page(page: str, rng: random.Random) -> str:
    """One line of the page, over and over."""
    lines = page.split('\n')
    at = rng.randrange(2, len(lines) - 2)
    return '\n'.join(lines[:at] + [lines[at]] * rng.randint(6, 30) + lines[at + 1 :])


def mojibake_page(page: str, rng: random.Random) -> str:
    """UTF-8 that somebody read as Windows-1252, once or twice."""
    page = page.replace("'", '’').replace(' - ', ' — ').replace('All rights', '© All rights')
    page = f'Café “{rng.choice(("Zur Mühle", "Österlund", "Señor Niño"))}”\n{page}'
    for _ in range(rng.randint(1, 2)):
        page = page.encode().decode('cp1252', errors='replace')
    return page


def near_duplicate(page: str, rng: random.Random) -> str:
    """A page that lost a line, or has a new visitor number, or ends in another line."""
    lines = page.split('\n')
    kind = rng.randrange(3)
    if kind == 0:
        del lines[rng.randrange(2, len(lines) - 2)]
    elif kind == 1:
        lines[-1] = f'Visitor number {rng.randint(100000, 999999)}'
    else:
        lines.append(f'Copied from another site on day {rng.randint(1, 365)}.')
    return '\n'.join(lines)
