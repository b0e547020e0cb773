"""How well reward models tell the better of two answers, and what their scores are worth (paper p12, p17, p53; recipe E.6).

Every share comes with Wilson's 95 % interval.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils.epath import Path

from llama2_jax.config import UserError
from llama2_jax.data.comparisons import RATINGS, read_comparisons
from llama2_jax.data.preferences import UNKNOWN, Pair, encode
from llama2_jax.evals.measure import wilson
from llama2_jax.files import save_figure
from llama2_jax.inference.scorer import Scorer

UNSAFE, GATE = 0.5, 0.15  # scores (sigmoids) below which an answer counts as unsafe: p53 Table 29, and PPO's gate (p15)
ALARMS = 0.01  # share of the safe answers that a threshold may take for unsafe ones
SAFETY = ('unsafe recall', 'unsafe precision', 'gate recall', 'gate precision', 'recall at 1 % alarms')
BINS = 10  # of the calibration
LATER = 4  # questions; pairs with more are counted together

Share = dict[str, float]  # value, low, high, count


@dataclasses.dataclass(frozen=True)
class Judged:
    """The pairs of one source, as one model scores them.

    Attributes:
      scores: linear, [pairs, 2] float32: of the chosen and of the rejected answer.
    """

    source: str
    pairs: Sequence[Pair]
    scores: np.ndarray


def judge(scorer: Scorer, source: str) -> Judged:
    """Scores both answers of every pair of a source.

    Raises:
      UserError: the source cannot be read, or holds no pair that fits the model.
    """
    pairs = []
    for where, (comparisons, _) in read_comparisons(source):
        found = (encode(comparison, scorer.tokenizer, scorer.config.context, where)[0] for comparison in comparisons)
        pairs += [pair for pair in found if pair]
    if not pairs:
        raise UserError(f'{source} holds no comparison that fits a context of {scorer.config.context} tokens.')
    rows = {ids.tobytes(): ids for pair in pairs for ids in pair.ids}  # an answer may be in several pairs
    scores = dict(zip(rows, scorer.score(list(rows.values())), strict=True))
    return Judged(source, pairs, np.array([[scores[ids.tobytes()] for ids in pair.ids] for pair in pairs], np.float32))


def share(hits: Iterable[bool]) -> Share | None:
    """A share with Wilson's 95 % interval; None of nothing.

    >>> share([True] * 8 + [False] * 2)
    {'value': 0.8, 'low': 0.4901..., 'high': 0.9433..., 'count': 10}
    """
    hits = list(hits)
    if not (count := len(hits)):
        return None
    value = sum(map(bool, hits)) / count
    low, high = wilson(value, count)
    return {'value': value, 'low': low, 'high': high, 'count': count}


def figures(judged: Judged) -> dict[str, Any]:
    """All figures of one model on one source; what the source does not tell is left out.

    accuracy in all, 'by rating' and 'by turns'; of answers labelled safe or not, 'unsafe recall' at UNSAFE, 'gate precision' and
    'gate recall' at GATE, and recall at the score below which ALARMS of the safe ones lie; 'calibration': for pairs by what
    sigmoid of the difference predicts, that and how often it was so; 'length correlation': of score with number of tokens, in
    all and of the differences within pairs; mean and std of scores.
    """
    chosen, rejected = judged.scores.T
    difference, right = chosen - rejected, chosen > rejected
    rating, turns = (np.array([getattr(pair, name) for pair in judged.pairs]) for name in ('rating', 'turns'))
    lengths = np.array([[len(ids) for ids in pair.ids] for pair in judged.pairs])
    by_rating = {name: share(right[rating == number]) for number, name in enumerate(RATINGS, 1)}
    by_turns = {f'{n}{"+" if n == LATER else ""}': share(right[np.minimum(turns, LATER) == n]) for n in range(1, LATER + 1)}
    found = {
        'accuracy': share(right),
        'by rating': {name: by_rating[name] for name in reversed(RATINGS) if by_rating[name]},
        'by turns': {name: value for name, value in by_turns.items() if value},
        'calibration': calibration(difference),
        'length correlation': {
            'all': correlation(judged.scores.ravel(), lengths.ravel()),
            'within pairs': correlation(difference, lengths[:, 0] - lengths[:, 1]),
        },
        'scores': {'mean': float(judged.scores.mean()), 'std': float(judged.scores.std())},
    }
    return found | _safety(sigmoid(judged.scores), np.array([pair.safe for pair in judged.pairs]))


def _safety(probability: np.ndarray, safe: np.ndarray) -> dict[str, Any]:
    unsafe, known = safe == 0, safe != UNKNOWN
    if not unsafe.any():
        return {}
    gated, innocent = (probability < GATE) & known, probability[known & ~unsafe]
    shares = [probability[unsafe] < UNSAFE, unsafe[(probability < UNSAFE) & known], gated[unsafe], unsafe[gated]]
    shares.append(probability[unsafe] < np.quantile(innocent, ALARMS) if len(innocent) else [])
    return {name: share(hits) for name, hits in zip(SAFETY, shares, strict=True)}


def sigmoid(score: np.ndarray) -> np.ndarray:
    """A score as the paper states them, in [0, 1]."""
    return 1 / (1 + np.exp(-score.astype(np.float64)))


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where one of them does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else None


def calibration(difference: np.ndarray) -> list[dict[str, float]]:
    """Win rates by what was predicted: pairs in BINS of equal size by the size of the difference, as its sign has it.

    'predicted' is sigmoid |difference|, the probability that the higher score is preferred; 'win rate' is how often it was.
    """
    order = np.argsort(np.abs(difference), kind='stable')
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    return [
        {'predicted': float(sigmoid(np.abs(difference[part])).mean()), 'win rate': float((difference[part] > 0).mean())}
        for part in bins
    ]


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Model -> source -> `figures` as lines of text."""
    lines = []
    for model, sources in results.items():
        for source, found in sources.items():
            lines.append(f'{model} on {source}')
            shares = {'accuracy': found['accuracy']}
            shares |= {f'  {name}': value for name, value in found['by rating'].items()}
            if len(found['by turns']) > 1:
                shares |= {f'  turns: {turns}': value for turns, value in found['by turns'].items()}
            shares |= {name: found[name] for name in SAFETY if found.get(name)}
            lines += [f'  {name:<20} {text(value)}' for name, value in shares.items()]
            if (within := found['length correlation']['within pairs']) is not None:
                lines.append(f'  {"length correlation":<20} {within:6.2f}  within pairs')
    return '\n'.join(lines)


def text(value: Share) -> str:
    """' 81.2 %  78.0 to 84.1  of 500'."""
    return f'{value["value"]:6.1%}  {100 * value["low"]:.1f} to {100 * value["high"]:.1f}  of {value["count"]:,}'


def plot(path: Path, model: str, judged: Sequence[Judged]) -> None:
    """Draws a model's calibration, and its scores of chosen and rejected answers, a row for each source."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state; half a second to import

    figure = Figure(figsize=(11, 3.6 * len(judged)), layout='constrained')
    figure.suptitle(model)
    for row, (left, right) in zip(judged, figure.subplots(len(judged), 2, squeeze=False), strict=True):
        points = calibration(row.scores[:, 0] - row.scores[:, 1])
        left.plot([0.5, 1], [0.5, 1], color='grey', linewidth=1, label='perfect')
        left.plot([point['predicted'] for point in points], [point['win rate'] for point in points], marker='o', label='win rate')
        left.set(xlabel='predicted: sigmoid of the difference', ylabel='share of pairs', title=row.source)
        edges = np.linspace(row.scores.min(), row.scores.max() + 1e-6, 41)
        for side, name in enumerate(('chosen', 'rejected')):
            right.hist(row.scores[:, side], edges, alpha=0.5, label=name)
        right.set(xlabel='score', ylabel='answers', title=row.source)
        left.legend()
        right.legend()
    save_figure(figure, path)
