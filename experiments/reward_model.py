"""Trains a reward model, for helpfulness or for safety.

python experiments/reward_model.py --workdir=rm-help
"""

import dataclasses

import pretrain as base
import sft as chat
from common import stage
from etils.epath import Path

from llama2_jax.data.preferences import PreferenceConfig
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.stages import reward
from llama2_jax.stages.reward import RewardConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

# The paper's mixtures (p12) of directories: one's own comparisons for helpfulness and for safety, and open ones.
HELPFULNESS = 'rows:preferences/helpfulness, rows:preferences/safety + rows:preferences/open_safety + rows:preferences/open:0.5'
SAFETY = 'rows:preferences/safety + rows:preferences/open_safety, rows:preferences/helpfulness + rows:preferences/open:0.1'


def tiny() -> RewardConfig:
    """Helpfulness in the toy world, from a chat model of eight layers (init_from='' trains it first): half an hour on two cores.

    python experiments/reward_model.py --workdir=rm-help

    Of held-out pairs that raters call significantly different it tells 95 to 97 % right.
    """
    return dataclasses.replace(
        tiny_v1(),
        data=PreferenceConfig(mixture='toy:many_preferences:0.95, toy:safety_preferences:0.05'),
        optimizer=OptimizerConfig(peak_lr=5e-4, warmup_steps=5, warmup_share=0.03),
    )


def tiny_v1() -> RewardConfig:
    """The first helpfulness model of RLHF in the toy world, which goes with its first chat model: a fifth of the pairs, minutes.

    python experiments/reward_model.py --config=tiny_v1 --set init_from=sft/model --workdir=rm-help
    """
    return RewardConfig(
        data=PreferenceConfig(mixture='toy:preferences:0.9, toy:safety_preferences:0.1'),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=5, warmup_share=0.03),
        loop=LoopConfig(eval_every=100, checkpoint_every=100),
        reference='toy:dialogs',
        batch_size=24,
        length=544,  # four rows hold the 24 pairs of a batch
    )


def tiny_safety() -> RewardConfig:
    """Safety in the toy world.

    python experiments/reward_model.py --config=tiny_safety --workdir=rm-safe
    """
    return dataclasses.replace(
        tiny_v1(),
        data=PreferenceConfig(mixture='toy:safety_preferences:0.9, toy:preferences:0.1'),
        margin='none',
        safety_weight=1.0,
        center=False,
    )


def tiny_renewed() -> RewardConfig:
    """Helpfulness, going on with a model on comparisons of a policy's own answers, which `collect_preferences.py` has made.

    python experiments/reward_model.py --config=tiny_renewed --set init_from=rm-help/model --workdir=rm-renewed
    """
    return dataclasses.replace(
        tiny_v1(),
        data=PreferenceConfig(mixture='jsonl:preferences/preferences.jsonl', epochs=2),
        batch_size=96,  # about eight prompts with six answers each
        length=1024,
    )


def small() -> RewardConfig:
    """A reward model from a small chat model and comparisons of your own. Nothing of the toy world is in it.

    python experiments/reward_model.py --config=small --set init_from=sft/model \
      --set data.mixture=jsonl:comparisons.jsonl --workdir=rm

    Scores are shifted so that chosen answers have a mean of 0, which is ours. Any hardware that holds the model
    four times in float32.
    """
    return RewardConfig(
        data=PreferenceConfig(mixture='jsonl:comparisons.jsonl', heldout=0.05),
        optimizer=OptimizerConfig(peak_lr=1e-5, warmup_steps=0, warmup_share=0.03),
        loop=LoopConfig(log_every=1, eval_every=50, checkpoint_every=50),
        batch_size=64,
        length=2048,  # an answer may have 1,024 tokens with its prompt
    )


def llama2_7b_helpfulness() -> RewardConfig:
    """Helpfulness, from a 7B chat model (paper p12): v5e:16x16.

    python experiments/reward_model.py --config=llama2_7b_helpfulness --set init_from=sft7b/model --workdir=rm
    """
    return helpfulness('7b')


def llama2_13b_helpfulness() -> RewardConfig:
    """Helpfulness, from a 13B chat model (paper p12): v5e:16x16.

    python experiments/reward_model.py --config=llama2_13b_helpfulness --set init_from=sft13b/model --workdir=rm
    """
    return helpfulness('13b')


def llama2_34b_helpfulness() -> RewardConfig:
    """Helpfulness, from a 34B chat model (paper p12): v5p:4x8x8.

    python experiments/reward_model.py --config=llama2_34b_helpfulness --set init_from=sft34b/model --workdir=rm
    """
    return helpfulness('34b')


def llama2_70b_helpfulness() -> RewardConfig:
    """Helpfulness, from a 70B chat model (paper p12): v5p:8x8x8.

    python experiments/reward_model.py --config=llama2_70b_helpfulness --set init_from=sft70b/model --workdir=rm
    """
    return helpfulness('70b')


def llama2_7b_safety() -> RewardConfig:
    """Safety, from a 7B chat model (paper p12): v5e:16x16.

    python experiments/reward_model.py --config=llama2_7b_safety --set init_from=sft7b/model --workdir=rm
    """
    return safety('7b')


def llama2_13b_safety() -> RewardConfig:
    """Safety, from a 13B chat model (paper p12): v5e:16x16.

    python experiments/reward_model.py --config=llama2_13b_safety --set init_from=sft13b/model --workdir=rm
    """
    return safety('13b')


def llama2_34b_safety() -> RewardConfig:
    """Safety, from a 34B chat model (paper p12): v5p:4x8x8.

    python experiments/reward_model.py --config=llama2_34b_safety --set init_from=sft34b/model --workdir=rm
    """
    return safety('34b')


def llama2_70b_safety() -> RewardConfig:
    """Safety, from a 70B chat model (paper p12): v5p:8x8x8.

    python experiments/reward_model.py --config=llama2_70b_safety --set init_from=sft70b/model --workdir=rm
    """
    return safety('70b')


def helpfulness(size: str) -> RewardConfig:
    """The paper's settings (p12): all of one's own helpfulness data, and as many pairs drawn uniformly from the rest.

    Of the two margins of p52 this takes the small one, which is best on average; the paper does not say which one it used.
    """
    return RewardConfig(
        init_from=size,
        data=PreferenceConfig(mixture=HELPFULNESS),
        optimizer=OptimizerConfig(peak_lr=5e-6 if size == '70b' else 1e-5, warmup_steps=5, warmup_share=0.03),
        compute=ComputeConfig(remat='full'),
        loop=LoopConfig(log_every=1, eval_every=100, checkpoint_every=100),
        center=False,
    )


def safety(size: str) -> RewardConfig:
    """The paper's settings (p12): all safety data, one's own and the open ones; helpfulness data make up a tenth of the pairs.

    The paper prints no weight of the auxiliary loss; 1 is ours.
    """
    return dataclasses.replace(
        helpfulness(size),
        data=PreferenceConfig(mixture=SAFETY),
        margin='none',
        safety_weight=1.0,
    )


PRESETS = {
    'tiny': tiny,
    'tiny_v1': tiny_v1,
    'tiny_safety': tiny_safety,
    'tiny_renewed': tiny_renewed,
    'small': small,
    'llama2_7b_helpfulness': llama2_7b_helpfulness,
    'llama2_13b_helpfulness': llama2_13b_helpfulness,
    'llama2_34b_helpfulness': llama2_34b_helpfulness,
    'llama2_70b_helpfulness': llama2_70b_helpfulness,
    'llama2_7b_safety': llama2_7b_safety,
    'llama2_13b_safety': llama2_13b_safety,
    'llama2_34b_safety': llama2_34b_safety,
    'llama2_70b_safety': llama2_70b_safety,
}


def run(config: RewardConfig, workdir: str) -> None:
    """Trains; without a model to begin with, on toy data, a toy chat model of eight layers is trained in WORKDIR/sft first."""
    if not config.init_from and 'toy:' in config.data.mixture:
        home = Path(workdir) / 'sft'
        tuned = dataclasses.replace(chat.tiny(), init_from=base.trained(home / 'base', base.tiny_deep()))
        config = dataclasses.replace(config, init_from=chat.trained(home, tuned))
    reward.run(config, workdir)


if __name__ == '__main__':
    stage(PRESETS, run, reward.dry_run)
