"""The toy world, generated on the fly: `documents` to pretrain on, `RECORDS` of dialogs and prompts, and an exact `Oracle`.

Nothing is shipped, nothing is downloaded.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

from llama2_jax.toy import dialogs, lessons, people, preferences, stories, web
from llama2_jax.toy.world import make_world

_WRITERS = {
    'biographies': people.biographies,
    'guides': people.guides,
    'diaries': people.diaries,
    'letters': people.letters,
    'dialogues': people.dialogues,
    'stories': stories.stories,
    'numbers': lessons.numbers,
    'lessons': lessons.lessons,
    'web': web.web,
}

GENRES: tuple[str, ...] = tuple(_WRITERS)

RECORDS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    'dialogs': dialogs.dialogs,
    'helpful': dialogs.helpful,
    'harmless': dialogs.harmless,
    'refusals': dialogs.refusals,
    'borderline': dialogs.borderline,
    'hasty': dialogs.hasty,
    'naive': dialogs.naive,
    'cautious': dialogs.cautious,
    'obedient': dialogs.obedient,
    'talks': dialogs.talks,
    'prompts': dialogs.prompts,
    'safety_prompts': dialogs.safety_prompts,
    'heldout': dialogs.heldout,
    'attacks': dialogs.attack_prompts,
    'attacks_heldout': dialogs.attacks_heldout,
    'borderline_heldout': dialogs.borderline_heldout,
    'preferences': preferences.preferences,
    'many_preferences': preferences.many_preferences,
    'preferences_biased': preferences.biased,
    'preferences_heldout': preferences.preferences_heldout,
    'safety_preferences': preferences.safety_preferences,
    'safety_preferences_heldout': preferences.safety_preferences_heldout,
}


def documents(genre: str, seed: int = 0) -> Iterator[str]:
    """All documents of a genre about the world of `seed`: finite, and the same at every call.

    The seed draws both the facts and the wording, so documents of one seed agree with `make_world(seed)` and with each other.

    Args:
      genre: one of `GENRES`. All are plain ASCII but for the noise in 'web'.
      seed: names the world.

    Raises:
      KeyError: for another genre.
    """
    writer = _WRITERS[genre]
    return writer(make_world(seed), random.Random(f'{genre} {seed}'))
