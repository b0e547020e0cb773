"""Direct preference optimisation (Rafailov et al., 2023): a policy from comparisons, without a reward model and without sampling.

Not in the paper. The comparisons, their packing and the step are those of the reward model; the score of an answer is by how much
the policy has raised its log-probability over the reference's. The reference is the model to begin with: its log-probabilities
are computed once, before the first step, into WORKDIR/reference.npy, so that it takes no memory while the policy learns.
"""

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from llama2_jax import made_from
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_model, open_model, shape_of, tokenizer_of
from llama2_jax.config import LanguageModel, ModelConfig, between, resumable
from llama2_jax.data.preferences import PreferenceConfig, PreferenceData
from llama2_jax.files import write_atomically
from llama2_jax.inference.engine import Engine
from llama2_jax.inference.open import note_llama2
from llama2_jax.inputs import check_inputs
from llama2_jax.mesh import replicate, reshard, set_mesh
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.model.reward import scores_at
from llama2_jax.ops.ranking import dpo_loss, ipo_loss
from llama2_jax.planning import aot
from llama2_jax.runtime import barrier, compiler_options, is_main_process, log
from llama2_jax.runtime.workdir import open_run, record_inputs, report_disk_full
from llama2_jax.stages import reward
from llama2_jax.stages.sft import make_answers
from llama2_jax.stages.training import (
    DRY_STEPS,
    TrainingConfig,
    compile_stage,
    data_share,
    first_state,
    train_stage,
    write_example,
)
from llama2_jax.toy import answers
from llama2_jax.train.devices import describe_mesh, to_mesh
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from llama2_jax.train.step import Batch, State, init_state, make_step, microbatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(TrainingConfig):
    """A policy from comparisons, with the settings of the DPO paper but for AdamW.

    Attributes:
      init_from: Chat model to begin with, which is also the reference; a dry run takes a size such as '7b', too.
      data: Comparisons, as of a reward model; ratings and labels of safety are not used.
      beta: Cost of leaving the reference.
      loss: 'sigmoid': DPO's. 'ipo': IPO's, which is bounded where comparisons are always won by the same side.
      label_smoothing: Share of comparisons that are taken to be labelled the wrong way round, with 'sigmoid'.
      prompts: Questions answered in samples.md; in --set separated by commas.
      grade: Answers the toy world's held-out questions at each evaluation.
      batch_size: Pairs in the global batch.
      length: Tokens in a row, which holds whole pairs; an answer may have half of it with its prompt, or the model's context.
    """

    init_from: LanguageModel = ''
    data: PreferenceConfig = PreferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=1e-6, final_lr=0.1, warmup_steps=0, warmup_share=0.1)
    beta: float = between(0.1, 1e-6)
    loss: Literal['sigmoid', 'ipo'] = 'sigmoid'
    label_smoothing: float = between(0.0, 0, 0.5)
    prompts: tuple[str, ...] = resumable(('What can you help me with?',))
    grade: bool = False
    batch_size: int = between(64, 1)
    length: int = between(8192, 1)


class DpoData(PreferenceData):
    """Comparisons whose batches have the reference's log-probabilities: `reference`, float32 [r, S, 2].

    Attributes:
      reference: [count, 2] of all pairs.
    """

    reference: np.ndarray

    def train(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Batches as of `PreferenceData`."""
        return map(self._with_reference, super().train(start_step))

    def heldout(self, source: int) -> Iterator[dict[str, np.ndarray]]:
        """The held-out pairs of a source."""
        return map(self._with_reference, super().heldout(source))

    def without_reference(self) -> tuple[Iterator[dict[str, np.ndarray]], int]:
        """The batches of the run, then those that are held out, and how many they are."""
        heldout = [super(DpoData, self).heldout(source) for source in range(len(self.sources))]
        return itertools.chain(super().train(), *heldout), self.steps + sum(map(len, self._heldout))

    def _with_reference(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers = batch['numbers'][..., None]
        return _used(batch) | {'reference': np.where(numbers < 0, np.float32(0), self.reference[numbers[..., 0]])}


def _used(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in batch.items() if name not in ('rating', 'safe', 'numbers')}


def run(config: DpoConfig, workdir: str) -> State:
    """Trains, or continues, in `workdir`, and writes `workdir/model`.

    Raises:
      UserError: any mistake in the config, the model, the data or the workdir.
    """
    check_inputs(config, 'init_from')
    mesh = set_mesh(config.mesh)
    source = open_model(config.init_from)
    shards = reward.check(config, source.config, mesh)
    tokenizer = tokenizer_of(source)
    note_llama2(config.init_from, source.prompts)
    path, started = open_run(workdir, config, ('reference.npy', 'checkpoints/[0-9]*'))
    record_inputs(path, made_from.of_tuning(config.init_from, config.data.mixture), started)
    data = DpoData(
        config.data,
        tokenizer,
        length=config.length,
        context=source.config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        shards=shards,
        answers=True,
        **data_share(),
    )
    log(f'{data.steps:,} steps of {data.rows} rows, {describe_mesh(mesh)}\n{data.table()}')
    compute = config.compute.on(jax.default_backend())
    data.reference = read_reference(config, data, path, compute, mesh)
    if not started:
        write_example(path, reward.show_example(next(data.train()), tokenizer))
    abstract, step = build(config, source.config, compute, data.steps)

    def init() -> State:
        return first_state(config, data.steps, load_model(config.init_from, 'float32')[0])

    shown = make_answers(config.prompts, compute, tokenizer) if config.prompts else None
    heldout = reward.make_evaluate(data, mesh, heldout_sums(config, compute), config.eval_batches)

    def evaluate(state: State) -> dict[str, float]:
        found = heldout(state) if heldout else {}
        # Not shares, as everything under heldout/ is.
        found |= {
            f'rewards/{side}': found.pop(f'heldout/{side}') for side in ('chosen', 'rejected') if f'heldout/{side}' in found
        }
        if config.grade:
            found |= answers.grade(Engine(state.params, tokenizer, batch_size=64, dtype=compute.dtype))
        return found

    state = train_stage(
        config,
        path,
        mesh,
        data,
        abstract=abstract,
        init=init,
        step=step,
        flops=source.config.flops_per_token(config.length // 2) * data.rows * config.length,
        evaluate=evaluate,
        sample=(lambda state: shown(state.params)) if shown else None,
    )
    provenance = {'stage': 'dpo', 'parent': config.init_from, 'step': data.steps}
    save_model(path / 'model', state.params, tokenizer, provenance, chat=True)
    log(f'The model is in {path / "model"}.')
    return state


def dry_run(config: DpoConfig, topology: str | None) -> aot.Report:
    """Compiles the step and reports its cost; arguments and errors as of `compile_stage`.

    As if every pair filled a row, although a run packs several pairs into one.
    """
    model = shape_of(config.init_from or 'tiny')

    def program(mesh: Mesh, compute: ComputeConfig) -> tuple:
        shards = reward.check(config, model, mesh)
        rows = -(-config.batch_size // shards) * shards
        state, step = build(config, model, compute, DRY_STEPS)
        batch = abstract_batch(mesh, rows, config.length, 1)
        return step, state, batch, rows * config.length, model.flops_per_token(config.length // 2) * rows * config.length

    return compile_stage(config, topology, program)


def abstract_batch(mesh: Mesh, rows: int, length: int, slots: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch without its values."""
    batch = reward.abstract_pairs(mesh, rows, length, slots, reference=((2,), jnp.float32))
    return batch | {'answer': jax.ShapeDtypeStruct((rows, length), bool, sharding=batch['tokens'].sharding)}


def build(config: DpoConfig, model: ModelConfig, compute: ComputeConfig, steps: int) -> tuple[State, Callable]:
    """The abstract state and the jitted step; a mesh must be set."""
    optimizer = make_optimizer(config.optimizer, steps)

    def loss(policy: Llama, batch: Batch) -> jax.Array:
        return (pair_losses(config, compute, policy, batch)[0] * batch['weights']).sum()

    update = make_step(loss, optimizer, schedule(config.optimizer, steps), config.accumulation)

    def step(state: State, batch: Batch):
        state, metrics = update(state, batch)
        return state, metrics | {'pairs': metrics['tokens'], 'tokens': (batch['segment_ids'] > 0).sum()}

    def init() -> State:
        return init_state(Llama(model, jax.random.key(config.seed)), optimizer)

    return jax.eval_shape(init), jax.jit(step, donate_argnums=0, compiler_options=compiler_options(jax.devices()[0]))


def answer_log_probs(compute: ComputeConfig, model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of both answers of each pair the log-probability, summed over their tokens, and how many these are: [R, S, 2] float32."""
    tokens, segments = batch['tokens'], batch['segment_ids']
    # Shifted before they are cut over the mesh; the last place predicts nothing.
    targets, counts = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, batch['answer']))
    found, _ = model.log_probs(model(reshard(tokens, 'BL'), reshard(segments, 'BL'), compute), reshard(targets, 'BL'), 1.0)
    found = reshard(found, 'BM')
    # The segment of each answer is the one at its end. A place whose target is an answer's token lies in that answer's segment.
    own = scores_at(segments, batch['last'])
    inside = (segments[:, None, None] == own[..., None]) & counts[:, None, None]
    return jnp.sum(jnp.where(inside, found[:, None, None], 0), axis=-1), jnp.sum(inside, axis=-1).astype(jnp.float32)


def pair_losses(config: DpoConfig, compute: ComputeConfig, model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss of each pair [R, S], and the rewards of both answers, β log π/π0 [R, S, 2]."""
    policy, lengths = answer_log_probs(compute, model, batch)
    if config.loss == 'ipo':
        losses = ipo_loss(policy, batch['reference'], lengths, config.beta)
    else:
        losses = dpo_loss(policy, batch['reference'], config.beta, config.label_smoothing)
    return losses, config.beta * (policy - batch['reference'])


def reference_log_probs(compute: ComputeConfig, accumulation: int) -> Callable[[Llama, Batch], jax.Array]:
    """The jitted function (model, batch) -> log-probabilities [R, S, 2] on every device."""

    @jax.jit
    def log_probs(model: Llama, batch: Batch) -> jax.Array:
        found = jax.lax.map(lambda part: answer_log_probs(compute, model, part)[0], microbatches(batch, accumulation))
        return replicate(found).swapaxes(0, 1).reshape(batch['last'].shape)  # row r is in microbatch r mod accumulation

    return log_probs


def read_reference(config: DpoConfig, data: DpoData, path: Path, compute: ComputeConfig, mesh: Mesh) -> np.ndarray:
    """The log-probabilities of the model to begin with, [count, 2]; computed where the workdir has none."""
    file = path / 'reference.npy'
    barrier('reference')
    if not file.exists():
        model, _ = load_model(config.init_from, compute.dtype)
        log_probs = reference_log_probs(compute, config.accumulation)
        found = np.full((data.count, 2), np.nan, np.float32)
        batches, count = data.without_reference()
        for batch in tqdm(batches, total=count, unit='batch', desc='reference', disable=not is_main_process()):
            mine, numbers = batch['numbers'], batch['numbers']
            if jax.process_count() > 1:
                numbers = multihost_utils.process_allgather(mine, tiled=True)
            here = numbers >= 0
            if np.isnan(found[numbers[here]]).any():  # another epoch's are there already
                found[numbers[here]] = np.asarray(log_probs(model, to_mesh(_used(batch), mesh)))[here]
        if is_main_process():
            content = io.BytesIO()
            np.save(content, found)
            with report_disk_full(path):
                write_atomically(file, content.getvalue())
    barrier('reference written')
    with file.open('rb') as content:
        return np.load(content)


def heldout_sums(config: DpoConfig, compute: ComputeConfig) -> Callable[[Llama, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """The jitted function of a model and a batch: sums of loss, correct comparisons and rewards, each with the count of pairs."""

    @jax.jit
    def sums(model: Llama, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        def of(batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
            losses, rewards = pair_losses(config, compute, model, batch)
            chosen, rejected = rewards[..., 0], rewards[..., 1]
            found = {'loss': losses, 'accuracy': chosen > rejected, 'chosen': chosen, 'rejected': rejected}
            return {name: ((x * batch['weights']).sum(), batch['weights'].sum()) for name, x in found.items()}

        return jax.tree.map(jnp.sum, jax.lax.map(of, microbatches(batch, config.accumulation)))

    return sums
