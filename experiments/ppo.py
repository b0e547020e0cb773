"""Aligns a policy with reward models or a function by PPO.

python experiments/ppo.py --workdir=ppo
"""

import dataclasses

import rejection_sampling
from common import stage
from etils.epath import Path

from llama2_jax.data.prompts import PromptConfig
from llama2_jax.mesh import MeshConfig
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.rl import plan, ppo
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.train.optimizer import OptimizerConfig


def constant(rate: float) -> OptimizerConfig:
    """The paper's AdamW, at a constant rate."""
    return OptimizerConfig(peak_lr=rate, final_lr=1.0, warmup_steps=0)


def tiny() -> PPOConfig:
    """The toy world, a policy and rewards of 1M parameters each.

    python experiments/ppo.py --workdir=ppo

    Without init_from and reward models those are trained first, in WORKDIR/models: a weak first chat model and both rewards.
    """
    return PPOConfig(
        prompts=rejection_sampling.PROMPTS,
        optimizer=constant(1e-4),
        value_optimizer=constant(1e-3),
        iterations=30,
        batch_size=128,
        minibatch_size=32,
        max_new_tokens=rejection_sampling.ANSWER,
        beta=0.1,
        eval_every=10,
        eval_prompts=96,
        judge='oracle',
    )


def small() -> PPOConfig:
    """A small chat model, a reward model and prompts of your own. Nothing of the toy world is in it.

    python experiments/ppo.py --config=small --set init_from=rs/model --set rewards.helpfulness=rm/model \
      --set prompts.mixture=jsonl:prompts.jsonl --workdir=ppo

    A function may take the place of the reward model: --set rewards.function=file.py:name. Any
    hardware that holds policy and value model with their optimizers: 32 bytes for each parameter of one.
    Without a judge of your own (`judge`), no alarm tells a reward that is hacked from one that is earned.
    """
    return PPOConfig(
        prompts=PromptConfig(mixture='jsonl:prompts.jsonl', longest=512),
        iterations=100,
        batch_size=64,
        minibatch_size=16,
        max_new_tokens=256,
        decode_batch=32,
        eval_prompts=64,
        patience=5,
    )


def llama2_7b() -> PPOConfig:
    """LLaMA 2 7B with the paper's settings, on v5e:16x16.

    python experiments/ppo.py --config=llama2_7b --set init_from=rs/model --set rewards.helpfulness=rm-help/model \
      --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=ppo7b
    """
    return llama2('7b', beta=0.01, value_rate=9e-6, mesh=MeshConfig(fsdp=64, tensor=-1))


def llama2_13b() -> PPOConfig:
    """LLaMA 2 13B with the paper's settings, on v5e:16x16.

    python experiments/ppo.py --config=llama2_13b --set init_from=rs/model --set rewards.helpfulness=rm-help/model \
      --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=ppo13b
    """
    return llama2('13b', beta=0.01, value_rate=9e-6, mesh=MeshConfig(fsdp=64, tensor=-1))


def llama2_34b() -> PPOConfig:
    """LLaMA 2 34B with the paper's settings, on v5p:4x8x8.

    python experiments/ppo.py --config=llama2_34b --set init_from=rs/model --set rewards.helpfulness=rm-help/model \
      --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=ppo34b
    """
    return llama2('34b', beta=0.005, value_rate=9e-6, mesh=MeshConfig(fsdp=64, tensor=-1))


def llama2_70b() -> PPOConfig:
    """LLaMA 2 70B with the paper's settings, on v5p:8x8x8; the paper: about 330 s an iteration.

    python experiments/ppo.py --config=llama2_70b --set init_from=rs/model --set rewards.helpfulness=rm-help/model \
      --set rewards.safety=rm-safe/model --set 'prompts.mixture=…' --workdir=ppo70b
    """
    return llama2('70b', beta=0.005, value_rate=5e-6, mesh=MeshConfig(fsdp=64, tensor=-1))


def llama2(size: str, beta: float, value_rate: float, mesh: MeshConfig) -> PPOConfig:
    """The paper's settings (p15-16); the value model's rates are InstructGPT's (recipe K), gamma and lambda usual ones.

    At most 400 iterations, and early stopping by held-out prompts, not before 200: its rule, 20 evaluations without a better one,
    is ours. The value model, lengths and the temperature are ours, too, as the paper does not say.

    A minibatch has 64 answers, one for each part of `fsdp`; what devices there are beyond that share a layer's work.
    """
    return PPOConfig(
        init_from=size,
        rewards=rejection_sampling.PAPER_REWARDS,
        prompts=PromptConfig(mixture='jsonl:prompts/*.jsonl'),
        value_optimizer=constant(value_rate),
        compute=ComputeConfig(remat='full'),
        mesh=mesh,
        beta=beta,
        decode_batch=512,
        patience=20,
    )


PRESETS = {
    'tiny': tiny,
    'small': small,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
}


def run(config: PPOConfig, workdir: str) -> None:
    """PPO; what is not given of policy and reward models is trained first."""
    policy, rewards = rejection_sampling.train_missing_models(
        config.init_from, config.rewards, config.prompts, Path(workdir) / 'models'
    )
    ppo.run(dataclasses.replace(config, init_from=policy, rewards=rewards), workdir)


if __name__ == '__main__':
    stage(PRESETS, run, plan.dry_run)
