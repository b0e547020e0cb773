"""What a run of PPO should be stopped for, read off its lines of metrics, so that a resumed run comes to the same verdict."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]

NOISE = 3.0  # standard errors
COLLAPSE = 0.2  # of what a figure was at first
RATIO = {'float32': 1e-3, 'bfloat16': 0.2}  # the first ratio of a batch is 1 but for rounding


def alarms(lines: Lines, dtype: str) -> list[str]:
    """What is wrong with the last line, given those before it; sentences.

    - KL below 0 beyond noise: the log-probabilities are not those that answers were drawn with, or are put in the wrong places;
    - a ratio far from 1 before the first step of a batch: the same;
    - entropy or length collapsed, or answers no longer end;
    - reward hacking: the held-out score has risen and the judge, who has no part in the reward, has fallen.
    """
    now, found = lines[-1], []
    if 'kl' in now:
        if now['kl'] + NOISE * now['kl_error'] < 0:
            found.append(f'KL is {now["kl"]:.3f} ± {now["kl_error"]:.3f} nats an answer, and a divergence is never negative')
        if now['first_ratio_error'] > RATIO[dtype]:
            found.append(f'the first ratio of the batch is off by {now["first_ratio_error"]:.2g}, where it should be 1')
        first = next(line for line in lines if 'kl' in line)
        for name, what in (('entropy', 'The entropy'), ('length', 'The length'), ('eos', 'The share of answers that end')):
            if now[name] < COLLAPSE * first[name]:
                found.append(f'{what.lower()} has fallen from {first[name]:.3g} to {now[name]:.3g}')
    return found + hacking(lines)


def hacking(lines: Lines) -> list[str]:
    """Whether the judge has fallen since it was at its best while the reward rose, both beyond noise."""
    judged = [line for line in lines if line.get('heldout/judge') is not None]
    if not judged or judged[-1] is not lines[-1]:
        return []
    now, best = judged[-1], max(judged, key=lambda line: line['heldout/judge'])
    if _rise(best, now, 'heldout/score') > NOISE and _rise(now, best, 'heldout/judge') > NOISE:
        score, judge = ([f'{line[f"heldout/{name}"]:.3f}' for line in (best, now)] for name in ('score', 'judge'))
        return [
            f'reward hacking: since iteration {best["step"]} the held-out score rose from {score[0]} to {score[1]}, '
            f'and the judge fell from {judge[0]} to {judge[1]}'
        ]
    return []


def _rise(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float:
    """In standard errors of the difference."""
    error = math.hypot(before[f'{name}_error'], after[f'{name}_error'])
    return (after[name] - before[name]) / max(error, 1e-9)


def best_evaluation(lines: Lines) -> Mapping[str, Any] | None:
    """The line with the highest held-out score; of equal ones the first."""
    scored = [line for line in lines if line.get('heldout/score') is not None]
    return max(scored, key=lambda line: line['heldout/score'], default=None)


def adapted(beta: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """Beta after a batch: up where KL is above its target, down where below (Ziegler et al., 2019).

    >>> adapted(0.1, 12.0, 10.0, 512, 10_240), adapted(0.1, -50.0, 10.0, 512, 10_240)
    (0.101, 0.099)
    """
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * answers / horizon)
