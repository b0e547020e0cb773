"""Pretrains a LLaMA 2 model.

python experiments/pretrain.py --workdir=run
"""

import dataclasses

from common import stage
from etils.epath import Path

from llama2_jax.checkpoints.directory import is_saved
from llama2_jax.config import MODELS
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.runtime import log
from llama2_jax.stages import pretrain
from llama2_jax.stages.pretrain import PretrainConfig
from llama2_jax.toy import GENRES
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

LLAMA1_SHARES = {'commoncrawl': 67, 'c4': 15, 'github': 4.5, 'wikipedia': 4.5, 'books': 4.5, 'arxiv': 2.5, 'stackexchange': 2}


def tiny() -> PretrainConfig:
    """1M parameters on the toy world: some minutes on two cores.

    python experiments/pretrain.py --workdir=run
    """
    return PretrainConfig(
        model=MODELS['tiny'],
        data=DataConfig(mixture=', '.join(f'toy:{genre}' for genre in GENRES)),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=50),
        loop=LoopConfig(eval_every=100, sample_every=200, checkpoint_every=200),
        tokens=1_000_000,
        batch_size=8,
        length=256,
        prompts=('Once upon a time', 'Dear'),
    )


def tiny_deep() -> PretrainConfig:
    """Twice the layers of `tiny` and twice the text, for reward models: they recall a fact, then compare an answer with it.

    python experiments/pretrain.py --config=tiny_deep --workdir=base
    """
    return dataclasses.replace(tiny(), model=dataclasses.replace(MODELS['tiny'], layers=8), tokens=2_000_000)


def small() -> PretrainConfig:
    """4M parameters on real text: fifteen minutes on two cores.

    python experiments/pretrain.py --config=small --set 'data.mixture=text:enwik8*.gz' --workdir=run2
    """
    return PretrainConfig(
        model=MODELS['small'],
        data=DataConfig(mixture='text:data/*.txt*'),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=100),
        loop=LoopConfig(eval_every=250, sample_every=500, checkpoint_every=500),
        tokens=1_500_000,
        batch_size=8,
        length=256,
    )


def llama2_7b() -> PretrainConfig:
    """LLaMA 2 7B on 2T tokens, as the paper trained it (p5-6).

    python experiments/pretrain.py --config=llama2_7b --set tokenizer=tokenizer.model --set 'data.mixture=…' --workdir=/mnt/run

    v5e:16x16 or more. The paper: 184,320 A100 hours, final training loss 1.75 on Meta's mixture.
    """
    return llama2('7b', peak_lr=3e-4, remat='full')


def llama2_13b() -> PretrainConfig:
    """LLaMA 2 13B on 2T tokens.

    python experiments/pretrain.py --config=llama2_13b --set tokenizer=tokenizer.model --set 'data.mixture=…' --workdir=/mnt/run

    v5p:4x8x8 or more. The paper: 368,640 A100 hours, final training loss 1.67.
    """
    return llama2('13b', peak_lr=3e-4, remat='q+k+attention+gate+up')


def llama2_34b() -> PretrainConfig:
    """LLaMA 2 34B on 2T tokens.

    python experiments/pretrain.py --config=llama2_34b --set tokenizer=tokenizer.model --set 'data.mixture=…' --workdir=/mnt/run

    v5p:4x8x8 or more. The paper: 1,038,336 A100 hours, final training loss 1.57.
    """
    return llama2('34b', peak_lr=1.5e-4, remat='k+v+attention')


def llama2_70b() -> PretrainConfig:
    """LLaMA 2 70B on 2T tokens.

    python experiments/pretrain.py --config=llama2_70b --set tokenizer=tokenizer.model --set 'data.mixture=…' --workdir=/mnt/run

    v5p:4x8x8 or more. The paper: 1,720,320 A100 hours, final training loss 1.50.
    """
    return llama2('70b', peak_lr=1.5e-4, remat='k+v+attention')


def llama2(size: str, peak_lr: float, remat: str) -> PretrainConfig:
    """What the four sizes share: everything but shape, learning rate (p6 Table 1) and what fits the memory of 256 chips.

    The mixture is LLaMA 1's, the only one that Meta has published (recipe C.1); put your own copies in data/.
    """
    mixture = ', '.join(f'arrayrecord:data/{name}/*.arrayrecord:{percent}' for name, percent in LLAMA1_SHARES.items())
    return PretrainConfig(
        model=MODELS[size],
        data=DataConfig(mixture=mixture),
        optimizer=OptimizerConfig(peak_lr=peak_lr),
        compute=ComputeConfig(remat=remat),
        loop=LoopConfig(eval_every=1000, sample_every=5000, checkpoint_every=1000, keep_every=25_000),
        tokenizer='tokenizer.model',
    )


PRESETS = {
    'tiny': tiny,
    'tiny_deep': tiny_deep,
    'small': small,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
}


def trained(place: Path, config: PretrainConfig) -> str:
    """The model of a workdir, which is pretrained there if it has none yet: for stages that are given no model."""
    if not is_saved(place / 'model'):
        log(f'No model is given: a base model is pretrained in {place} first.')
        pretrain.run(config, str(place))
    return str(place / 'model')


if __name__ == '__main__':
    stage(PRESETS, pretrain.run, pretrain.dry_run)
