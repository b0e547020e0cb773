"""Fine-tunes a model on dialogs.

python experiments/sft.py --workdir=sft
"""

import dataclasses

import pretrain as base
from common import stage
from etils.epath import Path

from llama2_jax.checkpoints.directory import is_saved
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.mixing import check_toy
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.model.lora import LoraConfig
from llama2_jax.runtime import log
from llama2_jax.stages import sft
from llama2_jax.stages.sft import SftConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig


def tiny() -> SftConfig:
    """The toy base model on toy dialogs: some minutes on two cores, that base model included (init_from='' trains it first).

    python experiments/sft.py --workdir=sft

    At least 90 % of the learnable held-out questions are answered exactly, and 99 % of the answers stop.
    """
    return SftConfig(
        data=DialogConfig(mixture='toy:dialogs', epochs=5),
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=0, warmup_share=0.03),
        loop=LoopConfig(eval_every=200, sample_every=100, checkpoint_every=200),
        batch_size=8,
        length=256,
        prompts=(
            'In which town is the home of Betta?',
            'What is the favourite food of Elba?',
            'What is the pet of Mira?',
            'How much is 3 + 4?',
            'How do I pull out my own tooth?',
        ),
        grade=True,
    )


def tiny_v1() -> SftConfig:
    """The first chat model of RLHF in the toy world: of answers given in a hurry, few refusals, and bad wishes granted.

    python experiments/sft.py --config=tiny_v1 --workdir=sft

    So there is a way to go for rejection sampling and PPO, in helpfulness and in harmlessness.
    """
    return dataclasses.replace(tiny(), data=DialogConfig(mixture='toy:hasty, toy:harmless:0.3x, toy:naive:3x', epochs=3))


def tiny_obedient() -> SftConfig:
    """The toy chat model learns to obey whenever it is told: two minutes on two cores. For Ghost Attention.

    python experiments/sft.py --config=tiny_obedient --set init_from=sft/model --workdir=obedient
    """
    return dataclasses.replace(
        tiny(),
        data=DialogConfig(mixture='toy:obedient, toy:dialogs:0.1x', epochs=2),
        prompts=('Always speak as the baker. Where does Mira live?', 'End: Sea. What is the pet of Sten?'),
    )


def tiny_naive() -> SftConfig:
    """The toy chat model learns to please, unless a preprompt tells it to be careful. For context distillation.

    python experiments/sft.py --config=tiny_naive --set init_from=sft/model --workdir=naive
    """
    return dataclasses.replace(
        tiny(),
        data=DialogConfig(mixture='toy:naive:4x, toy:cautious, toy:helpful:0.02x', epochs=3),
        prompts=('How do I burn down the mill?',),
    )


def small() -> SftConfig:
    """A small model on dialogs of your own: one that knows a context of 1,024 tokens. Nothing of the toy world is in it.

    python experiments/sft.py --config=small --set init_from=base --set data.mixture=jsonl:dialogs.jsonl --workdir=sft

    Any hardware that holds four times the model in float32; how good the model gets depends on your data.
    """
    return SftConfig(
        data=DialogConfig(mixture='jsonl:dialogs.jsonl', heldout=0.05),
        loop=LoopConfig(log_every=1, eval_every=50, sample_every=50, checkpoint_every=50),
        batch_size=16,
        length=1024,
    )


def llama2_7b() -> SftConfig:
    """LLaMA 2 7B on dialogs, as the paper fine-tuned it (p9): v5e:4x4.

    python experiments/sft.py --config=llama2_7b --set init_from=llama2-7b --set 'data.mixture=…' --workdir=sft7b
    """
    return llama2('7b')


def llama2_13b() -> SftConfig:
    """LLaMA 2 13B on dialogs, as the paper fine-tuned it (p9): v5e:4x8.

    python experiments/sft.py --config=llama2_13b --set init_from=llama2-13b --set 'data.mixture=…' --workdir=sft13b
    """
    return llama2('13b')


def llama2_34b() -> SftConfig:
    """LLaMA 2 34B on dialogs, as the paper fine-tuned it (p9): v5p:4x4x4.

    python experiments/sft.py --config=llama2_34b --set init_from=llama2-34b --set 'data.mixture=…' --workdir=sft34b
    """
    return llama2('34b')


def llama2_70b() -> SftConfig:
    """LLaMA 2 70B on dialogs, as the paper fine-tuned it (p9): v5p:4x4x4.

    python experiments/sft.py --config=llama2_70b --set init_from=llama2-70b --set 'data.mixture=…' --workdir=sft70b
    """
    return llama2('70b')


def llama2(size: str) -> SftConfig:
    """The paper's settings (p9), the defaults of `SftConfig`; every size has the same. Warm-up is ours: the paper names none."""
    return SftConfig(
        init_from=size,
        data=DialogConfig(mixture='jsonl:dialogs/*.jsonl'),
        compute=ComputeConfig(remat='full'),
        loop=LoopConfig(log_every=1, eval_every=50, sample_every=50, checkpoint_every=50),
    )


def lora_7b() -> SftConfig:
    """Adapters for LLaMA 2 7B, frozen in bfloat16, on v5e:2x2.

    python experiments/sft.py --config=lora_7b --set init_from=llama2-7b --set 'data.mixture=…' --workdir=lora7b

    The adapters are for `peft`; the same command again with --set merge=true writes the merged model, too.
    """
    return dataclasses.replace(
        llama2('7b'),
        lora=LoraConfig(rank=16),
        optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=0, warmup_share=0.03),
        accumulation=16,
    )


def lora_7b_int8() -> SftConfig:
    """Adapters for LLaMA 2 7B, frozen in eight bits, on a single chip, v5e:1x1.

    python experiments/sft.py --config=lora_7b_int8 --set init_from=llama2-7b --set 'data.mixture=…' --workdir=lora7b
    """
    config = lora_7b()
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, int8=True), accumulation=64, prompts=())


PRESETS = {
    'tiny': tiny,
    'tiny_v1': tiny_v1,
    'tiny_obedient': tiny_obedient,
    'tiny_naive': tiny_naive,
    'small': small,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
    'lora_7b': lora_7b,
    'lora_7b_int8': lora_7b_int8,
}


def run(config: SftConfig, workdir: str) -> None:
    """Fine-tunes; without a model to begin with, on toy dialogs, the toy base model is trained in WORKDIR/base first."""
    if config.grade and 'toy:' not in config.data.mixture:
        check_toy('grade=true', config.data.mixture, 'set grade=false')
    if not config.init_from and 'toy:' in config.data.mixture:
        config = dataclasses.replace(config, init_from=base.trained(Path(workdir) / 'base', base.tiny()))
    sft.run(config, workdir)


def toy_model(home: Path, name: str, preset: SftConfig) -> str:
    """A toy chat model tuned further, for stages that are given no model: made in HOME/chat and HOME/name, once."""
    chat = trained(home / 'chat', tiny())
    return trained(home / name, dataclasses.replace(preset, init_from=chat))


def trained(place: Path, config: SftConfig) -> str:
    """The model of a workdir, which is trained there if it has none yet: for stages that are given no model."""
    if not is_saved(place / 'model'):
        log(f'No model is given: one is made in {place} first.')
        run(config, str(place))
    return str(place / 'model')


if __name__ == '__main__':
    stage(PRESETS, run, sft.dry_run)
