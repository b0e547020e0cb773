"""Charts as SVG text: lines and points by step or against one another. Colours are the page's, so they follow light and dark."""

import dataclasses
import html
import json
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
POINTS = 300  # of a line at most
COLOURS = 7


@dataclasses.dataclass(frozen=True)
class Series:
    """Points (x, y) under a name. `faint`: behind the others, without an entry in the legend. `dots`: not joined."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False
    labels: Sequence[str] = ()


def downsample(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most so many of the points, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def smooth(points: Sequence[tuple[float, float]], share: float = 0.04) -> list[tuple[float, float]]:
    """A running mean over this share of the points, made of what lies behind each."""
    keep = 1 - 1 / max(len(points) * share, 1)
    mean, weight, found = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + 1 - keep
        found.append((x, mean / weight))
    return found


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds.

    For example:

        >>> ticks(0.03, 0.92)
        [0.2, 0.4, 0.6, 0.8]
    """
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (factor * step) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """For an axis: 12k, 0.35, 4e-5.

    For example:

        >>> [short(value) for value in (0, 12_000, 2_500_000, 0.35, 0.00004, -3)]
        ['0', '12k', '2.5M', '0.35', '4e-05', '-3']
    """
    for limit, letter in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if abs(value) >= limit:
            return f'{value / {"k": 1e3}.get(letter, limit):.3g}{letter}'
    return f'{value:.4g}' if abs(value) >= 1e-3 or not value else f'{value:.0e}'


def chart(title: str, series: Sequence[Series], x: str = 'step', square: tuple[float, float] | None = None) -> str:
    """A figure with axes, legend and a line under the finger; '' if there is nothing to draw.

    Args:
      title: of the figure.
      series: lines and points, each with a colour of its own; a faint one has that of the next.
      x: what the x axis says.
      square: both axes run from one to the other, with the diagonal of perfect calibration.
    """
    series = [each for each in series if each.points]
    if not series:
        return ''
    x_range, y_range = (square, square) if square else (bounds(series, 0), bounds(series, 1))
    low, high = x_range

    def at(point: tuple[float, float]) -> str:
        return f'{place(point[0], *x_range, LEFT, WIDTH - RIGHT):.1f},{place(point[1], *y_range, HEIGHT - BOTTOM, TOP):.1f}'

    parts = axes(x_range, y_range, x)
    if square:
        parts.append(f'<path class="diagonal" d="M{at((low, low))} L{at((high, high))}"/>')
    colour, legend, data = 0, [], []
    for each in series:
        points, style = downsample(each.points), f'c{colour % COLOURS}' + (' again' if colour >= COLOURS else '')
        if not each.dots:
            parts.append(f'<path class="line {style}{" faint" if each.faint else ""}" d="M{" L".join(map(at, points))}"/>')
        if each.dots or len(points) <= 12:
            parts += [dot(at(point), style, label) for point, label in labelled(points, each.labels)]
        if not each.faint:
            legend.append(f'<span class="key {style}">{html.escape(each.name)}</span>')
            data.append({'name': each.name, 'points': [[float(f'{value:.6g}') for value in point] for point in points]})
            colour += 1
    hover = html.escape(json.dumps({'x': x, 'from': low, 'to': high, 'series': data}))
    keys = f'<div class="keys">{"".join(legend)}</div>' if len(legend) > 1 else ''
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    return f'<figure data-chart="{hover}"><figcaption>{html.escape(title)}</figcaption>{drawing}{keys}</figure>'


def bounds(series: Sequence[Series], axis: int) -> tuple[float, float]:
    """Least and greatest value, with some air above and below."""
    values = [point[axis] for each in series for point in each.points]
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    air = (high - low) * 0.05 if axis else 0
    return low if low == 0 else low - air, high + air


def place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value lies between two ends."""
    return start + (value - low) / (high - low) * (end - start)


def axes(x_range: tuple[float, float], y_range: tuple[float, float], x: str) -> list[str]:
    """Lines and numbers."""
    parts = []
    for value in ticks(*y_range):
        y = place(value, *y_range, HEIGHT - BOTTOM, TOP)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f} H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    places = [(place(value, *x_range, LEFT, WIDTH - RIGHT), short(value)) for value in ticks(*x_range)]
    parts += [f'<text x="{where:.1f}" y="{HEIGHT - 16}" class="mid">{text}</text>' for where, text in places]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}" class="mid axis">{html.escape(x)}</text>')
    return parts


def labelled(points: Sequence[tuple[float, float]], labels: Sequence[str]) -> list[tuple[tuple[float, float], str]]:
    """Each point with its label, if there are labels."""
    return list(zip(points, labels if len(labels) == len(points) else [''] * len(points), strict=True))


def dot(where: str, style: str, label: str) -> str:
    """A point, and its label beside it."""
    x, y = where.split(',')
    end, shift = (' text-anchor="end"', -7) if float(x) > 0.8 * WIDTH else ('', 7)
    text = (
        f'<text x="{float(x) + shift:.1f}" y="{float(y) - 6:.1f}" class="label"{end}>{html.escape(label)}</text>' if label else ''
    )
    return f'<circle class="{style}" cx="{x}" cy="{y}" r="3.2"/>{text}'
