"""Rejection sampling (paper p13-15; recipe F.2): many answers to each prompt, the best of them to fine-tune on.

Offline, in files that people can read and that a run goes on from:

  temperature.json   mean best score at each temperature of the grid, and the one that was chosen
  samples/           every answer with both rewards, a file for some prompts
  choices.jsonl      the best answer to each prompt, of this and of all earlier rounds, as dialogs
  rewards_by_n.*     max and median score by the number of samples, with a picture
  sft/               fine-tuning on the choices; its model becomes `model/`
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils.epath import Path
from tqdm import tqdm

from llama2_jax.config import SEED, Config, UserError, between
from llama2_jax.convert.load import check_given, open_model
from llama2_jax.data.prompts import Prompt, PromptConfig, PromptData, different
from llama2_jax.files import save_figure, write_atomically
from llama2_jax.model.engine import Engine
from llama2_jax.runtime import barrier, is_main_process, say
from llama2_jax.stages import generate, sft
from llama2_jax.stages.rollout import (
    Rewards,
    RewardsConfig,
    Rollout,
    from_json,
    open_rewards,
    read_rollouts,
    sample_answers,
    write_rollouts,
)
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.dialog import has_special_tags
from llama2_jax.train.workdir import no_space_is_said, open_run

FILE_PROMPTS = 64  # in a file of samples


@dataclasses.dataclass(frozen=True)
class RejectionConfig(Config):
    """A round of rejection sampling.

    Attributes:
      sample_from: the policy that answers; the paper's is always the 70B.
      rewards: the reward models; the best answer is that of the highest score behind the gate, as in PPO.
      prompts: what is asked; weights do not count here, each different prompt is asked once.
      count: of prompts; 0: all.
      samples: answers to each; the paper's figures have up to 20, its text 10 to 100.
      temperatures: a grid, of which the one with the highest mean best score on held-out prompts is taken, anew each round.
      tune_prompts: held-out prompts for that.
      max_new_tokens: an answer is cut off there, and can then not be chosen.
      decode_batch: answers that are drawn at a time.
      earlier: workdirs of the earlier rounds; their choices are scored anew and compete.
      sft: how to fine-tune, and from which base (`sft.init_from`), perhaps a smaller model; `sft.data.mixture` is what
        to train on besides the choices, perhaps nothing.
    """

    sample_from: str = ''
    rewards: RewardsConfig = RewardsConfig()
    prompts: PromptConfig = PromptConfig()
    count: int = 0
    samples: int = between(20, 1)
    temperatures: tuple[float, ...] = between((0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5), 1e-3, 100)
    tune_prompts: int = between(64, 1)
    max_new_tokens: int = between(1024, 1)
    decode_batch: int = between(128, 1)
    earlier: tuple[str, ...] = ()
    sft: SftConfig = SftConfig()
    seed: int = SEED

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures:
            raise UserError('temperatures is empty: name at least one.')


def run(config: RejectionConfig, workdir: str) -> None:
    """Samples, chooses and fine-tunes, or goes on with it, in `workdir`, and writes `workdir/model`.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir.
    """
    for name, model in (('sample_from', config.sample_from), ('sft.init_from', config.sft.init_from)):
        check_given(name, model)
    open_model(config.sft.init_from)
    for earlier in config.earlier:
        if not (Path(earlier) / 'choices.jsonl').exists():
            raise UserError(f'earlier: {earlier} holds no choices.jsonl, so it is no round of rejection sampling that is done.')
    path, _ = open_run(workdir, config, ('decode_batch', 'rewards.batch_size', 'sft'), ('samples/*.jsonl', 'temperature.json'))
    if not (path / 'choices.jsonl').exists():
        sample_and_choose(config, path)
    sft.run_within(config.sft, path, path / 'choices.jsonl')


def sample_and_choose(config: RejectionConfig, path: Path) -> None:
    """All files up to choices.jsonl."""
    engine = generate.open_engine(config.sample_from, config.decode_batch)
    rewards = open_rewards(config.rewards, engine.tokenizer)
    data = PromptData(config.prompts, engine.tokenizer, batch_size=1, seed=config.seed)
    prompts = different(data.train, config.seed)[: config.count or None]
    temperature = tune(config, path, engine, rewards, data.heldout[: config.tune_prompts])
    say(f'{data}\n{config.samples} answers to each of {len(prompts):,} prompts at temperature {temperature}')
    answers: list[list[Rollout]] = []
    starts = range(0, len(prompts), FILE_PROMPTS)
    for number, start in enumerate(tqdm(starts, unit='file', disable=not is_main_process())):
        file = path / 'samples' / f'{number:05}.jsonl'
        if not file.exists():
            some = prompts[start : start + FILE_PROMPTS]
            write_rollouts(file, draw(config, engine, rewards, some, temperature, f'{config.seed} {number}'))
        rollouts = read_rollouts(file)
        answers += [rollouts[i : i + config.samples] for i in range(0, len(rollouts), config.samples)]
    write_rewards_by_n(answers, path)
    write_choices(config, path, rewards, answers, pool(config, rewards))


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
            say(f'temperature {temperature}: best score {best[temperature]:.4f}, mean {scores.mean():.4f}')
        chosen = max(best, key=best.__getitem__, default=config.temperatures[0])
        _write(file, json.dumps({'mean_best_score': best, 'chosen': chosen}, indent=2) + '\n')
    return json.loads(file.read_text())['chosen']


def pool(config: RejectionConfig, rewards: Rewards) -> list[Rollout]:
    """The choices of the earlier rounds under today's reward models: without them later models forgot how to rhyme (p15)."""
    files = [Path(earlier) / 'choices.jsonl' for earlier in config.earlier]
    return rewards((rollout.prompt, rollout) for file in files for rollout, _ in read_choices(file))


def write_choices(
    config: RejectionConfig, path: Path, rewards: Rewards, answers: Sequence[Sequence[Rollout]], earlier: Sequence[Rollout]
) -> None:
    """The best answer to every prompt, ours or an earlier round's, that ended by itself and can be written as a dialog."""
    best: dict[str, tuple[Rollout, str]] = {}
    candidates = [(rollout, 'this round') for rollouts in answers for rollout in rollouts]
    for rollout, source in [*candidates, *((rollout, 'an earlier round') for rollout in earlier)]:
        answer = {'role': 'assistant', 'content': rollout.text.strip()}
        if rollout.ended and answer['content'] and not has_special_tags([answer]):
            key = json.dumps(rollout.prompt.messages)
            if key not in best or rollout.score > best[key][0].score:
                best[key] = rollout, source
    if not best:
        raise UserError(f'None of the answers ended by itself within max_new_tokens={config.max_new_tokens}.')
    lines = []
    for rollout, source in best.values():
        messages = [*rollout.prompt.messages, {'role': 'assistant', 'content': rollout.text.strip()}]
        lines.append(
            json.dumps({'messages': messages, 'chosen_from': source, 'rollout': dataclasses.asdict(rollout)}, ensure_ascii=False)
        )
    _write(path / 'choices.jsonl', '\n'.join(lines) + '\n')
    old = sum(source == 'an earlier round' for _, source in best.values())
    say(f'{len(best):,} answers are chosen, {old:,} of them from earlier rounds; {len(answers):,} prompts were asked.')


def read_choices(file: Path) -> list[tuple[Rollout, str]]:
    """The rollouts of a choices.jsonl, and where each is from."""
    lines = [json.loads(line) for line in file.read_text(encoding='utf-8').split('\n')[:-1]]
    return [(from_json(line['rollout']), line['chosen_from']) for line in lines]


def rewards_by_n(answers: Sequence[Sequence[Rollout]]) -> list[dict[str, float]]:
    """Of the first N samples of each prompt, the mean over prompts of their highest and of their median score (Figure 7)."""
    scores = np.array([[rollout.score for rollout in rollouts] for rollouts in answers])
    return [
        {'n': n, 'max': float(scores[:, :n].max(axis=1).mean()), 'median': float(np.median(scores[:, :n], axis=1).mean())}
        for n in range(1, scores.shape[1] + 1)
    ]


def write_rewards_by_n(answers: Sequence[Sequence[Rollout]], path: Path) -> None:
    """rewards_by_n.json and .png."""
    from matplotlib.figure import Figure

    table = rewards_by_n(answers)
    _write(path / 'rewards_by_n.json', json.dumps(table, indent=2) + '\n')
    if is_main_process():
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot(xlabel='samples N', ylabel='score, mean over prompts')
        for name in ('max', 'median'):
            axes.plot([row['n'] for row in table], [row[name] for row in table], 'o-', label=f'{name} of N')
        axes.legend()
        save_figure(figure, path / 'rewards_by_n.png')


def _write(path: Path, text: str) -> None:
    barrier(f'{path.name} ready')
    if is_main_process():
        with no_space_is_said(path):
            write_atomically(path, text)
    barrier(f'{path.name} written')


def dry_run(config: RejectionConfig, topology: str | None) -> str:
    """What a step of sampling and a step of fine-tuning take, on the devices here or on a TPU slice that need not be there."""
    policy = config.sample_from or 'tiny'
    length = config.prompts.longest + config.max_new_tokens
    sampling = generate.dry_run(policy, topology, config.decode_batch, length, int8=False)
    return f'sampling\n{sampling}\n\nfine-tuning\n{sft.dry_run(config.sft, topology)}'
