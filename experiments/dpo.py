"""Aligns a chat model with comparisons by DPO, without a reward model.

python experiments/dpo.py --workdir=dpo
"""

import dataclasses

import sft as chat
from common import stage
from etils.epath import Path

from llama2_jax.data.mixing import check_toy
from llama2_jax.data.preferences import PreferenceConfig
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.stages import dpo
from llama2_jax.stages.dpo import DpoConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig


def tiny() -> DpoConfig:
    """The toy world's comparisons, and the first chat model of its RLHF (init_from='' trains it first).

    python experiments/dpo.py --workdir=dpo
    """
    return DpoConfig(
        data=PreferenceConfig(mixture='toy:preferences:0.9, toy:safety_preferences:0.1', epochs=0.6),
        optimizer=OptimizerConfig(peak_lr=1e-4, warmup_steps=0, warmup_share=0.1),
        loop=LoopConfig(eval_every=100, sample_every=100, checkpoint_every=100),
        prompts=('In which town is the home of Betta?', 'How do I pull out my own tooth?'),
        grade=True,
        beta=0.5,
        batch_size=24,
        length=544,
    )


def small() -> DpoConfig:
    """A small chat model and comparisons of your own. Nothing of the toy world is in it.

    python experiments/dpo.py --config=small --set init_from=sft/model --set data.mixture=jsonl:comparisons.jsonl \
      --workdir=dpo

    Any hardware that holds the model four times in float32.
    """
    return DpoConfig(
        data=PreferenceConfig(mixture='jsonl:comparisons.jsonl', heldout=0.05),
        optimizer=OptimizerConfig(peak_lr=5e-6, warmup_steps=0, warmup_share=0.1),
        loop=LoopConfig(log_every=1, eval_every=50, sample_every=50, checkpoint_every=50),
        length=2048,  # an answer may have 1,024 tokens with its prompt
    )


def llama2_7b() -> DpoConfig:
    """LLaMA 2 7B chat on comparisons: v5e:8x8.

    python experiments/dpo.py --config=llama2_7b --set init_from=sft7b/model --set 'data.mixture=…' --workdir=dpo7b
    """
    return llama2('7b')


def llama2_13b() -> DpoConfig:
    """LLaMA 2 13B chat on comparisons: v5e:8x8.

    python experiments/dpo.py --config=llama2_13b --set init_from=sft13b/model --set 'data.mixture=…' --workdir=dpo13b
    """
    return llama2('13b')


def llama2_34b() -> DpoConfig:
    """LLaMA 2 34B chat on comparisons: v5p:4x4x4.

    python experiments/dpo.py --config=llama2_34b --set init_from=sft34b/model --set 'data.mixture=…' --workdir=dpo34b
    """
    return llama2('34b')


def llama2_70b() -> DpoConfig:
    """LLaMA 2 70B chat on comparisons: v5p:4x4x4.

    python experiments/dpo.py --config=llama2_70b --set init_from=sft70b/model --set 'data.mixture=…' --workdir=dpo70b
    """
    return llama2('70b')


def llama2(size: str) -> DpoConfig:
    """The settings of the DPO paper (its p21) in AdamW; the LLaMA 2 paper has no DPO."""
    return DpoConfig(
        init_from=size,
        data=PreferenceConfig(mixture='jsonl:preferences/*.jsonl'),
        compute=ComputeConfig(remat='full'),
        loop=LoopConfig(log_every=1, eval_every=100, sample_every=100, checkpoint_every=100),
    )


PRESETS = {
    'tiny': tiny,
    'small': small,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
}


def run(config: DpoConfig, workdir: str) -> None:
    """Trains; without a model to begin with, on toy comparisons, the first toy chat model is trained in WORKDIR/sft first."""
    if config.grade:
        check_toy('grade=true', config.data.mixture, 'set grade=false')
    if not config.init_from and 'toy:' in config.data.mixture:
        config = dataclasses.replace(config, init_from=chat.trained(Path(workdir) / 'sft', chat.tiny_v1()))
    dpo.run(config, workdir)


if __name__ == '__main__':
    stage(PRESETS, run, dpo.dry_run)
