"""Which figures of metrics.jsonl and of tables make which chart."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama2_jax.report.charts import Series, chart, smooth

# Title and pattern of the names that are drawn together; the first that fits counts.
GROUPS = (
    ('Loss', r'loss|heldout/loss'),
    ('Accuracy', r'(heldout/)?accuracy(/.+)?|.*unsafe_recall|heldout/.+/accuracy'),
    ('Reward', r'score|heldout/score|heldout/judge|helpfulness|safety|heldout/helpfulness|heldout/safety'),
    ('KL from the reference', r'(heldout/)?kl\w*|.*/kl'),
    ('Exact answers in the toy world', r'toy/.+'),
    ('Held-out loss by source', r'heldout/.+/loss'),
    ('Learning rate', r'learning_rate|.*/learning_rate'),
    ('Tokens a second', r'tokens_per_second'),
    ('Entropy', r'(.+/)?entropy'),
    ('Length of answers', r'(heldout/)?length'),
    ('Shares', r'(heldout/)?(eos|gated)|.*clipped'),
    ('Seconds', r'seconds/.+'),
    ('Norms of gradient and update', r'(.+/)?(grad|update)_norm'),
)
HIDDEN = re.compile(r'step|tokens|seconds|perplexity|.*bits_per_byte|mfu|tflops|.*_error|memory_gb|pairs')


def curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """All charts that the lines of a metrics.jsonl give; what belongs to no group has one of its own."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    groups: dict[str, list[Series]] = {title: [] for title, _ in GROUPS}
    for name in names:
        points = [(line['step'], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        if not points or HIDDEN.fullmatch(name):
            continue
        title = next((title for title, pattern in GROUPS if re.fullmatch(pattern, name)), name)
        shown = name if title in ('Loss', 'Reward') else re.sub(r'^(heldout|toy)/|/(loss|exact|accuracy)$', '', name)
        if len(points) > 40 and title != 'Learning rate':
            groups.setdefault(title, []).append(Series(shown, points, faint=True))
            points = smooth(points)
        groups.setdefault(title, []).append(Series(shown, points))
    found = [chart(title, series) for title, series in groups.items()]
    return [picture for picture in [*found, against_kl(lines)] if picture]


def against_kl(lines: Sequence[Mapping[str, Any]]) -> str:
    """Reward against the KL from the reference: what optimising the reward costs."""
    series = []
    for name in ('score', 'heldout/score', 'heldout/judge'):
        points = [(line['kl'], line[name]) for line in lines if line.get('kl') is not None and line.get(name) is not None]
        series.append(Series(name, points, dots=True))
    return chart('Reward against KL', series, x='KL, nats an answer')


def calibration(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Calibration plot, predicted against observed, of rows with such columns; '' for others."""
    pairs = (('predicted', 'win rate'), ('predicted', 'observed'), ('confidence', 'accuracy'))
    for predicted, observed in pairs:
        points = [(row[predicted], row[observed]) for row in rows if _numbers(row, predicted, observed)]
        if len(points) > 1:
            least = 0.5 if min(map(min, points)) >= 0.5 else 0.0
            return chart(title, [Series(observed, sorted(points))], x=predicted, square=(least, 1.0))
    return ''


def plane(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Versions on the plane of harmlessness and helpfulness, in their order; '' of rows without these columns."""
    pairs = (('harmlessness', 'helpfulness'), ('safety', 'helpfulness'), ('harmless', 'helpful'))
    for across, up in pairs:
        found = [row for row in rows if _numbers(row, across, up)]
        if len(found) > 1:
            names = [str(next((value for value in row.values() if isinstance(value, str)), '')) for row in found]
            points = [(row[across], row[up]) for row in found]
            return chart(f'{title}: {up} and {across}', [Series(up, points, labels=names)], x=across)
    return ''


def by_count(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Every column of numbers over a first one that says how many, how far or how hot; '' of other rows."""
    x = next((name for name in ('n', 'temperature', 'turn') if len(rows) > 1 and all(_numbers(row, name) for row in rows)), None)
    names = [name for name in rows[0] if name != x and all(_numbers(row, name) for row in rows)] if x else []
    return chart(title, [Series(name, [(row[x], row[name]) for row in rows]) for name in names], x=str(x))


def _numbers(row: Mapping[str, Any], *columns: str) -> bool:
    return all(isinstance(row.get(column), int | float) and not isinstance(row.get(column), bool) for column in columns)
