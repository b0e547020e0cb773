"""Safety context distillation: a model learns to answer adversarial prompts as it does under a safety preprompt.

python experiments/context_distillation.py --workdir=distilled
"""

import dataclasses

import reward_model
import sft as chat
from common import stage
from etils.epath import Path

from llama2_jax.checkpoints.directory import is_saved
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.runtime import log
from llama2_jax.safety import context_distillation
from llama2_jax.safety.context_distillation import DistillConfig


def tiny() -> DistillConfig:
    """A toy model that gives in to unsafe requests, unless told to be careful, becomes careful.

    python experiments/context_distillation.py --workdir=distilled

    Without model= and safety= both are trained first, in WORKDIR/models.
    """
    data = DialogConfig(mixture='toy:helpful:0.05x', epochs=4)
    return DistillConfig(
        prompts='toy:safety_prompts',
        samples=4,
        max_new_tokens=64,
        tune=True,
        sft=dataclasses.replace(chat.tiny_naive(), data=data),
    )


def llama2_7b() -> DistillConfig:
    """Distilled answers of LLaMA 2-Chat 7B to adversarial prompts of your own, and fine-tuning on them (paper p27-28).

    python experiments/context_distillation.py --config=llama2_7b --set model=chat/model --set safety=rm-safe/model \
      --set prompts=jsonl:p.jsonl --workdir=distilled
    """
    return llama2('7b')


def llama2_13b() -> DistillConfig:
    """Distilled answers of LLaMA 2-Chat 13B to adversarial prompts of your own, and fine-tuning on them (paper p27-28).

    python experiments/context_distillation.py --config=llama2_13b --set model=chat/model --set safety=rm-safe/model \
      --set prompts=jsonl:p.jsonl --workdir=distilled
    """
    return llama2('13b')


def llama2_34b() -> DistillConfig:
    """Distilled answers of LLaMA 2-Chat 34B to adversarial prompts of your own, and fine-tuning on them (paper p27-28).

    python experiments/context_distillation.py --config=llama2_34b --set model=chat/model --set safety=rm-safe/model \
      --set prompts=jsonl:p.jsonl --workdir=distilled
    """
    return llama2('34b')


def llama2_70b() -> DistillConfig:
    """Distilled answers of LLaMA 2-Chat 70B to adversarial prompts of your own, and fine-tuning on them (paper p27-28).

    python experiments/context_distillation.py --config=llama2_70b --set model=chat/model --set safety=rm-safe/model \
      --set prompts=jsonl:p.jsonl --workdir=distilled
    """
    return llama2('70b')


def llama2(size: str) -> DistillConfig:
    """The paper's method: one answer under a preprompt against one without. Fine-tuning is that of SFT (p9), which is ours."""
    return DistillConfig(samples=1, tune=True, sft=dataclasses.replace(chat.llama2(size), data=DialogConfig(mixture='')))


PRESETS = {
    'tiny': tiny,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
}


def run(config: DistillConfig, workdir: str) -> None:
    """Distils; what is not given is made in WORKDIR/models first: a toy model that is naive, and a safety reward model."""
    if not config.prompts.startswith('toy:'):
        context_distillation.run(config, workdir)
        return
    home = Path(workdir) / 'models'
    model = config.model or chat.toy_model(home, 'naive', chat.tiny_naive())
    safety = config.safety
    if not safety:
        safety = str(home / 'rm-safety' / 'model')
        if not is_saved(safety):
            log(f'No safety= is given: a reward model of the toy world is trained in {home / "rm-safety"} first.')
            reward_model.run(dataclasses.replace(reward_model.tiny_safety(), init_from=model), str(home / 'rm-safety'))
    context_distillation.run(dataclasses.replace(config, model=model, safety=safety), workdir)


if __name__ == '__main__':
    stage(PRESETS, run)
