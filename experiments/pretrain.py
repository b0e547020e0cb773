"""Pretrains a LLaMA 2 model.

python experiments/pretrain.py --workdir=run
"""

from common import stage

from llama2_jax.config import MODELS
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.stages import pretrain
from llama2_jax.stages.pretrain import PretrainConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig


TOY_GENRES = 'biographies guides diaries letters dialogues stories numbers lessons web'.split()
# LLaMA 1's mixture, the only one Meta has published (recipe C.1); put your own copies in data/.
LLAMA1_MIXTURE = ', '.join(
    f'arrayrecord:data/{name}/*.arrayrecord:{percent}'
    for name, percent in [
        ('commoncrawl', 67.0), ('c4', 15.0), ('github', 4.5), ('wikipedia', 4.5), ('books', 4.5), ('arxiv', 2.5), ('stackexchange', 2.0),
    ]
)  # fmt: skip


def tiny() -> PretrainConfig:
    """1M parameters on the toy world.

    python experiments/pretrain.py --workdir=run
    """
    return PretrainConfig(
        model=MODELS['tiny'],
        data=DataConfig(mixture=', '.join(f'toy:{genre}' for genre in TOY_GENRES)),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=50),
        loop=LoopConfig(eval_every=100, sample_every=200, checkpoint_every=200),
        tokens=3_000_000,
        batch_size=8,
        length=256,
        prompts=('Once upon a time', 'Dear '),
    )


def small() -> PretrainConfig:
    """4M parameters on real text: fifteen minutes on two cores.

    python experiments/pretrain.py --config=small --set 'data.mixture=text:enwik8*.gz' --workdir=run2
    """
    return PretrainConfig(
        model=MODELS['small'],
        data=DataConfig(mixture='text:data/*.txt*'),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=100),
        loop=LoopConfig(eval_every=250, sample_every=500, checkpoint_every=500),
        tokens=3_600_000,
        batch_size=8,
        length=256,
    )


PRESETS = {'tiny': tiny, 'small': small}

if __name__ == '__main__':
    stage(PRESETS, pretrain.run)
