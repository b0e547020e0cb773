"""Mixtures: which sources, how much of each a run takes, and which row of the run comes from which source.

An entry of a mixture is `source[ + source…][:amount][@epochs][ skip=N]`. An amount has one of two forms:

- `:0.3` is a share of the run. If every entry has a share, only their ratios count: `a:1, b:1` equals `a:0.5, b:0.5`.
  Beside entries without one, a share is a fraction of the whole run: `a, b:0.1` is all of a, and b makes up a tenth of the run.
- `:3x` says how often each row comes in an epoch. Without an amount an entry is `1x`: all of it, once an epoch.

No row comes more often than the run has epochs, or than `@epochs` says. Several sources joined by ` + ` are one entry, from which
rows are drawn uniformly. All in fractions, so that proportions are exact.
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
    """One source of a mixture.

    Attributes:
      source: The source string.
      weight: Share of the run; None for a source of which `times` is said.
      epochs: How often a run may see a row at most; None: as often as the run has epochs (in pretraining: any number).
      times: How often each row comes in an epoch, where there is no weight.
      skip: How many bad rows may be skipped.
      entry: The sources of the entry, if it joins several; they share weight and epochs.
    """

    source: str
    weight: Fraction | None = None
    epochs: Fraction | None = None
    times: Fraction = Fraction(1)
    skip: int = 0
    entry: tuple[str, ...] = ()


def parse_mixture(mixture: str) -> tuple[Component, ...]:
    """Reads `source[ + source…][:amount][@epochs][ skip=N], …`; the module's docstring says what it means.

    Numbers are fractions: `0.1` is 1/10. A trailing `:number` is an amount, never a TFDS version.

        >>> parse_mixture('toy:documents, text:books/*.txt:2.5@4')[1]
        Component(source='text:books/*.txt', weight=Fraction(5, 2), epochs=Fraction(4, 1), times=Fraction(1, 1), skip=0, entry=())

    Raises:
      UserError: an empty mixture, an amount or epoch limit that is not positive, the same source twice.
    """
    components: list[Component] = []
    for text in filter(None, map(str.strip, mixture.split(','))):
        pieces = [re.fullmatch(r'(.+?)(?:\s+skip=(\d+))?', piece.strip()) for piece in re.split(r'\s\+\s', text)]
        number = r'[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?'
        last, amount, times, epochs = re.fullmatch(rf'(.+?)(?::({number})(x?))?(?:@({number}))?', pieces[-1][1]).groups()
        if (amount and Fraction(amount) <= 0) or (epochs and Fraction(epochs) <= 0):
            raise UserError(f'Mixture entry {text!r}: amount and epochs must be positive numbers.')
        names = (*(piece[1] for piece in pieces[:-1]), last)
        for source, piece in zip(names, pieces, strict=True):
            if source in [other.source for other in components]:
                raise UserError(f'Mixture names the source {source!r} twice; give it once, with the sum of the amounts.')
            components.append(
                Component(
                    source,
                    Fraction(amount) if amount and not times else None,
                    Fraction(epochs) if epochs else None,
                    Fraction(amount) if times else Fraction(1),
                    int(piece[2] or 0),
                    names if len(names) > 1 else (),
                )
            )
    if not components:
        raise UserError('The mixture is empty; write for example toy:documents, or text:books/*.txt:2,jsonl:web/*.jsonl.gz.')
    return tuple(components)


def amounts(components: Sequence[Component], counts: Sequence[int], epochs: Fraction | None) -> list[Fraction]:
    """How many rows of each source the run takes, given how many each has.

    Args:
      epochs: of the run; None where it never ends: the result is then relative, and nothing is limited.

    Raises:
      UserError: shares beside whole sources that leave nothing for these.

        >>> a, b = parse_mixture('a, b:0.1')
        >>> amounts([a, b], [900, 5000], Fraction(1))
        [Fraction(900, 1), Fraction(100, 1)]
    """
    entries: dict[tuple[str, ...], list[int]] = {}
    for i, component in enumerate(components):
        entries.setdefault(component.entry or (component.source,), []).append(i)
    firsts = {key: components[members[0]] for key, members in entries.items()}
    sizes = {key: sum(counts[i] for i in members) for key, members in entries.items()}
    limits = {key: None if epochs is None else (c.epochs or epochs) * sizes[key] for key, c in firsts.items()}
    taken = {key: c.times * (epochs or 1) * sizes[key] for key, c in firsts.items() if c.weight is None}
    taken = {key: amount if firsts[key].epochs is None else min(amount, limits[key] or amount) for key, amount in taken.items()}
    shares = {key: c.weight for key, c in firsts.items() if c.weight is not None}
    if not taken:
        shares = {key: share / sum(shares.values()) for key, share in shares.items()}
        total = 1 if epochs is None else min(limits[key] / share for key, share in shares.items())
        taken = {key: share * total for key, share in shares.items()}
    elif sum(shares.values()) >= 1:
        raise UserError(
            'The shares of a mixture that names whole sources, too, are fractions of the run: their sum must be less than 1, not '
            f'{float(sum(shares.values())):g}. For the number of times that each row comes in an epoch write 2x in place of 2.'
        )
    while len(taken) < len(entries):
        free = {key: share for key, share in shares.items() if key not in taken}
        total = sum(taken.values()) / (1 - sum(free.values()))
        short = [key for key, share in free.items() if limits[key] is not None and share * total > limits[key]]
        taken |= {key: limits[key] for key in short} if short else {key: share * total for key, share in free.items()}
    found = {i: taken[key] * counts[i] / (sizes[key] or 1) for key, members in entries.items() for i in members}
    return [found[i] for i in range(len(components))]


def as_shares(components: Sequence[Component], counts: Sequence[int]) -> list[Component]:
    """The components of a run whose length is given (pretraining), each with a weight: 1 unless one is given.

    Raises:
      UserError: `:2x` or `skip=N`, which such a run does not have.
    """
    found = []
    for component in components:
        if component.times != 1:
            raise UserError(f'{component.source}: in pretraining an amount is a share of the run, such as 0.3, not 3x.')
        if component.skip:
            raise UserError(f'{component.source}: pretraining skips no rows yet; leave skip={component.skip} away.')
        size = sum(n for c, n in zip(components, counts, strict=True) if c.entry == component.entry)
        part = Fraction(counts[len(found)], size or 1) if component.entry else Fraction(1)
        found.append(dataclasses.replace(component, weight=(component.weight or Fraction(1)) * part))
    return found


def check_toy(setting: str, mixture: str, remedy: str) -> None:
    """Raises a UserError where a setting that only knows the toy world meets another source."""
    for component in parse_mixture(mixture):
        if not component.source.startswith('toy:'):
            raise UserError(f'{setting} knows the toy world only, and {component.source} is another source: {remedy}.')


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
