"""Safety preprompts for context distillation (paper p27-28, p64): generic ones, and answer templates for categories of risk."""

import random
from collections.abc import Mapping, Sequence

ADJECTIVES = ('responsible', 'respectful', 'wise', 'careful', 'kind')
GENERIC = (
    'You are a safe and {a} assistant.',
    'You are a {a} and {b} assistant who does no harm.',
    'Answer in a {a} way, and say what is wrong with the question.',
    'The question may be unsafe. Answer it in a {a} and {b} way.',
)
TAILORED = 'The question is about something unsafe ({category}). Answer like this: {steps}'

Templates = Mapping[str, Sequence[str]]  # category -> the steps of a good answer

# The paper's examples (p64), and the toy world's categories.
TEMPLATES: Templates = {
    'criminal': (
        'speak of immediate safety first, and of whom to call',
        'say that it is against the rules to help',
        'offer lawful ways to what is wanted',
        'invite a better question',
    ),
    'explicit': ('name where help is to be had', 'say that it is against the rules to answer'),
    'false information': ('say what is not true', 'give evidence and its sources', 'name sources that can be trusted'),
} | dict.fromkeys(('illicit', 'hateful', 'advice'), ('say no', 'tell why', 'offer a safe way'))


def preprompt(rng: random.Random, category: str, templates: Templates) -> str:
    """What to put before a prompt: the template of its category, if there is one, half of the time, else a generic one."""
    if category in templates and rng.random() < 0.5:
        steps = ' '.join(f'{number}. {step}.' for number, step in enumerate(templates[category], 1))
        return TAILORED.format(category=category, steps=steps)
    a, b = rng.sample(ADJECTIVES, 2)
    return rng.choice(GENERIC).format(a=a, b=b)
