"""What a run of PPO works with: models laid out, prompts, programs, and somebody to judge."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from etils.epath import Path
from jax.sharding import Mesh

from llama2_jax import made_from
from llama2_jax.checkpoints.load import load_model, load_score_model, open_model
from llama2_jax.config import ModelConfig
from llama2_jax.data.mixing import check_toy
from llama2_jax.data.prompts import PromptData
from llama2_jax.inference.engine import Engine
from llama2_jax.inference.open import open_scorer
from llama2_jax.inputs import check_inputs, check_room, common_tokenizer
from llama2_jax.mesh import parameter_name, set_mesh
from llama2_jax.model.llama import Llama
from llama2_jax.model.lora import make_adapters, merge
from llama2_jax.model.reward import ScoreModel
from llama2_jax.rl.ppo_update import Learners, PPOConfig, Programs, build
from llama2_jax.rl.rollout import Rewards, Rollout, by_oracle, open_rewards
from llama2_jax.runtime import say
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.toy.oracle import Oracle
from llama2_jax.train.devices import check_mesh, describe_mesh

# What a resumed run may change, as no result depends on it beyond rounding.
MAY_CHANGE = (
    *('mesh', 'compute.remat', 'compute.attention', 'decode_batch', 'rewards.batch_size'),
    *('iterations', 'checkpoint_every', 'keep_last', 'alarms', 'patience'),
)
Judge = Callable[[Sequence[Rollout]], list[float]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a run works with, and does not change but for the engine's weights."""

    config: PPOConfig
    path: Path
    mesh: Mesh
    data: PromptData
    engine: Engine
    rewards: Rewards
    judge: Judge | None
    programs: Programs
    reference: Llama
    dtype: str


def policy(stage: Stage, learners: Learners) -> Llama:
    """The policy as a model of its own."""
    params, lora = learners.policy.params, stage.config.lora
    return merge(stage.reference, params, lora) if lora.rank else params


def begin(stage: Stage) -> Learners:
    """Learners before the first step: the policy is the reference, the value model the reward model's trunk with a head of 0."""
    config = stage.config
    if config.lora.rank:
        params = jax.jit(lambda key: make_adapters(stage.engine.config, config.lora, key))(jax.random.key(config.seed))
    else:
        params, _ = load_model(config.init_from, 'float32')
    if not config.has_value:
        return stage.programs.init(params, None)
    value, _ = load_score_model(config.value_from or config.rewards.helpfulness, 'float32')
    return stage.programs.init(params, silent(value))


def silent(value: ScoreModel) -> ScoreModel:
    """The model with a head of 0: whitened rewards have a mean of 0, so this is the best guess of who knows nothing."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if parameter_name(path) == 'score_D' else leaf, value
    )


def open_stage(config: PPOConfig, workdir: str) -> Stage:
    """Checks everything, opens the workdir, and lays the models out."""
    check_inputs(config, 'init_from', 'rewards.helpfulness', 'rewards.safety')
    check_judge(config)
    models = {'init_from': config.init_from} | config.rewards.models
    models |= {'judge': config.judge} if config.judge not in ('', 'oracle') else {}
    tokenizer = common_tokenizer(models)
    mesh = set_mesh(config.mesh)
    source, value = open_model(config.init_from), open_model(config.value_from or config.rewards.helpfulness)
    check(config, source.config, value.config, mesh)
    data = PromptData(config.prompts, tokenizer, batch_size=config.batch_size // config.samples, seed=config.seed)
    path, begun = open_run(workdir, config, MAY_CHANGE, ('checkpoints/[0-9]*', 'rollouts/*.jsonl'))
    made = made_from.of_models(models | {'value_from': config.value_from})
    record_inputs(path, made | made_from.of_mixture('prompts.mixture', config.prompts.mixture), begun)
    compute = config.compute.on(jax.default_backend())
    rewards = open_rewards(config.rewards, tokenizer)
    reference, _ = load_model(config.init_from, compute.dtype)
    say(f'{data}\n{config.iterations:,} iterations of {config.updates} steps, {describe_mesh(mesh)}')
    return Stage(
        config, path, mesh, data,
        engine=Engine(reference, tokenizer, batch_size=config.decode_batch, dtype=compute.dtype),
        rewards=rewards,
        judge=make_judge(config),
        programs=build(config, source.config, value.config, compute),
        reference=reference,
        dtype=compute.dtype,
    )  # fmt: skip


def check(config: PPOConfig, model: ModelConfig, value: ModelConfig, mesh: Mesh) -> None:
    """Raises a UserError where models, mesh and config do not go together."""
    shapes = ('init_from', model), ('value_from', value)
    check_room(config.prompts.longest, config.max_new_tokens, shapes)
    for _, shape in shapes:
        check_mesh(mesh, shape, config.minibatch_size, 1, config.length)


def check_judge(config: PPOConfig) -> None:
    """Raises a UserError where the oracle is to judge answers to prompts of another world than the toy one."""
    if config.judge == 'oracle':
        check_toy('judge=oracle', config.prompts.mixture, 'set judge= to nothing or to a reward model')


def make_judge(config: PPOConfig) -> Judge | None:
    """Somebody who has no part in the reward: the toy world's oracle, another reward model, or nobody."""
    if not config.judge:
        return None
    if config.judge == 'oracle':
        oracle = Oracle()
        return lambda rollouts: [by_oracle(oracle, rollout).quality for rollout in rollouts]
    scorer = open_scorer(config.judge, config.rewards.batch_size)
    return lambda rollouts: scorer.score([[*rollout.prompt.token_ids, *rollout.token_ids] for rollout in rollouts]).tolist()
