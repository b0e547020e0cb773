"""Ghost Attention: dialogs in which a chat model keeps to what the first turn says, and fine-tuning on them.

python experiments/ghost_attention.py --workdir=gatt
"""

import dataclasses

import sft as chat
from common import stage
from etils.epath import Path

from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.stages import ghost
from llama2_jax.stages.ghost import GhostConfig
from llama2_jax.stages.sft import SftConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig


def tiny() -> GhostConfig:
    """The toy world's instructions in dialogs of up to twenty turns; without a model= the toy chat model is made first.

    python experiments/ghost_attention.py --workdir=gatt

    Of 160 unseen dialogs 98, 98, 98 and 97 % obey at turns 2, 4, 6 and 20; 56, 27, 21 and 9 % before.
    """
    context = 1152  # twenty short turns
    return GhostConfig(
        dialogs='toy:talks',
        constraints='toy',
        grader='toy',
        samples=4,
        count=1920,
        cuts=2,
        most=2,
        max_new_tokens=48,
        batch_size=128,
        tune=True,
        judged=160,
        sft=SftConfig(
            data=DialogConfig(mixture='toy:obedient:0.05x', epochs=2),
            optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0, warmup_share=0.03),
            loop=LoopConfig(eval_every=0, sample_every=0, checkpoint_every=100),
            context=context,
            length=context,
            batch_size=2,
            prompts=(),
        ),
    )


def llama2_7b() -> GhostConfig:
    """Dialogs from LLaMA 2-Chat 7B, under hobbies, languages and figures that it names itself (paper p16-17), and fine-tuning.

    python experiments/ghost_attention.py --config=llama2_7b --set model=rlhf/v3/model --set dialogs=jsonl:d.jsonl --workdir=gatt
    """
    return llama2('7b')


def llama2_13b() -> GhostConfig:
    """Dialogs from LLaMA 2-Chat 13B, under hobbies, languages and figures that it names itself (paper p16-17), and fine-tuning.

    python experiments/ghost_attention.py --config=llama2_13b --set model=rlhf/v3/model --set dialogs=jsonl:d.jsonl --workdir=gatt
    """
    return llama2('13b')


def llama2_34b() -> GhostConfig:
    """Dialogs from LLaMA 2-Chat 34B, under hobbies, languages and figures that it names itself (paper p16-17), and fine-tuning.

    python experiments/ghost_attention.py --config=llama2_34b --set model=rlhf/v3/model --set dialogs=jsonl:d.jsonl --workdir=gatt
    """
    return llama2('34b')


def llama2_70b() -> GhostConfig:
    """Dialogs from LLaMA 2-Chat 70B, under hobbies, languages and figures that it names itself (paper p16-17), and fine-tuning.

    python experiments/ghost_attention.py --config=llama2_70b --set model=rlhf/v3/model --set dialogs=jsonl:d.jsonl --workdir=gatt
    """
    return llama2('70b')


def llama2(size: str) -> GhostConfig:
    """The paper's method; it leaves open how many dialogs and which fine-tuning, so that of SFT (p9) is our choice."""
    return GhostConfig(tune=True, sft=dataclasses.replace(chat.llama2(size), data=DialogConfig(mixture='')))


PRESETS = {
    'tiny': tiny,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
}


def run(config: GhostConfig, workdir: str) -> None:
    """Builds the data set; without a model, the toy chat model and then one that obeys are made in WORKDIR/models first."""
    config = dataclasses.replace(
        config, model=config.model or chat.toy_model(Path(workdir) / 'models', 'obedient', chat.tiny_obedient())
    )
    ghost.run(config, workdir)


if __name__ == '__main__':
    stage(PRESETS, run)
