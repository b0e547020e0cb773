"""Pretrains a LLaMA 2 model.

python experiments/pretrain.py --workdir=run
"""

from common import stage

from llama2_jax.config import MODELS
from llama2_jax.stages import pretrain
from llama2_jax.stages.pretrain import PretrainConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig


def tiny() -> PretrainConfig:
    """The toy world on a laptop.

    python experiments/pretrain.py --workdir=run
    """
    return PretrainConfig(
        model=MODELS['tiny'],
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=50),
        loop=LoopConfig(eval_every=200, sample_every=200, checkpoint_every=200),
        tokens=4_000_000,
        batch_size=16,
        length=256,
        prompts=('Once upon a time', 'Dear '),
    )


PRESETS = {'tiny': tiny}

if __name__ == '__main__':
    stage(PRESETS, pretrain.run)
