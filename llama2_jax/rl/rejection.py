"""Rejection sampling (paper p13-15; recipe F.2): many answers to each prompt, the best of them to fine-tune on.

Offline, in files that people can read and that a run goes on from:

  temperature.json   mean best score at each temperature of the grid, and the one that was chosen
  samples/           every answer with both rewards, a file for some prompts
  earlier/           the choices of the earlier rounds under the reward models of this one
  choices.jsonl      the best answer to each prompt, of this and of all earlier rounds, as dialogs
  rewards_by_n.*     max and median score by the number of samples, with a picture
  sft/               fine-tuning on the choices; its model becomes `model/`
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any

import numpy as np
from etils.epath import Path
from tqdm import tqdm

from llama2_jax import made_from
from llama2_jax.checkpoints.load import open_model
from llama2_jax.config import SEED, Config, LanguageModel, Names, UserError, between, resumable
from llama2_jax.data.mixing import check_toy
from llama2_jax.data.prompts import Prompt, PromptConfig, PromptData, different
from llama2_jax.evals.multi_turn import answered, usable
from llama2_jax.files import save_figure, write_atomically, writing
from llama2_jax.inference import plan
from llama2_jax.inference.engine import Engine
from llama2_jax.inference.open import open_engine
from llama2_jax.inputs import check_inputs, check_room, common_tokenizer
from llama2_jax.mesh import make_mesh
from llama2_jax.rl import rewards as scoring
from llama2_jax.rl.rewards import Rewards, RewardsConfig, open_rewards
from llama2_jax.rl.rollout import Rollout, from_json, read_rollouts, sample_answers, write_rollouts
from llama2_jax.runtime import barrier, is_main_process, log
from llama2_jax.runtime.workdir import open_run, record_inputs, report_disk_full
from llama2_jax.stages import sft
from llama2_jax.stages.sft import SftConfig

FILE_PROMPTS = 64  # in a file of samples


@dataclasses.dataclass(frozen=True)
class RejectionConfig(Config):
    """A round of rejection sampling.

    Attributes:
      sample_from: Policy that samples the answers; the paper's is always the 70B.
      rewards: Reward models or a function, as in PPO; the best answer has the highest score.
      prompts: Prompts to answer; each different prompt counts once, whatever its weight.
      count: Number of prompts; 0: all.
      samples: Answers to each prompt; the paper's figures have up to 20, its text 10 to 100.
      temperatures: Grid; each round takes the one with the highest mean best score on held-out prompts.
      tune_prompts: Number of held-out prompts that choose the temperature.
      max_new_tokens: Answers are truncated there; a truncated answer is never chosen.
      decode_batch: Answers sampled together.
      earlier: Workdirs of the earlier rounds; their choices are scored again and compete.
      sft: Fine-tuning settings; `sft.init_from` is the base, possibly a smaller model, and `sft.data.mixture` names data to train
        on besides the choices, or nothing.
      seed: Random seed.
    """

    sample_from: LanguageModel = ''
    rewards: RewardsConfig = RewardsConfig()
    prompts: PromptConfig = PromptConfig()
    count: int = 0
    samples: int = between(20, 1)
    temperatures: tuple[float, ...] = between((0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5), 1e-3, 100)
    tune_prompts: int = between(64, 1)
    max_new_tokens: int = between(1024, 1)
    decode_batch: int = between(128, 1, resumable='anywhere')
    earlier: tuple[Annotated[str, Names('file', 'choices.jsonl')], ...] = ()
    sft: SftConfig = resumable(SftConfig(), 'alone')
    seed: int = SEED

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures:
            raise UserError('temperatures is empty: name at least one.')


def run(config: RejectionConfig, workdir: str) -> None:
    """Samples, chooses and fine-tunes in `workdir`, or resumes there, and writes `workdir/model`.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir.
    """
    check(config)
    results = ('samples/*.jsonl', 'temperature.json', 'choices.jsonl')
    path, begun = open_run(workdir, config, results)
    prompts = made_from.of_mixture('prompts.mixture', config.prompts.mixture)
    earlier = made_from.of_sources('earlier', [f'jsonl:{earlier}/choices.jsonl' for earlier in config.earlier])
    made = made_from.of_models({'sample_from': config.sample_from}) | scoring.made_of(config.rewards)
    record_inputs(path, made | prompts | earlier, begun)
    if not (path / 'choices.jsonl').exists():
        sample_and_choose(config, path)
    sft.run_within(config.sft, path, path / 'choices.jsonl')


def check(config: RejectionConfig) -> None:
    """Raises a UserError for what would end the round later, perhaps after all sampling."""
    check_inputs(config, 'sample_from', 'sft.init_from')
    scoring.check(config.rewards)
    models = {'sample_from': config.sample_from, 'sft.init_from': config.sft.init_from} | config.rewards.models
    common_tokenizer(models)
    shapes = {field: open_model(path).config for field, path in models.items()}
    sft.check(config.sft, sft.extended(shapes.pop('sft.init_from'), config.sft), make_mesh(config.sft.mesh))
    check_room(config.prompts.longest, config.max_new_tokens, shapes.items())
    if config.sft.grade and 'toy:' not in config.prompts.mixture:
        check_toy('sft.grade=true', config.prompts.mixture, 'set sft.grade=false')


def sample_and_choose(config: RejectionConfig, path: Path) -> None:
    """All files up to choices.jsonl. One file of samples is in memory at a time, however many there are."""
    engine = open_engine(config.sample_from, config.decode_batch, own_template=False)
    rewards = open_rewards(config.rewards, engine.tokenizer)
    data = PromptData(config.prompts, engine.tokenizer, batch_size=1, seed=config.seed)
    prompts = different(data.train, config.seed)[: config.count or None]
    sft.check_warmup(config.sft, len(prompts) + sum(1 for _ in earlier_choices(config)))
    temperature = tune(config, path, engine, rewards, data.heldout[: config.tune_prompts])
    log(f'{data}\n{config.samples} answers to each of {len(prompts):,} prompts at temperature {temperature}')
    earlier, curve, counts = Earlier(config, path, rewards), RewardsByN(config.samples), collections.Counter()
    starts = range(0, len(prompts), FILE_PROMPTS)
    with report_disk_full(path), writing(path / 'choices.jsonl') if is_main_process() else contextlib.nullcontext(len) as write:
        for number, start in enumerate(tqdm(starts, unit='file', disable=not is_main_process())):
            file, some = path / 'samples' / f'{number:05}.jsonl', prompts[start : start + FILE_PROMPTS]
            if not file.exists():
                write_rollouts(file, draw(config, engine, rewards, some, temperature, f'{config.seed} {number}'))
            if not is_main_process():
                continue
            rollouts = read_rollouts(file)
            if len(rollouts) != len(some) * config.samples:
                raise UserError(f'{file} is damaged (it has {len(rollouts)} answers): remove it, and they are sampled again.')
            for i in range(0, len(rollouts), config.samples):
                answers = rollouts[i : i + config.samples]
                curve.add([answer.score for answer in answers])
                best = max((answer for answer in answers if usable(answer)), key=lambda answer: answer.score, default=None)
                if best:
                    older = earlier.better(best)
                    counts[older is not None] += 1
                    write(as_choice(older or best, bool(older)))
        for rollout in earlier.left() if is_main_process() else ():
            counts[True] += 1
            write(as_choice(rollout, True))
    if is_main_process() and not counts:
        (path / 'choices.jsonl').unlink()
    barrier('choices written')
    if not (path / 'choices.jsonl').exists():
        raise UserError(
            f'None of the answers can be chosen: all were cut off at max_new_tokens={config.max_new_tokens}, or are no text.'
        )
    curve.write(path)
    chosen = f'{counts.total():,} answers are chosen, {counts[True]:,} of them from earlier rounds'
    log(f'{chosen}; {len(prompts):,} prompts were asked.')


def draw(
    config: RejectionConfig, engine: Engine, rewards: Rewards, prompts: Sequence[Prompt], temperature: float, seed: str
) -> list[Rollout]:
    """`config.samples` answers to each prompt, one prompt's after the other's, scored."""
    settings = {'max_new_tokens': config.max_new_tokens, 'temperature': temperature, 'count': config.samples, 'seed': seed}
    drawn = sample_answers(engine, prompts, **settings)
    return rewards((prompt, sample) for prompt, samples in drawn for sample in samples)


def tune(config: RejectionConfig, path: Path, engine: Engine, rewards: Rewards, prompts: Sequence[Prompt]) -> float:
    """The temperature at which the best of so many samples is best, on held-out prompts (paper Figure 8)."""
    file = path / 'temperature.json'
    if not file.exists():
        best = {}
        for temperature in config.temperatures if len(config.temperatures) > 1 else ():
            rollouts = draw(config, engine, rewards, prompts, temperature, f'{config.seed} tune')
            scores = np.array([rollout.score for rollout in rollouts]).reshape(len(prompts), config.samples)
            best[temperature] = float(scores.max(axis=1).mean())
            log(f'temperature {temperature}: best score {best[temperature]:.4f}, mean {scores.mean():.4f}')
        chosen = max(best, key=best.__getitem__, default=config.temperatures[0])
        _write(file, json.dumps({'mean_best_score': best, 'chosen': chosen}, indent=2) + '\n')
    return json.loads(file.read_text())['chosen']


class Earlier:
    """The choices of the earlier rounds under today's reward models: without them later models forgot how to rhyme (p15).

    The rollouts lie in WORKDIR/earlier; in memory, and of the main process alone, is the place of the best one to each prompt.
    """

    def __init__(self, config: RejectionConfig, path: Path, rewards: Rewards):
        self._home, self._read = path / 'earlier', (-1, [])
        self._best: dict[bytes, tuple[float, int, int]] = {}  # prompt -> score, file, line
        choices = earlier_choices(config)
        for number, some in enumerate(iter(lambda: list(islice(choices, FILE_PROMPTS)), [])):
            file = self._file(number)
            if not file.exists():
                write_rollouts(file, rewards((rollout.prompt, rollout) for rollout in some))
            for line, rollout in enumerate(read_rollouts(file)) if is_main_process() else ():
                key = _digest(rollout.prompt)
                if usable(rollout) and (key not in self._best or rollout.score > self._best[key][0]):
                    self._best[key] = rollout.score, number, line

    def better(self, ours: Rollout) -> Rollout | None:
        """An earlier round's answer to the same prompt with a higher score; it is asked once for each prompt."""
        score, *place = self._best.pop(_digest(ours.prompt), (-np.inf, 0, 0))
        return self._at(*place) if score > ours.score else None

    def left(self) -> Iterator[Rollout]:
        """The answers to prompts that were not asked for."""
        return (self._at(number, line) for _, number, line in self._best.values())

    def _at(self, number: int, line: int) -> Rollout:
        if self._read[0] != number:
            self._read = number, self._file(number).read_text(encoding='utf-8').split('\n')
        return from_json(json.loads(self._read[1][line]))

    def _file(self, number: int) -> Path:
        return self._home / f'{number:05}.jsonl'


def earlier_choices(config: RejectionConfig) -> Iterator[Rollout]:
    """The choices of all earlier rounds, one round after the other."""
    return (rollout for earlier in config.earlier for rollout, _ in read_choices(Path(earlier) / 'choices.jsonl'))


def _digest(prompt: Prompt) -> bytes:
    return hashlib.blake2b(json.dumps(prompt.messages).encode(), digest_size=16).digest()


def as_choice(rollout: Rollout, is_earlier: bool) -> str:
    """A line of choices.jsonl: a dialog to fine-tune on, the drawn ids in it, and the rollout as it was."""
    row: dict[str, Any] = {'messages': [*rollout.prompt.messages, answered(rollout)]}
    row |= {'chosen_from': 'an earlier round' if is_earlier else 'this round', 'rollout': dataclasses.asdict(rollout)}
    return json.dumps(row, ensure_ascii=False) + '\n'


def read_choices(file: Path) -> Iterator[tuple[Rollout, str]]:
    """The rollouts of a choices.jsonl, and where each is from."""
    with file.open('rb') as lines:
        for line in map(json.loads, lines):
            yield from_json(line['rollout']), line['chosen_from']


class RewardsByN:
    """Mean over prompts of the highest and of the median score among the first N samples (Figure 7).

    >>> curve = RewardsByN(2)
    >>> curve.add([1.0, 3.0])
    >>> curve.add([4.0, 0.0])
    >>> curve.rows()
    [{'n': 1, 'max': 2.5, 'median': 2.5}, {'n': 2, 'max': 3.5, 'median': 2.0}]
    """

    def __init__(self, samples: int):
        self._sums, self._prompts = np.zeros((2, samples)), 0

    def add(self, scores: Sequence[float]) -> None:
        """The scores of a prompt's answers, in the order in which they were drawn."""
        medians = [np.median(scores[:n]) for n in range(1, len(scores) + 1)]
        self._sums += [np.maximum.accumulate(scores), medians]
        self._prompts += 1

    def rows(self) -> list[dict[str, float]]:
        """{'n', 'max', 'median'} for each N."""
        best, median = (self._sums / self._prompts).tolist()
        return [{'n': n, 'max': best[n - 1], 'median': median[n - 1]} for n in range(1, len(best) + 1)]

    def write(self, path: Path) -> None:
        """Writes rewards_by_n.json and .png, from the main process."""
        from matplotlib.figure import Figure

        if not is_main_process():
            return
        table = self.rows()
        write_atomically(path / 'rewards_by_n.json', json.dumps(table, indent=2) + '\n')
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot(xlabel='samples N', ylabel='score, mean over prompts')
        for name in ('max', 'median'):
            axes.plot([row['n'] for row in table], [row[name] for row in table], 'o-', label=f'{name} of N')
        axes.legend()
        save_figure(figure, path / 'rewards_by_n.png')


def _write(path: Path, text: str) -> None:
    barrier(f'{path.name} ready')
    if is_main_process():
        with report_disk_full(path):
            write_atomically(path, text)
    barrier(f'{path.name} written')


def dry_run(config: RejectionConfig, topology: str | None) -> str:
    """What steps of sampling and fine-tuning take, on the local devices or on a TPU topology that need not be attached."""
    policy = config.sample_from or 'tiny'
    length = config.prompts.longest + config.max_new_tokens
    sampling = plan.dry_run(policy, topology, config.decode_batch, length, int8=False)
    return f'sampling\n{sampling}\n\nfine-tuning\n{sft.dry_run(config.sft, topology)}'
