"""Collects preferences: models answer each prompt at varied temperatures, and raters compare the answers.

python experiments/collect_preferences.py --workdir=preferences
"""

import dataclasses

import sft as chat
from common import stage
from etils.epath import Path

from llama2_jax.rl import collect
from llama2_jax.rl.collect import CollectConfig


def tiny() -> CollectConfig:
    """Six answers of a toy chat model to each prompt, drawn as PPO draws them, judged for helpfulness by simulated raters.

    python experiments/collect_preferences.py --set models=rs/model --workdir=preferences

    Without models= the first chat model is trained and asked, in WORKDIR/sft.
    """
    return CollectConfig(prompts='toy:prompts', samples=6, temperatures=(1.0,), max_new_tokens=48, raters='helpfulness')


def tiny_safety() -> CollectConfig:
    """The same for safety, on adversarial and borderline prompts.

    python experiments/collect_preferences.py --config=tiny_safety --workdir=preferences
    """
    return dataclasses.replace(tiny(), prompts='toy:safety_prompts', raters='safety')


def llama2() -> CollectConfig:
    """Answers of chat models of any size to prompts of your own, for people to rate.

    python experiments/collect_preferences.py --config=llama2 --set models=old/model,new/model \\
      --set prompts=jsonl:p.jsonl --workdir=preferences
    """
    return CollectConfig()


PRESETS = {'tiny': tiny, 'tiny_safety': tiny_safety, 'llama2': llama2}


def run(config: CollectConfig, workdir: str) -> None:
    """Collects; in the toy world the first chat model is trained in WORKDIR/sft where none is given."""
    if not config.models and config.prompts.startswith('toy:'):
        config = dataclasses.replace(config, models=(chat.trained(Path(workdir) / 'sft', chat.tiny_v1()),))
    collect.run(config, workdir)


if __name__ == '__main__':
    stage(PRESETS, run)
