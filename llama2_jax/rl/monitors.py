"""What is watched while PPO runs: batch statistics, signs of collapse and reward hacking, time, memory, the plot.

Alarms are computed from the lines of metrics, so a resumed run reaches the same verdict.
"""

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from llama2_jax.config import UserError
from llama2_jax.data.mixing import check_toy
from llama2_jax.files import save_figure
from llama2_jax.inference.open import open_scorer
from llama2_jax.ops import returns
from llama2_jax.rl.rollout import Rollout, by_oracle
from llama2_jax.runtime import is_main_process, log
from llama2_jax.toy.oracle import Oracle

Judge = Callable[[Sequence[Rollout]], list[float]]
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


def adaptive_beta(beta: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """Beta after a batch: up where KL is above its target, down where below (Ziegler et al., 2019).

    >>> adaptive_beta(0.1, 12.0, 10.0, 512, 10_240), adaptive_beta(0.1, -50.0, 10.0, 512, 10_240)
    (0.101, 0.099)
    """
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * answers / horizon)


def mean_of_steps(steps: Sequence[Mapping[str, Any]], number: int, path: Path) -> dict[str, float]:
    """The mean of each figure over the steps of an iteration, and two figures of its first step.

    Raises:
      UserError: The loss or gradient of a step is not finite.
    """
    for step in steps:
        if not all(finite for name, finite in step.items() if name.endswith('finite')):
            losses = ', '.join(f'{name} {loss}' for name, loss in step.items() if name.endswith('loss'))
            raise UserError(
                f'Iteration {number}: the loss or gradient of a step is not finite ({losses}). '
                f'The last checkpoint and the answers in {path / "rollouts"} are sound.'
            )
    means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0] if not name.endswith('finite')}
    first = {'first_ratio_error': float(steps[0]['policy/ratio_error']), 'first_clipped': float(steps[0]['policy/clipped'])}
    return means | first


def out_of_patience(lines: Lines, patience: int) -> bool:
    """Whether the last `patience` evaluations were not better than the best before them; never, if it is 0."""
    best = best_evaluation(lines)
    since = [line for line in lines if best and 'heldout/score' in line and line['step'] > best['step']]
    return 0 < patience <= len(since)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values) / len(values) ** 0.5)


def check_judge(judge: str, mixture: str) -> None:
    """Raises a UserError where the oracle is to judge answers to prompts that are not of the toy world."""
    if judge == 'oracle':
        check_toy('judge=oracle', mixture, 'set judge= to nothing or to a reward model')


def make_judge(judge: str, batch_size: int) -> Judge | None:
    """A judge that has no part in the reward: the toy world's oracle, another reward model, or None."""
    if not judge:
        return None
    if judge == 'oracle':
        oracle = Oracle()
        return lambda rollouts: [by_oracle(oracle, rollout).quality for rollout in rollouts]
    scorer = open_scorer(judge, batch_size)
    return lambda rollouts: scorer.score([[*rollout.prompt.token_ids, *rollout.token_ids] for rollout in rollouts]).tolist()


def batch_statistics(found: Mapping[str, jax.Array], kl: jax.Array, mask: jax.Array, engine: jax.Array) -> dict[str, jax.Array]:
    """Statistics of a batch before it is trained on, from arrays [N, b, L]; KL is in nats per answer."""
    mean = partial(returns.masked_mean, mask=mask)
    answers = (kl * mask).sum(axis=-1)
    return {
        'kl': answers.mean(),
        'kl_error': answers.std() / answers.size**0.5,
        'k3': (returns.k3(found['logprob'], found['anchor']) * mask).sum(axis=-1).mean(),
        'entropy': mean(found['entropy']),
        'engine_gap': jnp.max(mask * jnp.abs(found['logprob'] - engine)),
    }


def value_statistics(value: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The value model's mean and the share of the returns' variance that it explains."""
    unexplained = _variance(target - value, mask) / jnp.maximum(_variance(target, mask), 1e-8)
    return {'value': returns.masked_mean(value, mask), 'explained_variance': 1 - unexplained}


def _variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    return returns.masked_mean((x - returns.masked_mean(x, mask)) ** 2, mask)


class Clock:
    """Measures the seconds of each phase of an iteration."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Adds the time since the last call to this phase."""
        now = time.perf_counter()
        self._seconds[phase], self._last = now - self._last, now

    def figures(self, tokens: int) -> dict[str, float]:
        """Seconds and answers' tokens a second of each phase."""
        seconds = {f'seconds/{phase}': time for phase, time in self._seconds.items()}
        return seconds | {f'tokens_per_second/{phase}': tokens / time for phase, time in self._seconds.items() if time}


def peak_memory() -> float:
    """Peak memory in GB: of a device, or of the process where devices do not report it."""
    stats = jax.local_devices()[0].memory_stats()
    return stats['peak_bytes_in_use'] / 1e9 if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def raise_alarms(lines: Lines, dtype: str, reaction: str, log: Callable[[str], None]) -> None:
    """Logs every alarm about the last iteration.

    Raises:
      UserError: There is one, and the reaction is 'stop'.
    """
    number = lines[-1]['step']
    for fault in alarms(lines, dtype):
        if reaction == 'stop':
            raise UserError(f'Iteration {number}: {fault}. --set alarms=warn continues anyway.')
        log(f'ALARM Iteration {number}: {fault}.')


def show_result(lines: Lines, path: Path) -> None:
    """Prints which iteration's policy became the model, and draws the run."""
    best = best_evaluation(lines)
    if best:
        score = f'held-out score {best["heldout/score"]:.4f}'
        log(f'The model of iteration {best["step"]}, {score}, is in {path / "model"}.')
    if is_main_process():
        plot(lines, path / 'reward_kl.png')


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws score and judge against the KL from the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel='KL from the reference (nats an answer)', ylabel='score')
    trained = [line for line in lines if 'kl' in line]
    axes.plot([line['kl'] for line in trained], [line['score'] for line in trained], '.', markersize=3, label='score of a batch')
    seen = [{'kl': 0.0, **line} for line in lines if 'heldout/score' in line]  # no KL before the first iteration
    axes.plot([line['kl'] for line in seen], [line['heldout/score'] for line in seen], 'o-', label='held-out score')
    handles = axes.get_legend_handles_labels()[0]
    if any('heldout/judge' in line for line in seen):
        other = axes.twinx()
        other.set_ylabel('judge')
        handles += other.plot(
            [line['kl'] for line in seen],
            [line['heldout/judge'] for line in seen],
            's--',
            color='tab:red',
            label='held-out, by the judge',
        )
    axes.legend(handles=handles, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=len(handles))  # clear of both scales
    save_figure(figure, path)
