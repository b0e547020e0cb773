"""Safety data scaling (paper p24-26, Figures 14 and 15; recipe H.3, H.4): models that differ only in their amount of safety data.

SEED-SHARE/sft/            a model, fine-tuned on all of the helpful data and this share of the safety data
SEED-SHARE/SET.jsonl       its answers to the attacks, borderline and plain prompts, with the scores of both reward models
scaling.md, scaling.json   the table of all shares, seeds taken together
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from etils.epath import Path

from llama2_jax import made_from
from llama2_jax.config import Config, LanguageModel, Names, between
from llama2_jax.data.prompts import read_prompt
from llama2_jax.data.sources import read_records
from llama2_jax.evals.measure import share_text, spread
from llama2_jax.files import write_atomically
from llama2_jax.inference.open import open_engine
from llama2_jax.inputs import check_inputs, common_tokenizer
from llama2_jax.rl.rewards import RewardsConfig, open_rewards
from llama2_jax.rl.rollout import Rollout, by_oracle, read_rollouts, sample_answers, write_rollouts
from llama2_jax.runtime import is_main_process, log
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.stages import sft
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.tables import markdown_table
from llama2_jax.toy.oracle import Oracle

TAIL = 0.05  # the quantile of scores that stands for the worst answers
SETS = ('attacks', 'borderline', 'plain')


@dataclasses.dataclass(frozen=True)
class ScalingConfig(Config):
    """The study.

    Attributes:
      init_from: Base model of every fine-tuning.
      rewards: Both reward models; they judge the answers.
      helpful: Mixture of dialogs that every model is fine-tuned on.
      safety: Source of dialogs of which each model sees a share.
      shares: Shares of the safety data, 0 to 1.
      seeds: Seeds of the fine-tuning; one model for each seed and share.
      sft: Fine-tuning; the paper's takes 2 epochs.
      attacks, borderline, plain: Sources of held-out prompts; of the toy world, whose oracle counts violations and refusals.
      count: Prompts of each source, evenly spread; 0: all.
    """

    OVERWRITTEN: ClassVar = ('sft.init_from', 'sft.data')
    init_from: LanguageModel = ''
    rewards: RewardsConfig = RewardsConfig()
    helpful: Annotated[str, Names('mixture', 'dialogs')] = 'toy:helpful'
    safety: Annotated[str, Names('source', 'dialogs')] = 'toy:refusals'
    shares: tuple[float, ...] = between((0.0, 0.01, 0.1, 0.25, 0.5, 1.0), 0, 1)
    seeds: tuple[int, ...] = between((0, 1, 2, 3, 4), 0, 2**32 - 1)
    sft: SftConfig = SftConfig()
    attacks: Annotated[str, Names('source', 'prompts')] = 'toy:attacks_heldout'
    borderline: Annotated[str, Names('source', 'prompts')] = 'toy:borderline_heldout'
    plain: Annotated[str, Names('source', 'prompts')] = 'toy:heldout'
    count: int = 0
    max_new_tokens: int = between(96, 1)
    decode_batch: int = between(64, 1, resumable='anywhere')


def run(config: ScalingConfig, workdir: str) -> list[dict[str, Any]]:
    """Trains and judges the models that are not there yet; writes and prints the table, and returns its rows.

    Raises:
      UserError: any mistake in the config, a model, a source or the workdir.
    """
    check_inputs(config, 'init_from', 'rewards.helpfulness', 'rewards.safety')
    models = {'init_from': config.init_from} | config.rewards.models
    common_tokenizer({name.removeprefix('rewards.'): model for name, model in models.items()})
    path, begun = open_run(workdir, config, ('*-*',))
    sources = [config.attacks, config.borderline, config.plain]
    record_inputs(path, made_from.of_models(models) | made_from.of_sources('prompts', sources), begun)
    answers = {(seed, share): answer(config, path, seed, share) for seed in config.seeds for share in config.shares}
    rows = [
        {'share of safety data': f'{share:.0%}'} | measure([answers[seed, share] for seed in config.seeds])
        for share in config.shares
    ]
    text = f'{markdown_table(rows)}\n\n{len(config.seeds)} seed(s) together; greedy answers; 95 % intervals over the answers.'
    if is_main_process():
        write_atomically(path / 'scaling.json', json.dumps(rows, indent=1, ensure_ascii=False) + '\n')
        write_atomically(path / 'scaling.md', text + '\n')
    log(text)
    return rows


def answer(config: ScalingConfig, path: Path, seed: int, share: float) -> dict[str, list[Rollout]]:
    """The scored answers of one model to each of `SETS`, all made first if they are not there."""
    home = path / f'{seed}-{share:g}'
    files = {name: home / f'{name}.jsonl' for name in SETS}
    if not all(file.exists() for file in files.values()):
        log(f'Seed {seed}, {share:.0%} of the safety data: {home}')
        data = dataclasses.replace(config.sft.data, mixture=mixture(config, share))
        sft.run(dataclasses.replace(config.sft, init_from=config.init_from, data=data, seed=seed), str(home / 'sft'))
        engine = open_engine(str(home / 'sft' / 'model'), config.decode_batch, own_template=False)
        rewards = open_rewards(config.rewards, engine.tokenizer)
        for name, file in files.items():
            prompts = [read_prompt(record, engine.tokenizer) for record in read_records(getattr(config, name))]
            prompts = [prompt for prompt in prompts if prompt.is_safety == (name == 'attacks')]
            prompts = spread(prompts, config.count)
            drawn = sample_answers(engine, prompts, max_new_tokens=config.max_new_tokens, temperature=0.0, seed='scaling')
            write_rollouts(file, rewards([(prompt, sample) for prompt, [sample] in drawn]))
    return {name: read_rollouts(file) for name, file in files.items()}


def mixture(config: ScalingConfig, share: float) -> str:
    """The data of one model; without a share of the safety data, none of it.

    >>> mixture(ScalingConfig(), 0.25), mixture(ScalingConfig(), 0.0)
    ('toy:helpful, toy:refusals:0.25x', 'toy:helpful')
    """
    return f'{config.helpful}, {config.safety}:{share:g}x' if share else config.helpful


def measure(answers: Sequence[Mapping[str, Sequence[Rollout]]]) -> dict[str, str]:
    """The columns of a share, from the answers of its models, one for each seed."""
    oracle = Oracle()
    sets = {name: [rollout for one in answers for rollout in one[name]] for name in SETS}
    safety = 1 / (1 + np.exp(-np.array([rollout.safety for rollout in sets['attacks']])))
    helpfulness = 1 / (1 + np.exp(-np.array([rollout.helpfulness for rollout in sets['plain']])))
    verdicts = {name: [by_oracle(oracle, rollout) for rollout in rollouts] for name, rollouts in sets.items()}
    refused = {name: share_text(sum(one.refuses for one in verdicts[name]), len(verdicts[name])) for name in SETS}
    return {
        'safety RM, mean': f'{safety.mean():.3f}',
        f'safety RM, lowest {TAIL:.0%}': f'{np.quantile(safety, TAIL):.3f}',
        'helpfulness RM, mean': f'{helpfulness.mean():.3f}',
        f'helpfulness RM, lowest {TAIL:.0%}': f'{np.quantile(helpfulness, TAIL):.3f}',
        'violations': share_text(sum(one.violates for one in verdicts['attacks']), len(verdicts['attacks'])),
        'refused attacks': refused['attacks'],
        'false refusals, borderline': refused['borderline'],
        'false refusals, plain': refused['plain'],
        'helpfulness, oracle': f'{100 * np.mean([one.quality for one in verdicts["plain"]]):.1f} %',
    }
