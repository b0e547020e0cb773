"""Pretraining: a config, a batch, a loss, and `fit`."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama2_jax.checkpoints.directory import save_model
from llama2_jax.config import SEED, Config, ModelConfig, UserError, between
from llama2_jax.data.pretrain import DataConfig, PretrainData
from llama2_jax.evals.validation import make_evaluate, make_sample, say_heldout
from llama2_jax.mesh import MeshConfig, make_mesh, reshard, set_mesh
from llama2_jax.model.llama import Compute, Llama
from llama2_jax.planning import aot
from llama2_jax.runtime import barrier, chip_of, compiler_options, say
from llama2_jax.runtime.hosts import DAY
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.stages.tokenizer import open_tokenizer
from llama2_jax.train.devices import abstract_batch, check_mesh, describe_mesh, device_batches, to_mesh
from llama2_jax.train.loop import LoopConfig, fit
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from llama2_jax.train.step import Batch, State, init_state, make_step

# What a resumed run may change, as no result depends on it beyond rounding.
MAY_CHANGE = (
    *('mesh', 'loop', 'accumulation', 'eval_batches', 'prompts'),
    *('compute.remat', 'compute.attention', 'data.workers', 'data.cache_dir'),
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(Config):
    """A pretraining run (paper p5-6; recipe C).

    Attributes:
      tokenizer: a `tokenizer.model` or a directory that holds one; '' trains one on the mixture, with model.vocab_size pieces.
      tokens: of the whole run; the last step is filled up.
      batch_size: sequences in the global batch; the paper's 4M tokens are 1024 of 4096.
      length: tokens in a sequence.
      accumulation: microbatches the batch is cut into where memory is short.
      eval_batches: of held-out text, for each source, at each evaluation; 0: all of it.
      prompts: continued in samples.md; in --set separated by commas.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig()
    tokenizer: str = ''
    tokens: int = between(2_000_000_000_000, 1)
    batch_size: int = between(1024, 1)
    length: int = between(4096, 1)
    accumulation: int = between(1, 1)
    seed: int = SEED
    eval_batches: int = 8
    prompts: tuple[str, ...] = ('Once upon a time',)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length > self.model.context:
            raise UserError(f'length={self.length} exceeds model.context={self.model.context}.')
        schedule(self.optimizer, self.steps)  # which says if the warm-up takes the whole run

    @property
    def steps(self) -> int:
        """Updates in the run."""
        return -(-self.tokens // (self.batch_size * self.length))


def run(config: PretrainConfig, workdir: str) -> State:
    """Trains, or continues, in `workdir`, and writes `workdir/model`.

    Raises:
      UserError: any mistake in the config, the data or the workdir.
    """
    mesh = set_mesh(config.mesh)
    check_mesh(mesh, config.model, config.batch_size, config.accumulation, config.length)
    path, started = open_run(workdir, config, MAY_CHANGE)
    tokenizer = open_tokenizer(config.tokenizer, config.data.mixture, config.model.vocab_size, path / 'tokenizer.model', started)
    data = PretrainData(
        config.data,
        tokenizer,
        length=config.length,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=config.steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        barrier=partial(barrier, seconds=DAY),  # one may have more to tokenise than another
    )
    sources = {f'data.mixture={source}': text for source, text in data.fingerprints.items()}
    record_inputs(path, {'tokenizer': tokenizer.fingerprint} | sources, started)
    say(f'{config.model.parameters:,} parameters, {config.steps:,} steps, {describe_mesh(mesh)}\n{data.table()}')
    compute = config.compute.on(jax.default_backend())
    abstract, init, step = build(config, compute)
    sample = make_sample(config.prompts, config.model, compute, tokenizer) if config.prompts else None
    chip = chip_of(jax.devices()[0])
    state = fit(
        path,
        config.loop,
        abstract_state=abstract,
        init=init,
        step=step,
        batches=partial(device_batches, data, mesh),
        steps=config.steps,
        describe=data.describe,
        evaluate=make_evaluate(data, make_heldout_loss(config, compute, mesh), config.eval_batches),
        sample=sample,
        flops_per_step=config.model.flops_per_token(config.length) * config.batch_size * config.length,
        peak_flops=chip and chip.peak_flops,
    )
    save_model(path / 'model', state.params, tokenizer, {'stage': 'pretrain', 'parent': None, 'step': config.steps})
    say_heldout(path)
    say(f'The model is in {path / "model"}.')
    return state


def dry_run(config: PretrainConfig, topology: str | None) -> aot.Report:
    """Compiles the step for the local devices, or for a TPU topology that need not be attached, and reports what it takes.

    Raises:
      UserError: the mesh does not divide the config, there is no such slice, or the step does not fit its chips.
    """
    mesh = make_mesh(config.mesh, aot.topology_devices(topology) if topology else None)
    check_mesh(mesh, config.model, config.batch_size, config.accumulation, config.length)
    tokens = config.batch_size * config.length
    batch = abstract_batch(mesh, config.batch_size, config.length, tokens=jnp.int32, segment_ids=jnp.int32)
    with jax.set_mesh(mesh):
        abstract, _, step = build(config, config.compute.on(mesh.devices.flat[0].platform))
        flops = config.model.flops_per_token(config.length) * tokens
        return aot.dry_run(step, abstract, batch, mesh, tokens, flops)


def build(config: PretrainConfig, compute: Compute) -> tuple[State, Callable[[], State], Callable]:
    """The abstract state, the function that makes the first one, and the jitted step; a mesh must be set."""
    optimizer = make_optimizer(config.optimizer, config.steps)

    def init() -> State:
        return init_state(Llama(config.model, jax.random.key(config.seed)), optimizer)

    update = make_step(partial(token_loss, compute), optimizer, schedule(config.optimizer, config.steps), config.accumulation)

    def step(state: State, batch: Batch):
        return update(state, split(batch, config.data.mask_documents))

    options = compiler_options(jax.devices()[0])
    return jax.eval_shape(init), jax.jit(init), jax.jit(step, donate_argnums=0, compiler_options=options)


def token_loss(compute: Compute, model: Llama, batch: Batch) -> jax.Array:
    """The sum of the losses of a batch's targets, nats."""
    hidden_BLD = model(batch['inputs'], batch.get('segments'), compute)
    return model.loss(hidden_BLD, batch['targets'], batch['weights'])


def heldout_loss(config: PretrainConfig, compute: Compute) -> Callable[[Llama, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted function of parameters and a batch: its loss in nats, and its number of targets."""

    @jax.jit
    def loss_and_tokens(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch = split(batch, config.data.mask_documents)
        return token_loss(compute, model, batch), batch['weights'].sum()

    return loss_and_tokens


def make_heldout_loss(config: PretrainConfig, compute: Compute, mesh: Mesh) -> Callable:
    """`heldout_loss` of a batch of the data, which it moves to the mesh."""
    loss = heldout_loss(config, compute)
    return lambda model, batch: loss(model, to_mesh(batch, mesh))


def split(batch: Batch, mask_documents: bool) -> Batch:
    """Tokens and segment ids [B, L+1] -> inputs, targets and weights [B, L], and segments where documents are masked.

    Where the batch says what is `trained`, nothing else counts.

    >>> split({'tokens': jnp.array([[1, 5, 2, 1, 0]]), 'segment_ids': jnp.array([[1, 1, 1, 2, 0]])}, True)['weights'].tolist()
    [[1.0, 1.0, 0.0, 0.0]]
    """
    inputs, targets = batch['tokens'][:, :-1], batch['tokens'][:, 1:]
    before, after = batch['segment_ids'][:, :-1], batch['segment_ids'][:, 1:]
    weights = batch['trained'][:, 1:] if 'trained' in batch else after > 0
    if mask_documents:  # the next document's BOS cannot be predicted from this one
        weights &= before == after
    parts = {'inputs': inputs, 'targets': targets, 'weights': weights.astype(jnp.float32)}
    if mask_documents:
        parts['segments'] = before
    return {name: reshard(part, 'BL') for name, part in parts.items()}
