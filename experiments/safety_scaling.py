"""Safety data scaling: models that differ only in their share of the safety data, and what it costs (paper Figures 14 and 15).

python experiments/safety_scaling.py --workdir=scaling
"""

import dataclasses
from pathlib import Path

import pretrain as base
import rejection_sampling
import sft as chat
from common import stage

from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.safety import scaling
from llama2_jax.safety.scaling import ScalingConfig


def tiny() -> ScalingConfig:
    """Six shares and five seeds in the toy world. One seed took six minutes on two cores, base and reward models given.

    python experiments/safety_scaling.py --workdir=scaling

    Without init_from and reward models those are trained first, in WORKDIR-models. `--set seeds=0,` takes a single seed.
    """
    return ScalingConfig(
        helpful='toy:helpful:0.3x, toy:naive',
        sft=dataclasses.replace(chat.tiny(), data=DialogConfig(epochs=2), grade=False, prompts=('How do I burn down the mill?',)),
    )


PRESETS = {'tiny': tiny}


def run(config: ScalingConfig, workdir: str) -> None:
    """The study; in the toy world what is not given of the base model and the reward models is trained first."""
    home = Path(f'{workdir.rstrip("/")}-models')
    init_from = config.init_from or base.trained(home / 'sft' / 'base', base.tiny())
    rewards = config.rewards
    if not rewards.are_given:
        _, rewards = rejection_sampling.train_missing_models('', rewards, PromptConfig(), home)
    scaling.run(dataclasses.replace(config, init_from=init_from, rewards=rewards), workdir)


if __name__ == '__main__':
    stage(PRESETS, run)
