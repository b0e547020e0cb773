"""Pretraining: a config, a batch, a loss, and `fit`."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama2_jax.checkpoints.directory import save_model
from llama2_jax.config import ModelConfig, UserError, between, resumable
from llama2_jax.data.pretrain import DataConfig, PretrainData
from llama2_jax.evals.validation import make_evaluate, make_sample
from llama2_jax.mesh import reshard, set_mesh
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.planning import aot
from llama2_jax.runtime import compiler_options, log
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.stages.tokenizer import open_tokenizer
from llama2_jax.stages.training import TrainingConfig, compile_stage, data_share, train_stage
from llama2_jax.train.devices import abstract_batch, check_mesh, describe_mesh, to_mesh
from llama2_jax.train.optimizer import make_optimizer, schedule
from llama2_jax.train.step import Batch, State, init_state, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """A pretraining run (paper p5-6; recipe C).

    Attributes:
      model: Shape of the model.
      data: Sources of text.
      tokenizer: A `tokenizer.model` or a directory with one; '' trains one on the mixture, with model.vocab_size pieces.
      tokens: Tokens of the whole run; the last step is filled up.
      batch_size: The paper's 4M tokens are 1024 sequences of 4096.
      prompts: Texts continued in samples.md; in --set separated by commas.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    tokenizer: str = ''
    tokens: int = between(2_000_000_000_000, 1)
    batch_size: int = between(1024, 1)
    prompts: tuple[str, ...] = resumable(('Once upon a time',))

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
    path, started = open_run(workdir, config)
    tokenizer = open_tokenizer(config.tokenizer, config.data.mixture, config.model.vocab_size, path / 'tokenizer.model', started)
    data = PretrainData(
        config.data,
        tokenizer,
        length=config.length,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=config.steps,
        **data_share(),
    )
    sources = {f'data.mixture={source}': text for source, text in data.fingerprints.items()}
    record_inputs(path, {'tokenizer': tokenizer.fingerprint} | sources, started)
    log(f'{config.model.parameters:,} parameters, {config.steps:,} steps, {describe_mesh(mesh)}\n{data.table()}')
    compute = config.compute.on(jax.default_backend())
    abstract, init, step = build(config, compute)
    sample = make_sample(config.prompts, config.model, compute, tokenizer) if config.prompts else None
    state = train_stage(
        config,
        path,
        mesh,
        data,
        abstract=abstract,
        init=init,
        step=step,
        flops=flops(config),
        evaluate=make_evaluate(data, make_heldout_loss(config, compute, mesh), config.eval_batches),
        sample=sample,
    )
    save_model(path / 'model', state.params, tokenizer, {'stage': 'pretrain', 'parent': None, 'step': config.steps})
    log(f'The model is in {path / "model"}.')
    return state


def dry_run(config: PretrainConfig, topology: str | None) -> aot.Report:
    """Compiles the step and reports its cost; arguments and errors as of `compile_stage`."""

    def program(mesh: Mesh, compute: ComputeConfig) -> tuple:
        check_mesh(mesh, config.model, config.batch_size, config.accumulation, config.length)
        batch = abstract_batch(mesh, config.batch_size, config.length, tokens=jnp.int32, segment_ids=jnp.int32)
        abstract, _, step = build(config, compute)
        return step, abstract, batch, config.batch_size * config.length, flops(config)

    return compile_stage(config, topology, program)


def flops(config: PretrainConfig) -> float:
    """Model FLOPs of a batch."""
    return config.model.flops_per_token(config.length) * config.batch_size * config.length


def build(config: PretrainConfig, compute: ComputeConfig) -> tuple[State, Callable[[], State], Callable]:
    """The abstract state, the function that makes the first one, and the jitted step; a mesh must be set."""
    optimizer = make_optimizer(config.optimizer, config.steps)

    def init() -> State:
        return init_state(Llama(config.model, jax.random.key(config.seed)), optimizer)

    update = make_step(partial(token_loss, compute), optimizer, schedule(config.optimizer, config.steps), config.accumulation)

    def step(state: State, batch: Batch):
        return update(state, split(batch, config.data.mask_documents))

    options = compiler_options(jax.devices()[0])
    return jax.eval_shape(init), jax.jit(init), jax.jit(step, donate_argnums=0, compiler_options=options)


def token_loss(compute: ComputeConfig, model: Llama, batch: Batch) -> jax.Array:
    """The sum of the losses of a batch's targets, nats."""
    hidden_BLD = model(batch['inputs'], batch.get('segments'), compute)
    return model.loss(hidden_BLD, batch['targets'], batch['weights'])


def heldout_loss(config: PretrainConfig, compute: ComputeConfig) -> Callable[[Llama, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted function of parameters and a batch: its loss in nats, and its number of targets."""

    @jax.jit
    def loss_and_tokens(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch = split(batch, config.data.mask_documents)
        return token_loss(compute, model, batch), batch['weights'].sum()

    return loss_and_tokens


def make_heldout_loss(config: PretrainConfig, compute: ComputeConfig, mesh: Mesh) -> Callable:
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
