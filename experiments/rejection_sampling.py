"""Samples many answers to each prompt, and fine-tunes on the best.

python experiments/rejection_sampling.py --workdir=rs
"""

import dataclasses

import reward_model
import sft as chat
from common import stage
from etils.epath import Path

from llama2_jax.checkpoints.directory import is_saved
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.mixing import parse_mixture
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.rl import rejection
from llama2_jax.rl.rejection import RejectionConfig
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.runtime import log
from llama2_jax.stages.sft import SftConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

PROMPTS = PromptConfig(mixture='toy:prompts, toy:safety_prompts:4x', longest=64)
PAPER_REWARDS = RewardsConfig(missing_eos_penalty=0.0)  # the paper has no such penalty
ANSWER = 48  # tokens; the longest right answer has 45


def tiny() -> RejectionConfig:
    """600 prompts of the toy world, six answers to each.

    python experiments/rejection_sampling.py --workdir=rs

    Without sample_from and reward models those are trained first, in WORKDIR/models: a weak first chat model and both rewards.
    """
    return RejectionConfig(
        prompts=PROMPTS,
        count=600,
        samples=6,
        temperatures=(0.5, 0.8, 1.1),
        tune_prompts=24,
        max_new_tokens=ANSWER,
        sft=SftConfig(
            data=DialogConfig(mixture='', epochs=2),
            optimizer=OptimizerConfig(peak_lr=7e-4, warmup_steps=0, warmup_share=0.03),
            loop=LoopConfig(eval_every=0, sample_every=0, checkpoint_every=200),
            batch_size=8,
            length=256,
            grade=True,
        ),
    )


def small() -> RejectionConfig:
    """A small chat model learns the best of eight answers to each prompt of your own. Nothing of the toy world is in it.

    python experiments/rejection_sampling.py --config=small --set sample_from=sft/model --set rewards.helpfulness=rm/model \
      --set prompts.mixture=jsonl:prompts.jsonl --workdir=rs

    A function may take the place of the reward model: --set rewards.function=file.py:name. Any
    hardware that holds four times the model in float32.
    """
    return RejectionConfig(
        prompts=PromptConfig(mixture='jsonl:prompts.jsonl', longest=512),
        samples=8,
        temperatures=(0.8, 1.0, 1.2),
        tune_prompts=16,
        max_new_tokens=256,
        decode_batch=32,
        sft=dataclasses.replace(chat.small(), data=DialogConfig(mixture='')),
    )


def llama2_7b() -> RejectionConfig:
    """The paper's way for its smaller models (p14): the 70B answers, 7B learns from the best of 20, from its pretrained base.

    python experiments/rejection_sampling.py --config=llama2_7b --set sample_from=llama2-70b-v3 --set sft.init_from=llama2-7b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=rs

    Hardware as for fine-tuning; the sampling 70B wants 140 GB in bfloat16.
    """
    return llama2('7b')


def llama2_13b() -> RejectionConfig:
    """The same for 13B.

    python experiments/rejection_sampling.py --config=llama2_13b --set sample_from=llama2-70b-v3 --set sft.init_from=llama2-13b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=rs

    Hardware as for fine-tuning; the sampling 70B wants 140 GB in bfloat16.
    """
    return llama2('13b')


def llama2_34b() -> RejectionConfig:
    """The same for 34B.

    python experiments/rejection_sampling.py --config=llama2_34b --set sample_from=llama2-70b-v3 --set sft.init_from=llama2-34b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=rs

    Hardware as for fine-tuning; the sampling 70B wants 140 GB in bfloat16.
    """
    return llama2('34b')


def llama2_70b() -> RejectionConfig:
    """The 70B answers and learns.

    python experiments/rejection_sampling.py --config=llama2_70b --set sample_from=llama2-70b-v3 --set sft.init_from=llama2-70b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=rs

    Hardware as for fine-tuning; the sampling 70B wants 140 GB in bfloat16.
    """
    return llama2('70b')


def llama2(size: str) -> RejectionConfig:
    """The paper's settings where it states them (p14-15); fine-tuning as in `sft.py`, on the choices and the dialogs of SFT.

    It gives neither the number of answers nor a rule for two rewards; 20 is that of its figures, the rule is that of PPO.
    """
    return RejectionConfig(
        sample_from='70b',
        rewards=PAPER_REWARDS,
        prompts=PromptConfig(mixture='jsonl:prompts/*.jsonl'),
        sft=chat.llama2(size),
    )


PRESETS = {
    'tiny': tiny,
    'small': small,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
}


def train_missing_models(policy: str, rewards: RewardsConfig, prompts: PromptConfig, home: Path) -> tuple[str, RewardsConfig]:
    """The policy and the rewards; where all prompts are of the toy world, what is not given at all is trained in `home`."""
    if not all(component.source.startswith('toy:') for component in parse_mixture(prompts.mixture)):
        return policy, rewards
    policy = policy or chat.trained(home / 'sft', chat.tiny_v1())
    if not rewards.are_given:
        log(f'No rewards are given: two reward models of the toy world are trained in {home} first.')
        for name, config in (('helpfulness', reward_model.tiny_v1()), ('safety', reward_model.tiny_safety())):
            model = home / f'rm-{name}'
            if not is_saved(model / 'model'):
                reward_model.run(dataclasses.replace(config, init_from=policy), str(model))
            rewards = dataclasses.replace(rewards, **{name: str(model / 'model')})
    return policy, rewards


def run(config: RejectionConfig, workdir: str) -> None:
    """A round; the policy is what is fine-tuned, too, unless `sft.init_from` says otherwise."""
    policy, rewards = train_missing_models(config.sample_from, config.rewards, config.prompts, Path(workdir) / 'models')
    sft = dataclasses.replace(config.sft, init_from=config.sft.init_from or policy)
    rejection.run(dataclasses.replace(config, sample_from=policy, rewards=rewards, sft=sft), workdir)


if __name__ == '__main__':
    stage(PRESETS, run, rejection.dry_run)
