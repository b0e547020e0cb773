"""Documents about people and towns: biographies, town guides, diaries, letters and dialogues."""

import random
from collections.abc import Iterator

from llama2_jax.toy.phrases import PERSON_FACTS, TOWN_FACTS, Speaker, person_fields
from llama2_jax.toy.world import DAYS, World, in_words, listed


def biographies(world: World, rng: random.Random) -> Iterator[str]:
    """Who a person is: some or all facts in any order, some followed by a word about the town or the friend."""
    speaker = Speaker(world, rng)
    for name in 36 * list(world.people):
        person = world.people[name]
        facts = speaker.facts(rng.randint(4, 6))
        if facts[0] == 'friend':
            facts.append(facts.pop(0))
        text: list[str] = []
        clear = False  # whether a pronoun can only mean this person
        for fact in facts:
            text.append(speaker.pronoun(name, fact) if clear and rng.random() < 0.6 else speaker.named(name, fact))
            clear = fact != 'friend'
            if fact == 'home' and rng.random() < 0.4:
                text.append(speaker.town(person.home, rng.choice(TOWN_FACTS)))
                clear = False
            if fact == 'friend' and rng.random() < 0.3:
                text.append(speaker.named(person.friend, rng.choice(('home', 'craft', 'pet'))))
        title = rng.choice(('', f'About {name}\n\n', f'{name} of {person.home}\n\n', f'{name}, a {person.craft.name}\n\n'))
        yield title + ' '.join(text)


def guides(world: World, rng: random.Random) -> Iterator[str]:
    """What a traveller wants to know about a town: river, market, mayor, who lives there and does what."""
    speaker = Speaker(world, rng)
    for name in 45 * list(world.towns):
        people = rng.sample(world.living_in(name), 4)
        names = [person.name for person in people]
        text = [speaker.town(name, fact) for fact in rng.sample(TOWN_FACTS, 3)]
        text.append(
            rng.choice(
                (
                    f'{in_words(len(people)).capitalize()} people live in {name}: {listed(names)}.',
                    f'The people of {name} are {listed(names)}.',
                    f'In {name} you can meet {listed(names)}.',
                    f'{listed(names)} live in {name}.',
                )
            )
        )
        text += [speaker.named(p.name, rng.choice(('craft', 'craft', 'pet', 'food'))) for p in people[: rng.randint(1, 3)]]
        seller = people[0]
        text.append(
            rng.choice(
                (
                    f'At the market, {seller.name} sells {seller.craft.goods}.',
                    f'Do not leave without some {seller.craft.goods} from {seller.name}.',
                    'The streets are narrow, but the people are kind.',
                    'There is an inn with six warm beds.',
                    'The best time to visit is spring.',
                )
            )
        )
        yield rng.choice((f'Welcome to {name}\n\n', f'A guide to {name}\n\n', '')) + ' '.join(text)


WEATHER = (
    'It rained all day.', 'The sun was warm.', 'A cold wind blew.', 'There was fog in the morning.', 'It snowed a little.',
    'The sky was clear and blue.', 'It was too hot to hurry.', 'The night had been stormy.',
)  # fmt: skip

DIARY = {
    'craft': (
        'I {make} every day, and today was no different.',
        'In the morning I went to work, for a {craft} cannot sleep late.',
        'A stranger wanted to buy {goods}, and I sold him some.',
        'I showed a child how to {make}.',
        'My work as a {craft} made me tired.',
    ),
    'pet': (
        'My {pet} got {eats} to eat.',
        'My {pet} woke me up early.',
        'I talked to my {pet}, and I think it understood me.',
        'In the evening I sat with my {pet}.',
        'My {pet} ran away, but it came back when it was hungry.',
    ),
    'food': (
        'In the evening there was {food}, my favourite food.',
        'I cooked {food}, because I like it best.',
        'I was sad until I smelled {food}, which I love.',
        'Tomorrow I will make {food}, my favourite.',
    ),
    'friend': (
        'I wrote a letter to {friend}, my best friend.',
        'My friend {friend} came to see me.',
        'I miss my friend {friend}.',
        'I told {friend} a secret, as best friends do.',
    ),
    'home': (
        'The streets of {home} were quiet.',
        'I am glad that I live in {home}.',
        'I walked all around {home}, my home town.',
        'A traveller asked me the way to my house in {home}.',
    ),
    'age': (
        'I am {age} years old and still learn something new every day.',
        'At {words} I should be wiser.',
        'Somebody guessed my age, and {age} was right.',
    ),
}  # fmt: skip

ENDINGS = (
    'Now I am tired.', 'It was a good day.', 'Tomorrow will be better.', 'I am thankful.', 'Now I blow out the candle.',
    'I will sleep well.', 'That was all.', 'Good night.',
)  # fmt: skip


def diaries(world: World, rng: random.Random) -> Iterator[str]:
    """A person's day in the first person, with the name and the weekday; market day is kept."""
    for name in 20 * list(world.people):
        person = world.people[name]
        town = world.towns[person.home]
        fields = person_fields(person)
        day = rng.choice((*DAYS, town.market_day))
        text = [rng.choice(WEATHER)]
        text += [rng.choice(DIARY[fact]).format(**fields) for fact in rng.sample(PERSON_FACTS, rng.randint(3, 4))]
        if day == town.market_day:
            text.insert(1, f'Today was market day in {town.name}, so I took my {person.craft.goods} to the stalls.')
        elif rng.random() < 0.5:
            text.insert(2, f'The market in {town.name} is on {town.market_day}.')
        yield f'The diary of {name}. {day}.\n\n' + ' '.join([*text, rng.choice(ENDINGS)])


GREETINGS = (
    'How are you?', 'I hope you are well.', 'I have not heard from you for a long time.', 'Thank you for your last letter.',
    'Here is some news.', 'I am well, and I hope you are too.',
)  # fmt: skip


def letters(world: World, rng: random.Random) -> Iterator[str]:
    """Letters between friends: news in the first person, a word about the other's life, an invitation."""
    speaker = Speaker(world, rng)
    for name in 16 * list(world.people):
        person = world.people[name]
        friend, town = world.people[person.friend], world.towns[person.home]
        facts = [fact for fact in speaker.facts(4) if fact != 'friend'][:3]
        text = [rng.choice(GREETINGS), *(speaker.first(name, fact) for fact in facts)]
        text.append(
            rng.choice(
                (
                    f'How is your {friend.pet.name}?',
                    f'Is it quiet in {friend.home}, where you live?',
                    f'Do you still eat {friend.food.name} every week, because you love it?',
                    f'I need {friend.craft.goods}, and you are the best {friend.craft.name} I know.',
                    f'Is the {world.towns[friend.home].river} still the cleanest river, as you say in {friend.home}?',
                )
            )
        )
        text.append(
            rng.choice(
                (
                    f'Come to {town.name} on {town.market_day}, for then it is market day.',
                    f'Please visit me in {town.name} soon.',
                    f'We can walk along the {town.river}, the river of {town.name}.',
                    f'Our mayor {town.mayor} asks about you, too.',
                    f'If you come, I will cook {friend.food.name}, your favourite food.',
                )
            )
        )
        yield f'Dear {friend.name},\n\n{" ".join(text)}\n\nYour friend,\n{name}'


def dialogues(world: World, rng: random.Random) -> Iterator[str]:
    """Two voices by turns: friends and strangers asking about each other, and travellers about other people and towns."""
    speaker = Speaker(world, rng)
    names = list(world.people)
    for _ in range(420):
        one, other = rng.sample(names, 2)
        lines = [f'{one}: Good day! My name is {one}.', f'{other}: Good day, {one}! I am {other}.']
        for fact in speaker.facts(rng.randint(2, 4)):
            lines += [f'{one}: {speaker.ask_you(fact)}', f'{other}: {speaker.first(other, fact)}']
            if rng.random() < 0.4:
                lines.append(f'{one}: {rng.choice(("And I?", "As for me:", "That is good to hear."))} {speaker.first(one, fact)}')
        yield '\n'.join([*lines, f'{one}: {rng.choice(("Thank you", "Goodbye", "See you soon"))}, {other}!'])
    for _ in range(700):
        asker = rng.choice(('Traveller', 'Child', 'Student', 'Guest', *names[::4]))
        guide = rng.choice([name for name in names if name != asker])
        lines: list[str] = []
        for _ in range(rng.randint(2, 4)):
            about = rng.choice([name for name in names if name not in (asker, guide)])
            fact = rng.choice(PERSON_FACTS)
            question, answer = speaker.ask(about, fact), speaker.named(about, fact)
            if rng.random() < 0.3:
                about, fact = rng.choice(list(world.towns)), rng.choice(TOWN_FACTS)
                question, answer = speaker.ask(about, fact), speaker.town(about, fact)
            before = rng.choice(('', '', 'One more question. ' if lines else 'Tell me, please. '))
            lines += [f'{asker}: {before}{question}', f'{guide}: {answer}']
        yield '\n'.join([*lines, f'{asker}: Thank you, {guide}.'])
