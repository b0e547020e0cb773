"""PPO's settings, and the two programs of an iteration: `prepare` looks at a batch, `update` learns from a minibatch."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama2_jax.config import SEED, Config, LanguageModel, ModelConfig, Names, RewardModel, UserError, between
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.mesh import MeshConfig, replicate, reshard
from llama2_jax.model.llama import Compute, Llama
from llama2_jax.model.lora import Adapters, LoraConfig, make_adapters
from llama2_jax.model.reward import ScoreModel
from llama2_jax.ops import returns
from llama2_jax.rl.rollout import RewardsConfig
from llama2_jax.runtime import compiler_options
from llama2_jax.stages.sft import whole
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama2_jax.train.step import Batch, State, descend, init_state, microbatches


@dataclasses.dataclass(frozen=True)
class PPOConfig(Config):
    """A PPO run with the paper's settings (p15-16; recipe F.3). What it is silent about is said to be so.

    Attributes:
      init_from: the policy to begin with, which is also the reference; for a dry run a size will do, such as '7b'.
      value_from: a reward model whose trunk the value model begins with, under a head of 0; '': helpfulness'. Silent.
      rewards: the reward models and how their scores become one.
      prompts: what is asked.
      optimizer: of the policy: constant 1e-6.
      value_optimizer: silent; InstructGPT's rate for its smaller models.
      lora: adapters as the policy, beside the reference.
      iterations: at most; the paper's 200 to 400.
      batch_size, minibatch_size: answers in an iteration, and in a step; each answer is learned from once.
      max_new_tokens: an answer is cut off there; silent.
      temperature: of sampling, and of the log-probabilities; silent.
      samples: answers to each prompt of a batch.
      advantages: 'gae', by a value model, as in PPO; without one, of an answer beside the others to its prompt: 'rloo' or 'grpo'.
      beta: what a nat of KL costs: 0.01 for 7B and 13B, 0.005 for 34B and 70B.
      kl_target: nats of KL an answer; where it is set, beta is adapted towards it (Ziegler et al., 2019); silent.
      kl_horizon: answers over which that happens.
      gamma, lam: of the advantages; silent.
      clip, value_clip: 0.2, and the latter silent.
      decode_batch: answers that are drawn at a time.
      eval_every: iterations between two looks at held-out prompts; the best policy of them becomes the model.
      eval_prompts: so many.
      patience: stops after so many looks without a better one; 0: never.
      judge: of held-out answers, for the alarm of reward hacking: 'oracle' (the toy world's), a reward model, or ''.
      alarms: what a sign of collapse or hacking does.
      checkpoint_every: iterations; what was sampled since is kept besides, so that a kill loses updates alone.
    """

    init_from: LanguageModel = ''
    value_from: RewardModel = ''
    rewards: RewardsConfig = RewardsConfig()
    prompts: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-6, final_lr=1.0, warmup_steps=0)
    value_optimizer: OptimizerConfig = OptimizerConfig(peak_lr=9e-6, final_lr=1.0, warmup_steps=0)
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()
    lora: LoraConfig = LoraConfig()
    iterations: int = between(400, 1)
    batch_size: int = between(512, 1)
    minibatch_size: int = between(64, 1)
    max_new_tokens: int = between(1024, 1)
    temperature: float = between(1.0, 1e-3, 100)
    samples: int = between(1, 1)
    advantages: Literal['gae', 'rloo', 'grpo'] = 'gae'
    beta: float = 0.01
    kl_target: float = 0.0
    kl_horizon: int = between(10_000, 1)
    gamma: float = between(1.0, 0, 1)
    lam: float = between(0.95, 0, 1)
    clip: float = 0.2
    value_clip: float = 0.2
    decode_batch: int = between(128, 1)
    eval_every: int = between(10, 1)
    eval_prompts: int = between(256, 1)
    patience: int = 0
    judge: Annotated[str, Names('model', 'reward model', ('oracle',))] = ''
    alarms: Literal['warn', 'stop'] = 'warn'
    checkpoint_every: int = between(10, 1)
    keep_last: int = between(2, 1)
    seed: int = SEED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.minibatch_size:
            raise UserError(f'batch_size={self.batch_size} is not a multiple of minibatch_size={self.minibatch_size}.')
        if self.batch_size % self.samples:
            raise UserError(f'batch_size={self.batch_size} is not a multiple of samples={self.samples}.')
        if self.samples < 2 and not self.has_value:
            raise UserError(f'advantages={self.advantages} compares answers to a prompt: samples must be at least 2.')

    @property
    def has_value(self) -> bool:
        """Whether there is a value model."""
        return self.advantages == 'gae'

    @property
    def length(self) -> int:
        """Tokens of a prompt with its answer, at most: the length of rows (on TPUs attention wants a multiple of 128)."""
        return self.prompts.longest + self.max_new_tokens

    @property
    def updates(self) -> int:
        """Steps in an iteration."""
        return self.batch_size // self.minibatch_size


class Learners(NamedTuple):
    """All that learns. The reference never does: it is the policy as it was, in the compute dtype."""

    policy: State  # of a Llama, or of adapters beside the reference
    value: State | None  # of a ScoreModel


class Programs(NamedTuple):
    """The compiled functions.

    Attributes:
      abstract: `Learners` without values.
      init: (policy's parameters, value model or None) -> learners before the first step; uses its arguments up.
      prepare: (learners, (reference, beta, batch)) -> (minibatches, figures); see `make_prepare`.
      update: (learners, (reference, minibatch)) -> (learners, figures); uses the learners up.
    """

    abstract: Learners
    init: Callable
    prepare: Callable
    update: Callable


def build(config: PPOConfig, model: ModelConfig, value: ModelConfig, compute: Compute) -> Programs:
    """The programs for the shapes of policy and value model; a mesh must be set."""
    optimizers = [
        make_optimizer(optimizer, config.iterations * config.updates) for optimizer in (config.optimizer, config.value_optimizer)
    ]

    def init(policy: Llama | Adapters, value: ScoreModel | None) -> Learners:
        return Learners(init_state(policy, optimizers[0]), init_state(value, optimizers[1]) if config.has_value else None)

    def abstract() -> Learners:
        key = jax.random.key(0)
        policy = make_adapters(model, config.lora, key) if config.lora.rank else Llama(model, key)
        return init(policy, ScoreModel(value, key) if config.has_value else None)

    options = compiler_options(jax.devices()[0])
    return Programs(
        abstract=jax.eval_shape(abstract),
        init=jax.jit(init, donate_argnums=(0, 1)),
        prepare=jax.jit(make_prepare(config, compute), compiler_options=options),
        update=jax.jit(make_update(config, compute, *optimizers), donate_argnums=0, compiler_options=options),
    )


def policy_of(config: PPOConfig, params: Llama | Adapters, reference: Llama) -> Llama:
    """The policy: the parameters themselves, or the reference with them as its adapters."""
    return whole(reference, params, config.lora) if config.lora.rank else params


def log_probs(config: PPOConfig, compute: Compute, model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of each target its log-probability and the entropy there, at the temperature of sampling."""
    return model.log_probs(model(batch['inputs'], None, compute), batch['targets'], config.temperature)


def make_prepare(config: PPOConfig, compute: Compute) -> Callable:
    """The function that makes minibatches of a batch of answers.

    Old log-probabilities come from here and not from the engine: the same forward pass that `update` differentiates gives them,
    so the first ratio is 1 whatever rounding decoding has; how far the engine's are from them is among the figures.
    """

    def prepare(learners: Learners, given: tuple[Llama, jax.Array, Batch]) -> tuple[tuple[Batch, ...], dict[str, jax.Array]]:
        reference, beta, batch = given
        current = policy_of(config, learners.policy.params, reference)
        parts = {
            'inputs': reshard(batch['tokens'][:, :-1], 'BL'),
            'targets': reshard(batch['tokens'][:, 1:], 'BL'),
            'mask': reshard(batch['answer'][:, 1:].astype(jnp.float32), 'BL'),
            'engine': reshard(batch['logprobs'][:, 1:], 'BL'),
            'score': returns.whiten(batch['score']),
        }

        def look(part: Batch) -> Batch:
            policy, entropy = log_probs(config, compute, current, part)
            anchor, _ = log_probs(config, compute, reference, part)
            seen = {'logprob': policy, 'entropy': entropy, 'anchor': anchor}
            return seen | {'old': learners.value.params(part['inputs'], None, compute)} if config.has_value else seen

        parts = microbatches(parts, config.updates)
        seen = {name: reshard(x, 'NBM') for name, x in jax.lax.map(look, parts).items()}
        mask, engine = reshard(parts['mask'], 'NBM'), reshard(parts['engine'], 'NBM')
        kl = returns.k1(seen['logprob'], seen['anchor'])
        reward = jax.vmap(returns.token_rewards, (0, 0, 0, None))(parts['score'], kl, mask, beta)
        learned = {name: parts[name] for name in ('inputs', 'targets', 'mask')} | {'logprob': seen['logprob']}
        figures = look_at(seen, kl, mask, engine)
        if config.has_value:
            estimate = jax.vmap(partial(returns.advantages, gamma=config.gamma, lam=config.lam))
            advantage, target = estimate(reward, seen['old'], mask)
            learned |= {'advantage': returns.whiten(advantage, mask), 'old': seen['old'], 'return': target}
            figures |= look_at_values(seen['old'], target, mask)
        else:
            # [rows of a microbatch, microbatches] is the order of the batch, where a prompt's answers lie together.
            earned = replicate(reward.sum(axis=-1)).swapaxes(0, 1)
            apart = returns.group_advantages(earned.reshape(-1, config.samples), scaled=config.advantages == 'grpo')
            learned['advantage'] = mask * reshard(apart.reshape(earned.shape).swapaxes(0, 1), 'NB')[..., None]
        learned = {name: reshard(x, 'NBL') for name, x in learned.items()}
        minibatches = tuple({name: x[i] for name, x in learned.items()} for i in range(config.updates))
        return minibatches, figures

    return prepare


def look_at(seen: Mapping[str, jax.Array], kl: jax.Array, mask: jax.Array, engine: jax.Array) -> dict[str, jax.Array]:
    """What there is to say of a batch before it is learned from; KL is in nats an answer."""
    mean = partial(returns.masked_mean, mask=mask)
    answers = (kl * mask).sum(axis=-1)
    return {
        'kl': answers.mean(),
        'kl_error': answers.std() / answers.size**0.5,
        'k3': (returns.k3(seen['logprob'], seen['anchor']) * mask).sum(axis=-1).mean(),
        'entropy': mean(seen['entropy']),
        'engine_gap': jnp.max(mask * jnp.abs(seen['logprob'] - engine)),
    }


def look_at_values(value: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """How well the value model foretells what comes."""
    unexplained = _variance(target - value, mask) / jnp.maximum(_variance(target, mask), 1e-8)
    return {'value': returns.masked_mean(value, mask), 'explained_variance': 1 - unexplained}


def _variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    return returns.masked_mean((x - returns.masked_mean(x, mask)) ** 2, mask)


def make_update(
    config: PPOConfig,
    compute: Compute,
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
) -> Callable:
    """The function that takes one step of policy and value model. Losses are means over the answers' tokens of the minibatch."""

    def update(learners: Learners, given: tuple[Llama, Batch]) -> tuple[Learners, dict[str, jax.Array]]:
        reference, batch = given
        mean = partial(returns.masked_mean, mask=batch['mask'])

        def policy_loss(params: Llama | Adapters):
            logprob, _ = log_probs(config, compute, policy_of(config, params, reference), batch)
            loss, ratio, clipped = returns.policy_loss(logprob, batch['logprob'], batch['advantage'], config.clip)
            error = jnp.max(batch['mask'] * jnp.abs(ratio - 1))
            return mean(loss), {'ratio': mean(ratio), 'ratio_error': error, 'clipped': mean(clipped)}

        def value_loss(params: ScoreModel):
            value = params(batch['inputs'], None, compute)
            loss, clipped = returns.value_loss(value, batch['old'], batch['return'], config.value_clip)
            return mean(loss), {'clipped': mean(clipped)}

        policy, moved = learn(policy_loss, learners.policy, policy_optimizer)
        figures = {f'policy/{name}': x for name, x in moved.items()}
        if not config.has_value:
            return Learners(policy, None), figures
        value, moved = learn(value_loss, learners.value, value_optimizer)
        return Learners(policy, value), figures | {f'value/{name}': x for name, x in moved.items()}

    return update


def learn(objective: Callable, state: State, optimizer: optax.GradientTransformation) -> tuple[State, dict[str, jax.Array]]:
    """One step down an objective, parameters -> (loss, figures); nothing moves where it is not finite."""
    (loss, figures), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    state, moved = descend(state, loss, gradients, optimizer)
    return state, figures | moved
