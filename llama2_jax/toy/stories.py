"""Small stories: somebody of the world, some trouble, somebody who helps, an end and what it teaches."""

import random
from collections.abc import Iterator

from llama2_jax.toy.phrases import Speaker, person_fields
from llama2_jax.toy.world import World

OPENINGS = (
    'Once upon a time there was a {craft} called {n}.',
    'This is a story about {n}, a {craft} from {home}.',
    'One morning, {n} woke up early.',
    '{n} the {craft} lived in {home}.',
    'Long ago, or maybe last week, {n} went for a walk in {home}.',
    'In {home}, by the river {river}, lived {n}.',
    'It was a cold day, and {n} sat at home with {p} {pet}.',
)

# Trouble, how it is met, how it ends; {b} is another person, {bs} she or he, {bp} her or his, {bo} her or him.
PLOTS = (
    (
        ('The {pet} was gone.', 'When {n} opened the door, the {pet} ran away.', 'One day the {pet} of {n} did not come home.'),
        ('{n} called and called, but heard nothing.', '{n} looked behind the house and under the bridge.'),
        ('Then {b} came and brought the {pet} back.', 'In the end {b} found the {pet} in the garden, asleep.'),
        ('A friend is somebody who helps you look.', 'Close the door when you have a {pet}.'),
    ),
    (
        ('The bridge over the {river} was broken.', 'After the rain, the {river} took the bridge away.'),
        ('{n} could not carry it alone, so {s} asked {b}.', 'Nobody could go to the market any more.'),
        ('Together {n} and {b} built a new bridge of strong wood.', '{b} brought ropes, and by evening the bridge was whole.'),
        ('Two people can do what one cannot.', 'Many hands make a bridge.'),
    ),
    (
        ('A hungry stranger knocked at the door.', 'An old man sat by the road and had nothing to eat.'),
        ('{n} had only a little {food} left, and {s} loved {food}.', 'First, {n} wanted to keep the {food} for {o}self.'),
        ('But {s} gave half of it away, and the stranger smiled.', 'Still, {n} shared, and it tasted better than ever.'),
        ('Food is best when it is shared.', 'Who gives a little gets a lot.'),
    ),
    (
        ('Rats came into the granary and ate the grain.', 'One night the granary of {home} was full of rats.'),
        ('{b} wanted to put out poison, but the children played there.', '{n} closed every hole, but the rats made new ones.'),
        ('Then {n} brought two cats, and the rats left.', 'So {n} put the grain into jars of clay, and the rats left.'),
        ('A good plan is better than poison.', 'Keep the grain dry and closed, and the rats stay out.'),
    ),
    (
        ('{n} laughed about the old hat of {b}.', '{n} said something unkind about {b}.'),
        ('{b} said nothing and went home alone.', 'That evening {b} cried, and {n} heard of it.'),
        ('The next day {n} said sorry, and {b} forgave {o}.', '{n} felt bad and brought {b} some {food} to say sorry.'),
        ('Mocking a neighbour helps nobody.', 'A kind word costs nothing.'),
    ),
    (
        ('A child wanted to eat the black berries of the nightshade.', 'Somebody gave {b} a drink made of nightshade.'),
        ('{n} saw it and shouted: Stop!', '{n} knew that nightshade is poison.'),
        ('They asked the healer, and nobody was hurt.', 'The healer came in time and said that all was well.'),
        ('Never eat a plant that you do not know.', 'Ask the healer, not the neighbour, about medicine.'),
    ),
    (
        ('Somebody had broken the lock of the granary.', 'In the night, a thief opened the granary.'),
        ('{n} thought of taking some grain, too, but {s} did not.', '{b} said that nobody would see it, but {n} shook {p} head.'),
        ('They told the mayor, and the lock was mended.', 'In the morning the thief came back and said sorry.'),
        ('What belongs to all must be kept for all.', 'Honest people sleep well.'),
    ),
    (
        ('At night there was a strange noise in the house.', 'Something knocked at the window, and it was dark.'),
        ('{n} was afraid and hid under the bed.', '{n} lit a candle and called {b}.'),
        ('But it was only the {pet}, looking for {eats}.', 'It was only the wind, and they laughed.'),
        ('Look before you are afraid.', 'A light makes a small thing small again.'),
    ),
    (
        ('{n} had lost {p} way in the fog.', 'The fog was so thick that {n} saw nothing.'),
        ('{n} heard the water of the {river} and followed it.', '{n} sat down on a stone and waited.'),
        ('{b} rang a bell, and so {n} found {p} way to {home}.', 'When the fog was gone, {n} stood right before {p} own door.'),
        ('When you are lost, stay calm.', 'The river always knows the way.'),
    ),
    (
        ('{n} wanted to {make}, but {p} tools were broken.', 'The work did not go well: {n} had no good tools that day.'),
        ('{n} asked {b}, who lent {o} what {s} needed.', '{n} tried again and again until it was dark.'),
        ('At last the work was done, and it was the best ever.', 'The next day all the {goods} were sold before noon.'),
        ('Patience is the best tool.', 'Do not stop at the first try.'),
    ),
    (
        ('There was a race along the river, and {n} wanted to win.', '{n} and {b} wanted to see who was faster.'),
        ('Half way, {b} fell and hurt {bp} foot.', 'Near the end {b} could not run any more.'),
        ('{n} stopped, helped {b} up, and they walked on together.', 'So {n} turned back and carried {b} home.'),
        ('Winning is not everything.', 'It is better to arrive together.'),
    ),
    (
        ('{n} found a gold coin in the street.', 'Under a bench lay a purse full of coins.'),
        ('{n} asked everybody whose it was.', 'With it, {n} could have bought {food} for a year.'),
        ('It belonged to {b}, who thanked {o} with all {bp} heart.', '{b} had lost it, and now {bs} danced for joy.'),
        ('What you find is not always yours.', 'Honesty makes friends.'),
    ),
)  # fmt: skip

SHORT = (
    ('{n} took {p} {pet} to the river {river}.', 'The {pet} did not want to go home again.'),
    ('{n} made {food} for {b}.', '{b} asked for more.'),
    ('{n} the {craft} worked until it was dark.', 'Then {s} slept like a stone.'),
    ('A bird sat down on the roof of {n}.', '{S} gave it some grain, and it sang.'),
    ('{n} told {b} a joke.', '{b} laughed all the way home.'),
    ('The {pet} of {n} saw its own face in the water.', 'It thought that it had found a friend.'),
    ('{n} planted a small tree in {home}.', 'Many years later, children sat in its shade.'),
    ('It rained, and {n} had no coat.', '{b} gave {o} one, and {s} was warm again.'),
)  # fmt: skip


def stories(world: World, rng: random.Random) -> Iterator[str]:
    """Stories of six to nine sentences, and some of two."""
    speaker = Speaker(world, rng)
    for _ in range(1000):
        name, helper = rng.sample(list(world.people), 2)
        if rng.random() < 0.5:
            helper = world.people[name].friend
        fields = story_fields(world, name, helper)
        trouble, attempt, end, lesson = (rng.choice(part).format(**fields) for part in rng.choice(PLOTS))
        text = [rng.choice(OPENINGS).format(**fields), speaker.named(name, rng.choice(('pet', 'home', 'craft', 'food')))]
        if helper == world.people[name].friend:
            text.append(speaker.named(name, 'friend'))
        else:
            text.append(speaker.named(helper, rng.choice(('home', 'craft', 'pet'))))
        yield ' '.join([*text, trouble, attempt, end, lesson])
    for _ in range(400):
        name, helper = rng.sample(list(world.people), 2)
        first, second = (sentence.format(**story_fields(world, name, helper)) for sentence in rng.choice(SHORT))
        yield rng.choice((f'A two-sentence story about {name}.\n\n', 'A very short story.\n\n', '')) + f'{first} {second}'


def story_fields(world: World, name: str, helper: str) -> dict[str, str]:
    """What a plot can say: all about `name`, the river of the home, and the helper."""
    person, other = world.people[name], person_fields(world.people[helper])
    return person_fields(person) | {
        'river': world.towns[person.home].river,
        'b': helper,
        'bs': other['s'],
        'bp': other['p'],
        'bo': other['o'],
    }
