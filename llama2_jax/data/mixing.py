"""Mixtures: which sources with what weights, how many sequences of each a run takes, and which row comes from which source.

All in fractions, so that proportions are exact.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from llama2_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Component:
    """One source of a mixture: its weight relative to the others, and how many epochs of it a run may see (None: any number)."""

    source: str
    weight: Fraction = Fraction(1)
    epochs: Fraction | None = None


def parse_mixture(mixture: str) -> tuple[Component, ...]:
    """Reads `source[:weight][@epochs], source…`.

    Weights are fractions: `0.1` is 1/10. A trailing `:number` is a weight, never a TFDS version.

    >>> parse_mixture('toy:documents, text:books/*.txt:2.5@4')[1]
    Component(source='text:books/*.txt', weight=Fraction(5, 2), epochs=Fraction(4, 1))

    Raises:
      UserError: an empty mixture, a weight or epoch limit that is not positive, the same source twice.
    """
    components: list[Component] = []
    for text in filter(None, map(str.strip, mixture.split(','))):
        number = r'[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?'
        source, weight, epochs = re.fullmatch(rf'(.+?)(?::({number}))?(?:@({number}))?', text).groups()
        component = Component(source, Fraction(weight or 1), Fraction(epochs) if epochs else None)
        if component.weight <= 0 or (epochs and component.epochs <= 0):
            raise UserError(f'Mixture entry {text!r}: weight and epochs must be positive numbers.')
        if source in [other.source for other in components]:
            raise UserError(f'Mixture names the source {source!r} twice; give it once, with the sum of the weights.')
        components.append(component)
    if not components:
        raise UserError('The mixture is empty; write for example toy:documents, or text:books/*.txt:2,jsonl:web/*.jsonl.gz.')
    return tuple(components)


def water_fill(components: Sequence[Component], counts: Sequence[int], rows: int) -> list[Fraction]:
    """The share of each source in a run of `rows` sequences, sum 1, no source beyond its epoch limit.

    Shares are proportional to the weights as long as no limit binds. A source whose limit binds gives exactly that many
    sequences, and what it cannot give goes to the others in proportion.

    Args:
      counts: sequences in one epoch of each source.

    Raises:
      UserError: if all sources together have too few sequences within their limits, with the numbers.

    >>> a, b = Component('a', Fraction(3), epochs=Fraction(2)), Component('b', Fraction(1))
    >>> water_fill([a, b], [30, 1000], rows=100)  # a would give 75, but has 2 * 30
    [Fraction(3, 5), Fraction(2, 5)]
    """
    caps = [None if c.epochs is None else math.floor(c.epochs * n) for c, n in zip(components, counts, strict=True)]
    fixed: dict[int, Fraction] = {}
    while True:
        free = [i for i in range(len(components)) if i not in fixed]
        left = 1 - sum(fixed.values())
        if not free:
            if left:
                names = ', '.join(f'{c.source} {cap}' for c, cap in zip(components, caps, strict=True))
                raise UserError(
                    f'The run needs {rows} sequences, but the epoch limits of the mixture allow {sum(caps)} ({names}); '
                    'raise a limit, leave one off, or train for fewer tokens.'
                )
            return [fixed[i] for i in range(len(components))]
        weight = sum(components[i].weight for i in free)
        shares = {i: left * components[i].weight / weight for i in free}
        bound = [i for i in free if caps[i] is not None and shares[i] * rows > caps[i]]
        if not bound:
            return [shares.get(i, fixed.get(i)) for i in range(len(components))]
        fixed.update({i: Fraction(caps[i], rows) for i in bound})


class Interleave:
    """Row of the run to (source, row of that source): a `selection_map` for grain.

    An even interleave with integer arithmetic, so that after any number of rows each source is within a few rows of its share,
    and after `rows` rows a source with a whole number of them has given exactly that. `grain.MapDataset.mix` does the same with
    shares rounded to a hundredth of the smallest, which is too coarse to keep an epoch limit.

    >>> [Interleave([Fraction(1, 4), Fraction(3, 4)], 8)[row] for row in range(5)]
    [(0, 0), (1, 0), (1, 1), (1, 2), (0, 1)]
    """

    def __init__(self, shares: Sequence[Fraction], rows: int):
        scale = math.lcm(*(share.denominator for share in shares))
        parts = [(int(share * scale), i) for i, share in enumerate(shares)]
        # One that gives a whole number of rows (it may be at its limit) comes first: it then rounds against the run, not others.
        self._parts = sorted(parts, key=lambda part: (part[0] * rows % scale > 0, part[1]))
        self._total, self._rows = scale, rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> tuple[int, int]:
        total = self._total
        for part, source in self._parts:
            before, after = row * (total - part) // total, (row + 1) * (total - part) // total
            if before == after:  # the sources after this one have as many rows as before: the row is this one's
                return source, row - before
            row, total = before, total - part
        raise AssertionError('shares sum to 1')


def source_seed(seed: int, source: str) -> int:
    """Far apart for neighbouring seeds, for the epoch is added to it; and the same whatever else is in the mixture."""
    return int.from_bytes(hashlib.blake2b(f'{seed} {source}'.encode(), digest_size=4).digest())
