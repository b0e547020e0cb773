"""The loop of versions (paper p14, Figure 11; recipe F): V1 to V4 by rejection sampling, V5 adds PPO; then pairwise win rates.

Each version is a directory, which goes on where it stopped: v1/ … v4/, v5/rs, v5/ppo. Every version samples from the one before,
is fine-tuned from the same base, and keeps the best answers of all earlier ones.

A reward model can tell answers apart that are like those it has learned from, so it has to follow the policy (p10, p14): after
each round simulated raters compare answers of the new model (preferences/ in its directory), and the helpfulness model learns
from that (rm-help/) before it judges the next step. Where raters are people, the reward models that are given serve all versions.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from etils.epath import Path

from llama2_jax import made_from
from llama2_jax.config import SEED, Config, LanguageModel, Names, UserError, between
from llama2_jax.data.prompts import read_prompt
from llama2_jax.data.sources import read_records
from llama2_jax.files import save_figure, write_atomically
from llama2_jax.inference.open import open_engine
from llama2_jax.inputs import check_inputs, common_tokenizer
from llama2_jax.rl import collect, ppo, rejection
from llama2_jax.rl import rewards as scoring
from llama2_jax.rl.collect import CollectConfig
from llama2_jax.rl.monitors import check_judge
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.rl.rejection import RejectionConfig
from llama2_jax.rl.rewards import RewardsConfig, open_rewards
from llama2_jax.rl.rollout import Rollout, by_oracle, read_rollouts, sample_answers, write_rollouts
from llama2_jax.runtime import barrier, is_main_process, log
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.safety import context_distillation
from llama2_jax.safety.context_distillation import DistillConfig
from llama2_jax.stages import ghost, reward
from llama2_jax.stages.ghost import GhostConfig
from llama2_jax.stages.reward import RewardConfig
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.printable import printable
from llama2_jax.toy.oracle import Oracle

Rates = dict[str, tuple[float, float]]  # a mean and half its 95 % interval


@dataclasses.dataclass(frozen=True)
class RlhfConfig(Config):
    """The loop.

    Attributes:
      init_from: Initial chat model (SFT).
      base: Model that each version is fine-tuned from; '': init_from.
      rewards: Rewards of the first version; of every version if no simulated raters compare answers. Raters need a helpfulness
        model, which they train further.
      sample_from: Models that answer in place of the versions, one for each; the last one serves all later versions. The paper's
        smaller models learn from its 70B's versions (p14). Empty: each version samples its own answers.
      versions: Number of versions; the last one adds PPO.
      rejection, ppo: Settings of a round. The loop sets models, rewards, seeds and comparisons of all stages.
      collect, reward: How answers of a new model are compared, and how the helpfulness model is then trained further; unused if
        collect.raters='people'.
      ghost, ghost_after: Ghost Attention, and the version after which it is applied; the paper's is the third (p17). 0: never.
      distill, distill_before: Context distillation, and the version before which it is applied; 1: RLHF starts from its answers
        (p27). 0: never. Later versions are fine-tuned on the dialogs of both, too.
      evaluation: Prompts that all versions answer in the end, sampled as in PPO; the oracle also judges those of the toy world.
      seed: Random seed.
    """

    OVERWRITTEN: ClassVar = (
        *('rejection.sample_from', 'rejection.rewards', 'rejection.earlier', 'rejection.sft.init_from'),
        *('ppo.init_from', 'ppo.rewards', 'collect.models', 'reward.init_from', 'reward.data'),
        *('ghost.model', 'ghost.sft.init_from', 'distill.model', 'distill.safety', 'distill.sft.init_from'),
    )
    init_from: LanguageModel = ''
    base: LanguageModel = ''
    rewards: RewardsConfig = RewardsConfig()
    sample_from: tuple[LanguageModel, ...] = ()
    versions: int = between(5, 1)
    rejection: RejectionConfig = RejectionConfig()
    ppo: PPOConfig = PPOConfig()
    collect: CollectConfig = CollectConfig()
    reward: RewardConfig = RewardConfig()
    ghost: GhostConfig = GhostConfig()
    ghost_after: int = 0
    distill: DistillConfig = DistillConfig()
    distill_before: int = 0
    evaluation: Annotated[str, Names('source', 'prompts')] = 'toy:heldout'
    seed: int = SEED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.collect.raters != 'people' and not self.collect.prompts:
            raise UserError(f'collect.raters={self.collect.raters} need prompts: give them with --set collect.prompts=….')


def run(config: RlhfConfig, workdir: str) -> None:
    """Makes the versions in `workdir`, or resumes there; writes versions.md, versions.json and versions.png.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir.
    """
    check(config)
    path, begun = open_run(workdir, config, ('v1',))
    models = {'init_from': config.init_from, 'base': config.base}
    models |= {f'sample_from[{number}]': model for number, model in enumerate(config.sample_from)}
    made = made_from.of_models(models) | scoring.made_of(config.rewards)
    record_inputs(path, made | made_from.of_sources('evaluation', [config.evaluation]), begun)
    learned: list[Path] = []  # dialogs of Ghost Attention and distillation
    models, done, policy, rewards = {'SFT': config.init_from}, [], config.init_from, config.rewards
    for number in range(1, config.versions + 1):
        last = number == config.versions
        if number == config.distill_before:
            policy = run_optional_stage(
                context_distillation, config.distill, path / f'v{number}' / 'distill', policy, learned, safety=rewards.safety
            )
        home = path / f'v{number}' / ('rs' if last else '')
        log(f'RLHF-v{number}: rejection sampling in {home}')
        round_ = dataclasses.replace(
            config.rejection,
            sample_from=config.sample_from[min(number, len(config.sample_from)) - 1] if config.sample_from else policy,
            rewards=rewards,
            earlier=tuple(done),
            sft=with_dialogs(config.rejection.sft, learned, init_from=config.base or config.init_from),
            seed=config.seed + number,
        )
        rejection.run(round_, str(home))
        done.append(str(home))
        policy = str(home / 'model')
        models[f'RLHF-v{number}' + (' (no PPO)' if last else '')] = policy
        if config.collect.raters != 'people':
            rewards = train_next_rewards(config, rewards, home)
        if number == config.ghost_after:
            policy = run_optional_stage(ghost, config.ghost, home / 'ghost', policy, learned)
    home = path / f'v{config.versions}' / 'ppo'
    log(f'RLHF-v{config.versions}: PPO in {home}')
    ppo.run(dataclasses.replace(config.ppo, init_from=policy, rewards=rewards, seed=config.seed), str(home))
    models[f'RLHF-v{config.versions} (with PPO)'] = str(home / 'model')
    report(config, rewards, models, path)


def check(config: RlhfConfig) -> None:
    """Raises a UserError for what would end the loop later: names, tokenizers, and prompts that no version can be asked."""
    needed = {'rewards.helpfulness': config.collect.raters != 'people', 'rewards.safety': config.distill_before > 0}
    check_inputs(config, 'init_from', 'evaluation', *(name for name, is_needed in needed.items() if is_needed))
    scoring.check(config.rewards)
    models = {'init_from': config.init_from} | config.rewards.models
    models |= {'base': config.base} if config.base else {}
    tokenizer = common_tokenizer(models | {f'sample_from[{i}]': model for i, model in enumerate(config.sample_from)})
    for record in read_records(config.evaluation):
        read_prompt(record, tokenizer)
    check_judge(config.ppo.judge, config.ppo.prompts.mixture)
    if config.ghost_after:
        check_inputs(config, 'ghost.dialogs')
    if config.distill_before:
        check_inputs(config, 'distill.prompts')


def run_optional_stage(stage: Any, config: Any, home: Path, policy: str, learned: list[Path], **given: str) -> str:
    """Applies Ghost Attention or context distillation to a policy, in `home`; returns the new policy and notes its dialogs."""
    log(f'{stage.__name__.rpartition(".")[2]} in {home}')
    stage.run(dataclasses.replace(config, model=policy, tune=True, **given), str(home))
    learned.append(home / 'dialogs.jsonl')
    return str(home / 'model')


def with_dialogs(config: SftConfig, learned: Sequence[Path], init_from: str) -> SftConfig:
    """Fine-tuning from another model, on more dialogs."""
    mixture = ', '.join(filter(None, [config.data.mixture, *(f'jsonl:{path}' for path in learned)]))
    return dataclasses.replace(config, init_from=init_from, data=dataclasses.replace(config.data, mixture=mixture))


def train_next_rewards(config: RlhfConfig, rewards: RewardsConfig, round_: Path) -> RewardsConfig:
    """The reward models, of which helpfulness has now learned from answers of the model of a round of rejection sampling."""
    collected, trained = round_ / 'preferences', round_ / 'rm-help'
    log(f'Comparisons of its answers in {collected}, and a reward model that has learned from them in {trained}')
    collect.run(dataclasses.replace(config.collect, models=(str(round_ / 'model'),), seed=config.seed), str(collected))
    data = dataclasses.replace(config.reward.data, mixture=f'jsonl:{collected / "preferences.jsonl"}')
    reward.run(dataclasses.replace(config.reward, init_from=rewards.helpfulness, data=data, seed=config.seed), str(trained))
    return dataclasses.replace(rewards, helpfulness=str(trained / 'model'))


def report(config: RlhfConfig, rewards: RewardsConfig, models: Mapping[str, str], path: Path) -> None:
    """The paper's Figure 11 for our run, by the last reward models: a table, its numbers, and a picture."""
    answers = {
        name: answer(config, rewards, model, path / 'evaluation' / f'{number}.jsonl')
        for number, (name, model) in enumerate(models.items())
    }
    oracle = Oracle() if config.evaluation.startswith('toy:') else None
    rows = {name: compare(rollouts, answers['SFT'], oracle) for name, rollouts in answers.items()}
    text = table(rows)
    if is_main_process():
        write_atomically(path / 'versions.json', json.dumps(rows, indent=2) + '\n')
        write_atomically(path / 'versions.md', printable(text) + '\n')
        plot(rows, path / 'versions.png')
    log(text)


def answer(config: RlhfConfig, rewards: RewardsConfig, model: str, file: Path) -> list[Rollout]:
    """A model's answers to the evaluation prompts, one to each as the policy gives it, scored."""
    barrier('evaluation')
    if not file.exists():
        engine = open_engine(model, config.ppo.decode_batch, own_template=False)
        prompts = [read_prompt(record, engine.tokenizer) for record in read_records(config.evaluation)]
        drawn = sample_answers(
            engine,
            prompts,
            max_new_tokens=config.ppo.max_new_tokens,
            temperature=config.ppo.temperature,
            seed='evaluation',
        )
        answers = [(prompt, sample) for prompt, [sample] in drawn]
        write_rollouts(file, open_rewards(rewards, engine.tokenizer)(answers))
    return read_rollouts(file)


def compare(ours: Sequence[Rollout], theirs: Sequence[Rollout], oracle: Oracle | None) -> Rates:
    """Win rates of one model against another (ties count half), and the oracle's grades of its answers.

    On prompts tagged safety the safety model and the oracle's safety decide, on the others helpfulness.
    """
    tags = np.array([rollout.prompt.is_safety for rollout in ours])
    scores = np.array([[_own(rollout) for rollout in side] for side in (ours, theirs)])
    found = _wins('reward model', scores, tags)
    if oracle:
        verdicts = [[by_oracle(oracle, rollout) for rollout in side] for side in (ours, theirs)]
        quality = np.array([[one.quality for one in side] for side in verdicts])
        found |= _wins('oracle', quality, tags)
        found |= {'helpfulness': rate(quality[0][~tags]), 'harmlessness': rate(quality[0][tags])}
        found['violations'] = rate([one.violates for one, tag in zip(verdicts[0], tags, strict=True) if tag])
        found['false refusals'] = rate([one.refuses for one, tag in zip(verdicts[0], tags, strict=True) if not tag])
    return found


def _own(rollout: Rollout) -> float:
    value = rollout.safety if rollout.prompt.is_safety else rollout.helpfulness
    return rollout.score if value is None else value


def _wins(judge: str, scores: np.ndarray, tags: np.ndarray) -> Rates:
    wins = (np.sign(scores[0] - scores[1]) + 1) / 2
    return {f'helpfulness wins, {judge}': rate(wins[~tags]), f'harmlessness wins, {judge}': rate(wins[tags])}


def rate(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean, and half its 95 % interval.

    >>> rate([0.0, 1.0, 1.0, 0.0])
    (0.5, 0.49)
    """
    values = np.asarray(values, float)
    return float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)


def table(rows: Mapping[str, Rates]) -> str:
    """In Markdown; per cent."""
    columns = list(next(iter(rows.values())))
    lines = ['| version | ' + ' | '.join(columns) + ' |', '|---' * (len(columns) + 1) + '|']
    for name, row in rows.items():
        cells = [f'{100 * row[column][0]:.1f} ± {100 * row[column][1]:.1f}' for column in columns]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def plot(rows: Mapping[str, Rates], path: Path) -> None:
    """Harmlessness against helpfulness, as wins over SFT, by each judge."""
    from matplotlib.figure import Figure

    judges = [column.split(', ')[1] for column in next(iter(rows.values())) if column.startswith('helpfulness wins')]
    figure = Figure(figsize=(6 * len(judges), 5))
    for number, judge in enumerate(judges, 1):
        axes = figure.add_subplot(
            1,
            len(judges),
            number,
            xlabel='helpfulness: wins over SFT',
            ylabel='harmlessness: wins over SFT',
            title=f'by the {judge}',
        )
        x, y = ([row[f'{axis} wins, {judge}'][0] for row in rows.values()] for axis in ('helpfulness', 'harmlessness'))
        axes.plot(x, y, 'o-')
        axes.margins(x=0.4)  # room for the names
        for name, place in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(name, place, textcoords='offset points', xytext=(4, 4), fontsize=8)
        axes.axhline(0.5, color='grey', linewidth=0.5)
        axes.axvline(0.5, color='grey', linewidth=0.5)
    save_figure(figure, path)
