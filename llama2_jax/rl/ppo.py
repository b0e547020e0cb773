"""PPO (paper p15-16; recipe F.3) in one file, to be read from top to bottom.

Config → the two compiled programs (`prepare` turns a batch of answers into minibatches with advantages, `update` takes one step)
→ what a run works with → one iteration (sample, score, compute advantages, update) → evaluation → the loop. The arithmetic is in
`ops/returns.py`, sampling and rewards in `rollout.py`, alarms and figures in `monitors.py`.

The process may be killed at any moment. Answers are written to rollouts/ as soon as they are scored, so a kill loses only the
updates since the last checkpoint, and these are repeated from the same answers, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax.sharding import Mesh

from llama2_jax import made_from
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_model, load_with_score, open_model
from llama2_jax.config import SEED, Config, LanguageModel, ModelConfig, Names, RewardModel, UserError, between, resumable
from llama2_jax.data.prompts import Prompt, PromptConfig, PromptData
from llama2_jax.inference.engine import Engine
from llama2_jax.inputs import check_inputs, check_room, common_tokenizer
from llama2_jax.mesh import MeshConfig, replicate, reshard, set_mesh
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.model.lora import Adapters, LoraConfig, make_adapters, merge, with_adapters
from llama2_jax.model.reward import ScoreModel, zero_head
from llama2_jax.ops import returns
from llama2_jax.rl import monitors, rewards, rollout
from llama2_jax.rl.rewards import Rewards, RewardsConfig
from llama2_jax.rl.rollout import Rollout
from llama2_jax.runtime import barrier, compiler_options, log
from llama2_jax.runtime.hosts import Watch
from llama2_jax.runtime.workdir import open_run, record_inputs, report_disk_full
from llama2_jax.train.checkpoint import Checkpoints
from llama2_jax.train.devices import check_mesh, describe_mesh, to_mesh
from llama2_jax.train.loop import Interruption, leave
from llama2_jax.train.metrics import Meter, Progress, Report, read_metrics
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama2_jax.train.step import Batch, State, init_state, microbatches, minimise

HEADLINE = ('score', 'kl', 'heldout/score', 'heldout/judge')
SHOWN = 12  # answers in a section of samples.md
GAMMA, LAMBDA = 1.0, 0.95  # of the advantages; not in the paper (recipe K)
KL_HORIZON = 10_000  # answers over which beta adapts (Ziegler et al., 2019)
KEPT = 2  # checkpoints


@dataclasses.dataclass(frozen=True)
class PPOConfig(Config):
    """A PPO run with the paper's settings (p15-16; recipe F.3). Values that the paper omits are marked "not in the paper".

    Attributes:
      init_from: Initial policy, which is also the reference. For a dry run a size such as '7b' is enough.
      value_from: Reward model that initialises the value model, under a zero head; '': `rewards.helpfulness`, else
        `rewards.safety`, else the policy. Not in the paper.
      rewards: Reward models or a function, and how their numbers become one score.
      prompts: Prompts to answer.
      optimizer: Policy optimizer: constant 1e-6.
      value_optimizer: Not in the paper; the learning rate of InstructGPT's smaller models.
      lora: Trains adapters beside the reference in place of the whole policy.
      iterations: Maximum number of iterations; the paper's 200 to 400.
      batch_size, minibatch_size: Answers of an iteration, and of one step; each answer is used once.
      max_new_tokens: Answers are truncated there. Not in the paper.
      temperature: Of sampling and of the log-probabilities. Not in the paper.
      samples: Answers to each prompt of a batch.
      advantages: 'gae': from a value model (PPO). 'rloo', 'grpo': an answer relative to the others of its prompt, no value model.
      beta: Cost of a nat of KL: 0.01 for 7B and 13B, 0.005 for 34B and 70B.
      kl_target: Nats of KL per answer towards which beta is adapted (Ziegler et al., 2019); 0: beta is fixed. Not in the paper.
      clip: Clipping range of the policy's ratio, 0.2, and of the value, where it is not in the paper.
      decode_batch: Answers sampled at a time.
      eval_every: Iterations between evaluations on held-out prompts; the best policy becomes the model.
      eval_prompts: Number of held-out prompts.
      patience: Stops after this many evaluations without a better one; 0: never.
      judge: Judges held-out answers for the reward-hacking alarm: 'oracle' (the toy world's), a reward model, or ''.
      alarms: Reaction to signs of collapse or reward hacking.
      checkpoint_every: Iterations between checkpoints; answers sampled since are kept besides.
      seed: Random seed.
    """

    init_from: LanguageModel = ''
    value_from: RewardModel = ''
    rewards: RewardsConfig = RewardsConfig()
    prompts: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-6, final_lr=1.0, warmup_steps=0)
    value_optimizer: OptimizerConfig = OptimizerConfig(peak_lr=9e-6, final_lr=1.0, warmup_steps=0)
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = resumable(MeshConfig())
    lora: LoraConfig = LoraConfig()
    iterations: int = between(400, 1, resumable='alone')
    batch_size: int = between(512, 1)
    minibatch_size: int = between(64, 1)
    max_new_tokens: int = between(1024, 1)
    temperature: float = between(1.0, 1e-3, 100)
    samples: int = between(1, 1)
    advantages: Literal['gae', 'rloo', 'grpo'] = 'gae'
    beta: float = 0.01
    kl_target: float = 0.0
    clip: float = 0.2
    decode_batch: int = between(128, 1, resumable='anywhere')
    eval_every: int = between(10, 1)
    eval_prompts: int = between(256, 1)
    patience: int = resumable(0, 'alone')
    judge: Annotated[str, Names('model', 'reward model', ('oracle',))] = ''
    alarms: Literal['warn', 'stop'] = resumable('warn')
    checkpoint_every: int = between(10, 1, resumable='anywhere')
    seed: int = SEED

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('minibatch_size', 'samples'):
            if self.batch_size % getattr(self, name):
                raise UserError(f'batch_size={self.batch_size} is not a multiple of {name}={getattr(self, name)}.')
        if self.samples < 2 and not self.has_value:
            raise UserError(f'advantages={self.advantages} compares answers to a prompt: samples must be at least 2.')

    @property
    def has_value(self) -> bool:
        """Whether there is a value model."""
        return self.advantages == 'gae'

    @property
    def value_model(self) -> str:
        """What initialises the value model."""
        return self.value_from or self.rewards.helpfulness or self.rewards.safety or self.init_from

    @property
    def length(self) -> int:
        """Maximum tokens of a prompt with its answer: the length of rows."""
        return self.prompts.longest + self.max_new_tokens

    @property
    def updates(self) -> int:
        """Steps of an iteration."""
        return self.batch_size // self.minibatch_size


class Learners(NamedTuple):
    """All that learns. The reference never does: it is the initial policy, in the compute dtype."""

    policy: State  # of a Llama, or of adapters beside the reference
    value: State | None  # of a ScoreModel


class Programs(NamedTuple):
    """The compiled functions.

    Attributes:
      abstract: `Learners` without values.
      init: (policy's parameters, value model or None) -> learners before the first step; donates its arguments.
      prepare: (learners, (reference, beta, batch)) -> (minibatches, figures); see `make_prepare`.
      update: (learners, (reference, minibatch)) -> (learners, figures); donates the learners.
    """

    abstract: Learners
    init: Callable
    prepare: Callable
    update: Callable


def build(config: PPOConfig, model: ModelConfig, value: ModelConfig, compute: ComputeConfig) -> Programs:
    """The programs for the shapes of policy and value model; a mesh must be set."""
    steps = config.iterations * config.updates
    optimizers = [make_optimizer(optimizer, steps) for optimizer in (config.optimizer, config.value_optimizer)]

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
        update=jax.jit(make_update(config, compute, optimizers), donate_argnums=0, compiler_options=options),
    )


def policy_model(config: PPOConfig, params: Llama | Adapters, reference: Llama) -> Llama:
    """The policy: the parameters themselves, or the reference with them as its adapters."""
    return with_adapters(reference if config.lora.rank else None, params, config.lora)


def log_probs(config: PPOConfig, compute: ComputeConfig, model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each target and the entropy there, both [b, L], at the temperature of sampling."""
    return model.log_probs(model(batch['inputs'], None, compute), batch['targets'], config.temperature)


def make_prepare(config: PPOConfig, compute: ComputeConfig) -> Callable:
    """The function that turns a batch of answers into minibatches with advantages.

    Old log-probabilities come from the forward pass that `update` differentiates, not from the engine, so the first ratio is 1
    whatever rounding decoding has; the figure `engine_gap` is the largest difference from the engine's.
    """

    def prepare(learners: Learners, given: tuple[Llama, jax.Array, Batch]) -> tuple[tuple[Batch, ...], dict[str, jax.Array]]:
        reference, beta, batch = given
        policy = policy_model(config, learners.policy.params, reference)
        parts = {
            'inputs': reshard(batch['tokens'][:, :-1], 'BL'),
            'targets': reshard(batch['tokens'][:, 1:], 'BL'),
            'mask': reshard(batch['answer'][:, 1:].astype(jnp.float32), 'BL'),
            'engine': reshard(batch['logprobs'][:, 1:], 'BL'),
            'score': returns.whiten(batch['score']),
        }

        def read(part: Batch) -> Batch:
            logprob, entropy = log_probs(config, compute, policy, part)
            anchor, _ = log_probs(config, compute, reference, part)
            found = {'logprob': logprob, 'entropy': entropy, 'anchor': anchor}
            if learners.value is not None:
                found['old'] = learners.value.params(part['inputs'], None, compute)
            return found

        # From here on arrays are [N, b, L]: N minibatches of b answers.
        parts = microbatches(parts, config.updates)
        found = {name: reshard(x, 'NBM') for name, x in jax.lax.map(read, parts).items()}
        mask, engine = reshard(parts['mask'], 'NBM'), reshard(parts['engine'], 'NBM')
        kl = returns.k1(found['logprob'], found['anchor'])
        reward = jax.vmap(returns.token_rewards, (0, 0, 0, None))(parts['score'], kl, mask, beta)
        data = {name: parts[name] for name in ('inputs', 'targets', 'mask')} | {'logprob': found['logprob']}
        statistics = monitors.batch_statistics(found, kl, mask, engine)
        if config.has_value:
            estimate = jax.vmap(partial(returns.advantages, gamma=GAMMA, lam=LAMBDA))
            advantage, target = estimate(reward, found['old'], mask)
            data |= {'advantage': returns.whiten(advantage, mask), 'old': found['old'], 'return': target}
            statistics |= monitors.value_statistics(found['old'], target, mask)
        else:
            # [b, N] is the order of the batch, in which the answers to a prompt are neighbours.
            earned = replicate(reward.sum(axis=-1)).swapaxes(0, 1)
            relative = returns.group_advantages(earned.reshape(-1, config.samples), scaled=config.advantages == 'grpo')
            data['advantage'] = mask * reshard(relative.reshape(earned.shape).swapaxes(0, 1), 'NB')[..., None]
        data = {name: reshard(x, 'NBL') for name, x in data.items()}
        return tuple({name: x[i] for name, x in data.items()} for i in range(config.updates)), statistics

    return prepare


def make_update(config: PPOConfig, compute: ComputeConfig, optimizers: Sequence[optax.GradientTransformation]) -> Callable:
    """The function that takes one step of policy and value model. Losses are means over the answers' tokens of the minibatch."""

    def update(learners: Learners, given: tuple[Llama, Batch]) -> tuple[Learners, dict[str, jax.Array]]:
        reference, batch = given
        mean = partial(returns.masked_mean, mask=batch['mask'])

        def policy_loss(params: Llama | Adapters):
            logprob, _ = log_probs(config, compute, policy_model(config, params, reference), batch)
            loss, ratio, clipped = returns.policy_loss(logprob, batch['logprob'], batch['advantage'], config.clip)
            error = jnp.max(batch['mask'] * jnp.abs(ratio - 1))
            return mean(loss), {'ratio': mean(ratio), 'ratio_error': error, 'clipped': mean(clipped)}

        def value_loss(params: ScoreModel):
            value = params(batch['inputs'], None, compute)
            loss, clipped = returns.value_loss(value, batch['old'], batch['return'], config.clip)
            return mean(loss), {'clipped': mean(clipped)}

        policy, found = minimise(policy_loss, learners.policy, optimizers[0])
        statistics = {f'policy/{name}': x for name, x in found.items()}
        if learners.value is None:
            return Learners(policy, None), statistics
        value, found = minimise(value_loss, learners.value, optimizers[1])
        return Learners(policy, value), statistics | {f'value/{name}': x for name, x in found.items()}

    return update


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a run works with; only the engine's weights change."""

    config: PPOConfig
    path: Path
    mesh: Mesh
    data: PromptData
    engine: Engine
    rewards: Rewards
    judge: monitors.Judge | None
    programs: Programs
    reference: Llama
    dtype: str

    def policy(self, learners: Learners) -> Llama:
        """The policy as a model of its own."""
        params, lora = learners.policy.params, self.config.lora
        return merge(self.reference, params, lora) if lora.rank else params


def open_stage(config: PPOConfig, workdir: str) -> Stage:
    """Checks the config and all that it names, opens the workdir, loads the models.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir.
    """
    check_inputs(config, 'init_from')
    rewards.check(config.rewards)
    monitors.check_judge(config.judge, config.prompts.mixture)
    models = {'init_from': config.init_from} | config.rewards.models
    models |= {'judge': config.judge} if config.judge not in ('', 'oracle') else {}
    tokenizer = common_tokenizer(models)
    mesh = set_mesh(config.mesh)
    source, value = open_model(config.init_from), open_model(config.value_model)
    check_shapes(config, source.config, value.config, mesh)
    data = PromptData(config.prompts, tokenizer, batch_size=config.batch_size // config.samples, seed=config.seed)
    path, begun = open_run(workdir, config, ('checkpoints/[0-9]*', 'rollouts/*.jsonl'))
    made = made_from.of_models(models | {'value_from': config.value_from}) | rewards.made_of(config.rewards)
    record_inputs(path, made | made_from.of_mixture('prompts.mixture', config.prompts.mixture), begun)
    compute = config.compute.on(jax.default_backend())
    scores = rewards.open_rewards(config.rewards, tokenizer)
    reference, _ = load_model(config.init_from, compute.dtype)
    log(f'{data}\n{config.iterations:,} iterations of {config.updates} steps, {describe_mesh(mesh)}')
    return Stage(
        config, path, mesh, data,
        engine=Engine(reference, tokenizer, batch_size=config.decode_batch, dtype=compute.dtype),
        rewards=scores,
        judge=monitors.make_judge(config.judge, config.rewards.batch_size),
        programs=build(config, source.config, value.config, compute),
        reference=reference,
        dtype=compute.dtype,
    )  # fmt: skip


def check_shapes(config: PPOConfig, model: ModelConfig, value: ModelConfig, mesh: Mesh) -> None:
    """Raises a UserError where models, mesh and config do not go together."""
    shapes = ('init_from', model), ('value_from', value)
    check_room(config.prompts.longest, config.max_new_tokens, shapes)
    for _, shape in shapes:
        check_mesh(mesh, shape, config.minibatch_size, 1, config.length)


def initial_learners(stage: Stage) -> Learners:
    """Learners before the first step: the policy is the reference; the value model is a trunk under a head of zeros."""
    config = stage.config
    if config.lora.rank:
        params = jax.jit(lambda key: make_adapters(stage.engine.config, config.lora, key))(jax.random.key(config.seed))
    else:
        params, _ = load_model(config.init_from, 'float32')
    if not config.has_value:
        return stage.programs.init(params, None)
    return stage.programs.init(params, zero_head(load_with_score(config.value_model, config.seed)))


def iterate(stage: Stage, learners: Learners, beta: float, number: int) -> tuple[Learners, dict[str, float]]:
    """One iteration: sample answers, score them, compute advantages, take a step on each minibatch."""
    clock = monitors.Clock()
    rollouts = roll_out(stage, learners, number, clock)
    batch = to_mesh(rollout.pad_rollouts(rollouts, stage.config.length), stage.mesh)
    minibatches, statistics = stage.programs.prepare(learners, (stage.reference, np.float32(beta), batch))
    statistics = jax.device_get(statistics)
    clock.lap('prepare')
    base_model, steps = stage.reference if stage.config.lora.rank else None, []
    for minibatch in minibatches:
        learners, found = stage.programs.update(learners, (base_model, minibatch))
        steps.append(found)
    steps = jax.device_get(steps)
    clock.lap('update')
    trained = monitors.mean_of_steps(steps, number, stage.path)
    tokens = sum(len(answer.token_ids) for answer in rollouts)
    line = rollout.figures(rollouts) | {name: float(value) for name, value in statistics.items()} | trained
    return learners, line | clock.figures(tokens) | {'memory_gb': monitors.peak_memory()}


def roll_out(stage: Stage, learners: Learners, number: int, clock: monitors.Clock) -> list[Rollout]:
    """The scored answers of an iteration; those of a run that was killed are read back."""
    config, path = stage.config, stage.path / 'rollouts' / f'{number:06}.jsonl'
    if path.exists():
        return rollout.read_rollouts(path)
    stage.engine.load(stage.policy(learners))
    clock.lap('reshard')
    rollouts = sample_and_score(stage, stage.data.batch(number - 1), config.samples, f'{config.seed} {number}', clock)
    rollout.write_rollouts(path, rollouts)
    return rollouts


def sample_and_score(stage: Stage, prompts: Sequence[Prompt], samples: int, seed: str, clock: monitors.Clock) -> list[Rollout]:
    """Scored answers of the engine's policy, `samples` neighbours for each prompt."""
    config = stage.config
    settings = {'max_new_tokens': config.max_new_tokens, 'temperature': config.temperature, 'seed': seed, 'count': samples}
    sampled = rollout.sample_answers(stage.engine, prompts, **settings)
    answers = [(prompt, sample) for prompt, drawn in sampled for sample in drawn]
    clock.lap('generate')
    rollouts = stage.rewards(answers)
    clock.lap('score')
    return rollouts


def evaluate(
    stage: Stage, learners: Learners, number: int, lines: Sequence[Mapping[str, Any]], report: Report
) -> dict[str, float]:
    """Scores answers to held-out prompts, sampled with the same seeds each time; saves the model if its score is the best."""
    config, clock = stage.config, monitors.Clock()
    stage.engine.load(stage.policy(learners))
    rollouts = sample_and_score(stage, stage.data.heldout[: config.eval_prompts], 1, f'{config.seed} heldout', clock)
    found = {'score_error': monitors.standard_error([one.score for one in rollouts]), **rollout.figures(rollouts)}
    if stage.judge:
        judged = stage.judge(rollouts)
        found |= {'judge': float(np.mean(judged)), 'judge_error': monitors.standard_error(judged)}
    report.sample(number, rollout.show(rollouts[:SHOWN]))
    best = monitors.best_evaluation(lines)
    if best is None or found['score'] > best['heldout/score']:
        provenance = {'stage': 'ppo', 'parent': config.init_from, 'step': number}
        save_model(stage.path / 'model', stage.policy(learners), stage.engine.tokenizer, provenance, chat=True)
    return {f'heldout/{name}': value for name, value in found.items()}


def run(config: PPOConfig, workdir: str) -> Learners:
    """Trains, or resumes, in `workdir`; `workdir/model` is the policy with the best score on held-out prompts.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir; a loss that is not finite; an alarm, if so asked.
    """
    stage = open_stage(config, workdir)
    path, checkpoints = stage.path, Checkpoints(stage.path / 'checkpoints', keep_last=KEPT, keep_best=False)
    with Watch() as watch, report_disk_full(path), checkpoints:
        learners, saved = checkpoints.restore(stage.programs.abstract) or (initial_learners(stage), {})
        beta, progress = saved.get('beta', config.beta), Progress(**saved.get('progress', {}))
        meter = Meter(0, None)
        with Interruption() as interruption, Report(path, progress, meter, config.iterations, HEADLINE) as report:
            barrier('metrics cut')
            lines = read_metrics(path / 'metrics.jsonl')
            if progress.step:
                report.log(f'Continuing from the checkpoint of iteration {progress.step}.')
            if not lines:
                lines.append({'step': 0} | evaluate(stage, learners, 0, lines, report))
                report.write(lines[0])
            for number in range(progress.step + 1, config.iterations + 1):
                if monitors.out_of_patience(lines, config.patience):
                    report.log(f'The held-out score has not risen for {config.patience} evaluations.')
                    break
                watch.at(number)
                learners, line = iterate(stage, learners, beta, number)
                last = number == config.iterations
                if number % config.eval_every == 0 or last:
                    line |= evaluate(stage, learners, number, lines, report)
                line = report.count(number, int(line['length'] * config.batch_size + 0.5)) | {'beta': beta} | line
                lines.append(line)
                report.write(line)
                monitors.raise_alarms(lines, stage.dtype, config.alarms, report.log)
                if config.kl_target:
                    beta = monitors.adaptive_beta(beta, line['kl'], config.kl_target, config.batch_size, KL_HORIZON)
                stop = interruption.reached(number)
                if stop or last or number % config.checkpoint_every == 0:
                    report.flush()
                    checkpoints.save(number, learners, {'beta': beta, 'progress': dataclasses.asdict(progress)})
                if stop:
                    leave(number, config.iterations, checkpoints, report, interruption.code)
    monitors.show_result(lines, path)
    return learners
