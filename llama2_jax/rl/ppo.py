"""PPO (paper p15-16; recipe F.3): generate, score, look, learn, over and over. A loop of its own, the one stage beside `fit`.

An iteration is to be read in `iterate`; its arithmetic in `ops/returns.py`, its two compiled programs in `ppo_update.py`.

The process may be killed at any moment. Answers lie in rollouts/ as soon as they are scored, so what is lost are updates since
the last checkpoint, and these are made again from the same answers, bit for bit.
"""

import dataclasses
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from llama2_jax.checkpoints.directory import save_model
from llama2_jax.config import UserError
from llama2_jax.files import save_figure
from llama2_jax.rl.monitors import adapted, alarms, best_evaluation
from llama2_jax.rl.ppo_setup import Stage, begin, open_stage, policy
from llama2_jax.rl.ppo_update import Learners, PPOConfig
from llama2_jax.rl.rollout import Rollout, figures, read_rollouts, sample_answers, show, write_rollouts
from llama2_jax.runtime import barrier, is_main_process, say
from llama2_jax.runtime.hosts import Watch
from llama2_jax.runtime.workdir import no_space_is_said
from llama2_jax.train.checkpoint import Checkpoints
from llama2_jax.train.devices import to_mesh
from llama2_jax.train.loop import Interruption, leave
from llama2_jax.train.metrics import Meter, Progress, Report, read_metrics

HEADLINE = ('score', 'kl', 'heldout/score', 'heldout/judge')
SHOWN = 12  # answers in a section of samples.md


def run(config: PPOConfig, workdir: str) -> Learners:
    """Trains, or continues, in `workdir`; `workdir/model` is the policy that did best on held-out prompts.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir; a loss that is not finite; an alarm, if so asked.
    """
    stage = open_stage(config, workdir)
    path, every = stage.path, config.eval_every
    retention = {'keep_last': config.keep_last, 'keep_best': False}
    with Watch() as watch, no_space_is_said(path), Checkpoints(path / 'checkpoints', **retention) as checkpoints:
        learners, saved = checkpoints.restore(stage.programs.abstract) or (begin(stage), {'beta': config.beta, 'progress': {}})
        beta, progress = saved['beta'], Progress(**saved['progress'])
        meter = Meter(0, None)
        with Interruption() as interruption, Report(path, progress, meter, config.iterations, HEADLINE) as report:
            barrier('metrics cut')
            lines = read_metrics(path / 'metrics.jsonl')
            if progress.step:
                report.say(f'Continuing from the checkpoint of iteration {progress.step}.')
            if not lines:
                lines.append({'step': 0} | evaluate(stage, learners, 0, lines, report))
                report.write(lines[0])
            for number in range(progress.step + 1, config.iterations + 1):
                if out_of_patience(config, lines):
                    report.say(f'The held-out score has not risen for {config.patience} evaluations.')
                    break
                watch.at(number)
                learners, line = iterate(stage, learners, beta, number)
                last = number == config.iterations
                if number % every == 0 or last:
                    line |= evaluate(stage, learners, number, lines, report)
                line = report.count(number, int(line['length'] * config.batch_size + 0.5)) | {'beta': beta} | line
                lines.append(line)
                report.write(line)
                say_alarms(stage, lines, report)
                if config.kl_target:
                    beta = adapted(beta, line['kl'], config.kl_target, config.batch_size, config.kl_horizon)
                stop = interruption.reached(number)
                if stop or last or number % config.checkpoint_every == 0:
                    report.flush()
                    checkpoints.save(number, learners, {'beta': beta, 'progress': dataclasses.asdict(progress)})
                if stop:
                    leave(number, config.iterations, checkpoints, report, interruption.code)
    if is_main_process():
        plot(lines, path / 'reward_kl.png')
    best = best_evaluation(lines)
    say(f'The model of iteration {best["step"]}, held-out score {best["heldout/score"]:.4f}, is in {path / "model"}.')
    return learners


def iterate(stage: Stage, learners: Learners, beta: float, number: int) -> tuple[Learners, dict[str, float]]:
    """One iteration: answers, rewards, advantages, and a step on each minibatch."""
    clock = Clock()
    rollouts = roll_out(stage, learners, number, clock)
    minibatches, seen = stage.programs.prepare(
        learners, (stage.reference, np.float32(beta), to_mesh(arrange(rollouts, stage.config), stage.mesh))
    )
    seen = jax.device_get(seen)
    clock.lap('prepare')
    frozen, steps = stage.reference if stage.config.lora.rank else None, []
    for minibatch in minibatches:
        learners, moved = stage.programs.update(learners, (frozen, minibatch))
        steps.append(moved)
    steps = jax.device_get(steps)
    clock.lap('update')
    for step in steps:
        if not all(finite for name, finite in step.items() if name.endswith('finite')):
            losses = ', '.join(f'{name} {loss}' for name, loss in step.items() if name.endswith('loss'))
            raise UserError(
                f'Iteration {number}: the loss or gradient of a step is not finite ({losses}). '
                f'The last checkpoint and the answers in {stage.path / "rollouts"} are sound.'
            )
    moved = {name: float(np.mean([step[name] for step in steps])) for name in steps[0] if not name.endswith('finite')}
    first = {'first_ratio_error': float(steps[0]['policy/ratio_error']), 'first_clipped': float(steps[0]['policy/clipped'])}
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    line = figures(rollouts) | {name: float(value) for name, value in seen.items()} | first | moved
    return learners, line | clock.figures(tokens) | {'memory_gb': memory()}


def roll_out(stage: Stage, learners: Learners, number: int, clock: 'Clock') -> list[Rollout]:
    """The answers of an iteration and their scores; those of a run that was killed are there already."""
    config, path = stage.config, stage.path / 'rollouts' / f'{number:06}.jsonl'
    if path.exists():
        return read_rollouts(path)
    stage.engine.load(policy(stage, learners))
    clock.lap('reshard')
    rollouts = draw(stage, stage.data.batch(number - 1), config.samples, f'{config.seed} {number}', clock)
    write_rollouts(path, rollouts)
    return rollouts


def draw(stage: Stage, prompts: Sequence[Any], samples: int, seed: str, clock: 'Clock') -> list[Rollout]:
    """Answers to each prompt from the engine's policy, one prompt's after the other's, scored."""
    config = stage.config
    settings = {'max_new_tokens': config.max_new_tokens, 'temperature': config.temperature, 'seed': seed, 'count': samples}
    answers = [(prompt, sample) for prompt, drawn in sample_answers(stage.engine, prompts, **settings) for sample in drawn]
    clock.lap('generate')
    rollouts = stage.rewards(answers)
    clock.lap('score')
    return rollouts


def arrange(rollouts: Sequence[Rollout], config: PPOConfig) -> dict[str, np.ndarray]:
    """This process's rows: tokens int32, answer bool and logprobs float32 [b, L+1], the engine's; score float32 [b].

    Prompts begin at 0 and answers follow at once; what pads a row on the right is known by its length.
    """
    rows = len(rollouts) // jax.process_count()
    mine = rollouts[jax.process_index() * rows : (jax.process_index() + 1) * rows]
    shape = (rows, config.length + 1)
    tokens, answer, logprobs = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, rollout in enumerate(mine):
        start, end = len(rollout.prompt.token_ids), len(rollout.prompt.token_ids) + len(rollout.token_ids)
        tokens[row, :start], tokens[row, start:end] = rollout.prompt.token_ids, rollout.token_ids
        answer[row, start:end], logprobs[row, start:end] = True, rollout.logprobs
    score = np.array([rollout.score for rollout in mine], np.float32)
    return {'tokens': tokens, 'answer': answer, 'logprobs': logprobs, 'score': score}


def evaluate(
    stage: Stage, learners: Learners, number: int, lines: Sequence[Mapping[str, Any]], report: Report
) -> dict[str, float]:
    """Answers to held-out prompts, drawn as in training, always with the same seeds; the best policy so far becomes the model."""
    config = stage.config
    stage.engine.load(policy(stage, learners))
    rollouts = draw(stage, stage.data.heldout[: config.eval_prompts], 1, f'{config.seed} heldout', Clock())
    found = {'score_error': _error([rollout.score for rollout in rollouts]), **figures(rollouts)}
    if stage.judge:
        judged = stage.judge(rollouts)
        found |= {'judge': float(np.mean(judged)), 'judge_error': _error(judged)}
    report.sample(number, show(rollouts[:SHOWN]))
    best = best_evaluation(lines)
    if best is None or found['score'] > best['heldout/score']:
        provenance = {'stage': 'ppo', 'parent': config.init_from, 'step': number}
        save_model(stage.path / 'model', policy(stage, learners), stage.engine.tokenizer, provenance, chat=True)
    return {f'heldout/{name}': value for name, value in found.items()}


def _error(values: Sequence[float]) -> float:
    """Of the mean."""
    return float(np.std(values) / len(values) ** 0.5)


def say_alarms(stage: Stage, lines: Sequence[Mapping[str, Any]], report: Report) -> None:
    """Says what is wrong, or stops for it."""
    for fault in alarms(lines, stage.dtype):
        sentence = f'Iteration {lines[-1]["step"]}: {fault}.'
        if stage.config.alarms == 'stop':
            raise UserError(f'{sentence} --set alarms=warn goes on nevertheless.')
        report.say(f'ALARM {sentence}')


def out_of_patience(config: PPOConfig, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last `patience` evaluations have not been better than the best before them."""
    best = best_evaluation(lines)
    since = [line for line in lines if 'heldout/score' in line and line['step'] > best['step']]
    return 0 < config.patience <= len(since)


class Clock:
    """Seconds of the phases of an iteration."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What went by since the last call belongs to this phase."""
        now = time.perf_counter()
        self._seconds[phase], self._last = now - self._last, now

    def figures(self, tokens: int) -> dict[str, float]:
        """Seconds and answers' tokens a second of each phase."""
        seconds = {f'seconds/{phase}': time for phase, time in self._seconds.items()}
        return seconds | {f'tokens_per_second/{phase}': tokens / time for phase, time in self._seconds.items() if time}


def memory() -> float:
    """The most that was in use at once, GB: of a device, or of the process where devices do not tell."""
    stats = jax.local_devices()[0].memory_stats()
    return stats['peak_bytes_in_use'] / 1e9 if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws score and judge against the KL from the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel='KL from the reference (nats an answer)', ylabel='score')
    trained = [line for line in lines if 'kl' in line]
    axes.plot([line['kl'] for line in trained], [line['score'] for line in trained], '.', markersize=3, label='score of a batch')
    seen = [{'kl': 0.0} | line for line in lines if 'heldout/score' in line]  # before the first iteration there is none
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
