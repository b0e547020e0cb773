"""Reward models for helpfulness and safety from comparisons: a config, a batch, a loss, and `fit` (paper p10-12; recipe E)."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax import made_from
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_with_score, open_model, shape_of, tokenizer_of
from llama2_jax.config import AnyModel, ModelConfig, Names, UserError, between, resumable
from llama2_jax.data.comparisons import RATINGS
from llama2_jax.data.preferences import UNKNOWN, PreferenceConfig, PreferenceData
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.evals.measure import wilson
from llama2_jax.inference.scorer import Scorer
from llama2_jax.inputs import check_inputs
from llama2_jax.mesh import BATCH_AXES, reshard, set_mesh
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.model.reward import ScoreModel, scores_at
from llama2_jax.ops.ranking import ranking_loss, safety_loss
from llama2_jax.planning import aot
from llama2_jax.runtime import compiler_options, log
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.stages.training import (
    DRY_STEPS,
    TrainingConfig,
    compile_stage,
    data_share,
    first_state,
    train_stage,
    write_example,
)
from llama2_jax.text.dialog import encode_dialog
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.devices import check_mesh, describe_mesh, to_mesh
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from llama2_jax.train.step import Batch, State, init_state, make_step, microbatches

REFERENCES = 1000  # answers whose scores are taken for the shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """A reward model with the paper's settings (p12).

    Attributes:
      init_from: Chat model of any format, or a reward model to train further; a dry run takes a size, too.
      data: Sources of comparisons.
      margin: Margin between the scores, by rating: none, small or large (p52 Table 27).
      safety_weight: Weight of the auxiliary loss that separates safe from unsafe answers; 0: none.
      center: Shifts the scores so that reference answers have mean 0. Not with the auxiliary loss, which gives 0 a meaning.
      reference: Source of dialogs whose last answers are the reference; '' takes chosen answers of the training pairs.
      batch_size: Pairs in the global batch.
      length: Tokens in a row, which holds whole pairs; an answer may have half of it with its prompt, or the model's context.
    """

    init_from: AnyModel = ''
    data: PreferenceConfig = PreferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-5, warmup_steps=5, warmup_share=0.03)
    margin: Literal['none', 'small', 'large'] = 'small'
    safety_weight: float = 0.0
    center: bool = resumable(True, 'alone')
    reference: Annotated[str, Names('source', 'dialogs')] = resumable('', 'alone')
    batch_size: int = between(512, 1)
    length: int = between(8192, 1)


def run(config: RewardConfig, workdir: str) -> State:
    """Trains, or continues, in `workdir`, and writes `workdir/model`.

    Raises:
      UserError: any mistake in the config, the model, the data or the workdir.
    """
    check_inputs(config, 'init_from')
    mesh = set_mesh(config.mesh)
    source = open_model(config.init_from)
    shards = check(config, source.config, mesh)
    tokenizer = tokenizer_of(source)
    path, started = open_run(workdir, config)
    record_inputs(path, made_from.of_tuning(config.init_from, config.data.mixture), started)
    data = PreferenceData(
        config.data,
        tokenizer,
        length=config.length,
        context=source.config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        shards=shards,
        **data_share(),
    )
    check_labels(config, data)
    log(f'{data.steps:,} steps of {data.rows} rows, {describe_mesh(mesh)}\n{data.table()}')
    if not started:
        write_example(path, show_example(next(data.train()), tokenizer))
    compute = config.compute.on(jax.default_backend())
    abstract, step = build(config, source.config, compute, data.steps)

    def init() -> State:
        return first_state(config, data.steps, load_with_score(config.init_from, config.seed))

    state = train_stage(
        config,
        path,
        mesh,
        data,
        abstract=abstract,
        init=init,
        step=step,
        flops=flops_per_token(config, source.config) * data.rows * config.length,
        evaluate=make_evaluate(data, mesh, heldout_sums(config, compute), config.eval_batches),
    )
    scores = reference_scores(config, data, Scorer(state.params, tokenizer, mesh=mesh, dtype=compute.dtype))
    provenance = {'stage': 'reward_model', 'parent': config.init_from, 'step': data.steps, 'scores': scores}
    save_model(path / 'model', state.params, tokenizer, provenance, chat=True)
    log(f'The model is in {path / "model"}. Reference answers scored {scores["mean"]:.3f} ± {scores["std"]:.3f}.')
    return state


def dry_run(config: RewardConfig, topology: str | None) -> aot.Report:
    """Compiles the step and reports its cost; arguments and errors as of `compile_stage`.

    As if every pair filled a row, although a run packs several pairs into one.
    """
    model = shape_of(config.init_from or 'tiny')

    def program(mesh: Mesh, compute: ComputeConfig) -> tuple:
        shards = check(config, model, mesh)
        rows = -(-config.batch_size // shards) * shards
        batch = abstract_pairs(mesh, rows, config.length, 1, rating=((), jnp.int32), safe=((2,), jnp.int32))
        state, step = build(config, model, compute, DRY_STEPS)
        return step, state, batch, rows * config.length, flops_per_token(config, model) * rows * config.length

    return compile_stage(config, topology, program)


def abstract_pairs(mesh: Mesh, rows: int, length: int, slots: int, **more: tuple) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of comparisons without its values.

    Args:
      mesh: Devices that hold the rows.
      rows, length, slots: R rows of L tokens that hold up to S pairs each.
      **more: Arrays of the pairs, as (shape of each pair's entry, dtype).
    """
    more = {'last': ((2,), jnp.int32), 'weights': ((), jnp.float32)} | more
    shapes = {'tokens': ((rows, length), jnp.int32), 'segment_ids': ((rows, length), jnp.int32)}
    shapes |= {name: ((rows, slots, *shape), dtype) for name, (shape, dtype) in more.items()}
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()}


def check(config: TrainingConfig, model: ModelConfig, mesh: Mesh) -> int:
    """What the rows of a batch must be a multiple of.

    Raises:
      UserError: model, mesh and config do not go together.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) * config.accumulation
    check_mesh(mesh, model, shards, config.accumulation, config.length)
    return shards


def check_labels(config: RewardConfig, data: PreferenceData) -> None:
    """Raises a UserError where the auxiliary loss is asked for and no pair says which of its answers is safe."""
    if config.safety_weight and all((source.records.pairs['safe'] == UNKNOWN).all() for source in data.sources):
        raise UserError(
            f'safety_weight={config.safety_weight} has nothing to learn from: no pair of {config.data.mixture} has chosen_safe '
            'or rejected_safe. Add these labels, or set safety_weight=0.'
        )


def flops_per_token(config: RewardConfig, model: ModelConfig) -> float:
    """Model FLOPs of training on one token: those of a language model without its head. Attention is within an answer."""
    return model.flops_per_token(config.length // 2) - 6 * model.vocab_size * model.dim


def build(config: RewardConfig, model: ModelConfig, compute: ComputeConfig, steps: int) -> tuple[State, Callable]:
    """The abstract state and the jitted step; a mesh must be set."""
    optimizer = make_optimizer(config.optimizer, steps)
    loss = partial(comparison_loss, compute, config.margin, config.safety_weight)
    update = make_step(loss, optimizer, schedule(config.optimizer, steps), config.accumulation)

    def step(state: State, batch: Batch):
        state, metrics = update(state, batch)
        return state, metrics | {'pairs': metrics['tokens'], 'tokens': (batch['segment_ids'] > 0).sum()}

    def init() -> State:
        return init_state(ScoreModel(model, jax.random.key(config.seed)), optimizer)

    return jax.eval_shape(init), jax.jit(step, donate_argnums=0, compiler_options=compiler_options(jax.devices()[0]))


def pair_scores(compute: ComputeConfig, model: ScoreModel, batch: Batch) -> jax.Array:
    """Scores of both answers of each pair, read where they end: [R, S, 2] float32."""
    tokens, segments = (reshard(batch[name], 'BL') for name in ('tokens', 'segment_ids'))
    return scores_at(model(tokens, segments, compute), batch['last'])


def comparison_loss(compute: ComputeConfig, margin: str, safety_weight: float, model: ScoreModel, batch: Batch) -> jax.Array:
    """The sum of the losses of a batch's pairs, nats."""
    scores = pair_scores(compute, model, batch)
    losses = ranking_loss(scores, batch['rating'], margin)
    if safety_weight:
        losses += safety_weight * safety_loss(scores, batch['safe'])
    return (losses * batch['weights']).sum()


def heldout_sums(
    config: RewardConfig, compute: ComputeConfig
) -> Callable[[ScoreModel, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """The jitted function of a model and a batch of pairs: sums of loss and of correct comparisons, each with its count."""

    @jax.jit
    def sums(model: ScoreModel, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Name -> what is counted, and of how many."""

        def of(batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
            scores, weights = pair_scores(compute, model, batch), batch['weights']
            losses = ranking_loss(scores, batch['rating'], config.margin)
            losses += config.safety_weight * safety_loss(scores, batch['safe'])
            right = scores[..., 0] > scores[..., 1]
            unsafe = (batch['safe'] == 0) * weights[..., None]
            found = {'loss': (losses * weights, weights), 'accuracy': (right * weights, weights)}
            for number, rating in enumerate(RATINGS, 1):
                rated = weights * (batch['rating'] == number)
                found[f'accuracy/{rating}'] = right * rated, rated
            found['unsafe_recall'] = (scores < 0) * unsafe, unsafe
            return jax.tree.map(jnp.sum, found)

        return jax.tree.map(jnp.sum, jax.lax.map(of, microbatches(batch, config.accumulation)))

    return sums


def make_evaluate(
    data: PreferenceData, mesh: Mesh, sums: Callable[[Any, Batch], Mapping[str, tuple]], batches: int
) -> Callable[[State], dict[str, float]] | None:
    """A function of the state: means over the held-out pairs, and loss and accuracy of each source.

    Args:
      data: The comparisons.
      mesh: The mesh that is set.
      sums: Of the parameters and a batch: name -> a sum and what it is divided by; loss and accuracy are among them.
      batches: Batches that are read of each source; 0: all.
    """
    if not any(source.heldout for source in data.sources):
        log('Nothing is held out: the sources are too small.')
        return None

    def evaluate(state: State) -> dict[str, float]:
        figures: dict[str, float] = {}
        total: dict[str, np.ndarray] = {}
        for index, source in enumerate(data.sources):
            mine: dict[str, np.ndarray] = {}
            for number, batch in enumerate(data.heldout(index), start=1):
                for name, pair in sums(state.params, to_mesh(batch, mesh)).items():
                    mine[name] = mine.get(name, 0) + np.array(pair, np.float64)
                if number == batches:
                    break
            for name, pair in mine.items():
                total[name] = total.get(name, 0) + pair
                if name in ('loss', 'accuracy'):
                    figures[f'heldout/{source.name}/{name}'] = pair[0] / pair[1]
        right, pairs = total['accuracy']
        if pairs:
            low, high = wilson(right / pairs, pairs)
            log(f'Held-out accuracy {right / pairs:.1%} of {pairs:,.0f} pairs (95 % interval {low:.1%} to {high:.1%}).')
        return {f'heldout/{name}': part / whole for name, (part, whole) in total.items() if whole} | figures

    return evaluate


def reference_scores(config: RewardConfig, data: PreferenceData, scorer: Scorer) -> dict[str, float]:
    """Mean and spread of the model's scores of reference answers, and the shift that makes their mean 0, if it is wanted.

    Raises:
      UserError: there is no dialog in `reference` that fits the model.
    """
    if config.reference:
        dialogs = (
            encode_dialog(dialog, scorer.tokenizer, where)[0] for where, dialog in read_dialogs(config.reference) if dialog
        )
    else:
        dialogs = (pair.ids[0] for source in data.sources for record in source.records for pair in record)
    rows = [ids for ids, _ in zip((ids for ids in dialogs if len(ids) <= scorer.config.context), range(REFERENCES), strict=False)]
    if not rows:
        raise UserError(f'reference={config.reference} has no dialog that fits a context of {scorer.config.context}.')
    scores = scorer.score(rows)
    mean = float(scores.mean())
    return {'shift': -mean if config.center else 0.0, 'mean': mean, 'std': float(scores.std())}


def show_example(batch: Batch, tokenizer: Tokenizer) -> str:
    """The first pair of a batch as Markdown."""
    texts = []
    for segment in (1, 2):
        ids = batch['tokens'][0][batch['segment_ids'][0] == segment]
        texts.append(tokenizer.decode(ids.tolist()))
    quoted = ('> ' + text.replace('\n', '\n> ') for text in texts)
    return 'The first pair of the run: the answer to prefer, and the other.\n\n' + '\n\nbefore\n\n'.join(quoted) + '\n\n'
