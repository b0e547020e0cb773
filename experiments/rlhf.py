"""The whole loop: versions by rejection sampling, the last one with PPO, and a table of pairwise win rates.

python experiments/rlhf.py --workdir=rlhf
"""

import dataclasses

import collect_preferences
import context_distillation
import ghost_attention
import ppo
import rejection_sampling
import reward_model
from common import stage
from etils.epath import Path

from llama2_jax.rl import versions
from llama2_jax.rl.versions import RlhfConfig


def tiny() -> RlhfConfig:
    """Five versions in the toy world.

    python experiments/rlhf.py --workdir=rlhf

    Without init_from and reward models those are trained first, in WORKDIR/models: a weak first chat model and both rewards.
    """
    return RlhfConfig(
        rejection=rejection_sampling.tiny(),
        ppo=ppo.tiny(),
        collect=collect_preferences.tiny(),
        reward=reward_model.tiny_renewed(),
    )


def llama2_7b() -> RlhfConfig:
    """LLaMA 2 7B; give `evaluation` your own held-out prompts. Hardware as for its PPO.

    python experiments/rlhf.py --config=llama2_7b --set init_from=sft7b/model --set base=llama2-7b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'evaluation=jsonl:…' --workdir=rlhf7b

    Every version samples for itself, unless the versions of the 70B are given to answer in its place, as in the paper (p14):
    --set sample_from=sft70b/model,rlhf70b/v1/model,rlhf70b/v2/model,rlhf70b/v3/model,rlhf70b/v4/model
    """
    return llama2('7b')


def llama2_13b() -> RlhfConfig:
    """LLaMA 2 13B; give `evaluation` your own held-out prompts. Hardware as for its PPO.

    python experiments/rlhf.py --config=llama2_13b --set init_from=sft13b/model --set base=llama2-13b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'evaluation=jsonl:…' --workdir=rlhf13b

    Every version samples for itself, unless the versions of the 70B are given to answer in its place, as in the paper (p14):
    --set sample_from=sft70b/model,rlhf70b/v1/model,rlhf70b/v2/model,rlhf70b/v3/model,rlhf70b/v4/model
    """
    return llama2('13b')


def llama2_34b() -> RlhfConfig:
    """LLaMA 2 34B; give `evaluation` your own held-out prompts. Hardware as for its PPO.

    python experiments/rlhf.py --config=llama2_34b --set init_from=sft34b/model --set base=llama2-34b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'evaluation=jsonl:…' --workdir=rlhf34b

    Every version samples for itself, unless the versions of the 70B are given to answer in its place, as in the paper (p14):
    --set sample_from=sft70b/model,rlhf70b/v1/model,rlhf70b/v2/model,rlhf70b/v3/model,rlhf70b/v4/model
    """
    return llama2('34b')


def llama2_70b() -> RlhfConfig:
    """LLaMA 2 70B; give `evaluation` your own held-out prompts. Hardware as for its PPO.

    python experiments/rlhf.py --config=llama2_70b --set init_from=sft70b/model --set base=llama2-70b \
      --set rewards.helpfulness=rm-help/model --set rewards.safety=rm-safe/model --set 'evaluation=jsonl:…' --workdir=rlhf70b
    """
    return llama2('70b')


def llama2(size: str) -> RlhfConfig:
    """The presets of all stages.

    As options, where the paper has them: Ghost Attention after V3 (p17; ghost_after=3, with ghost.dialogs), and context
    distillation before V1, whose answers RLHF then improves (p27; distill_before=1, with distill.prompts).
    """
    return RlhfConfig(
        init_from=size,
        rejection=rejection_sampling.PRESETS[f'llama2_{size}'](),
        ppo=ppo.PRESETS[f'llama2_{size}'](),
        ghost=ghost_attention.PRESETS[f'llama2_{size}'](),
        distill=context_distillation.PRESETS[f'llama2_{size}'](),
        evaluation='jsonl:prompts/heldout/*.jsonl',
    )


PRESETS = {
    'tiny': tiny,
    'llama2_7b': llama2_7b,
    'llama2_13b': llama2_13b,
    'llama2_34b': llama2_34b,
    'llama2_70b': llama2_70b,
}


def run(config: RlhfConfig, workdir: str) -> None:
    """The loop; what is not given of the first chat model and the reward models is trained first."""
    policy, rewards = rejection_sampling.train_missing_models(
        config.init_from, config.rewards, config.ppo.prompts, Path(workdir) / 'models'
    )
    versions.run(dataclasses.replace(config, init_from=policy, rewards=rewards), workdir)


if __name__ == '__main__':
    stage(PRESETS, run)
