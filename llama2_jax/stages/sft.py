"""Supervised fine-tuning on dialogs: pretraining's step, with a loss on the answers alone (paper p9; recipe D)."""

import dataclasses
import html
import itertools
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from etils.epath import Path
from jax.sharding import Mesh

from llama2_jax import made_from
from llama2_jax.checkpoints.base_model import load_base_model, merge_on_host
from llama2_jax.checkpoints.directory import is_saved, save_model
from llama2_jax.checkpoints.formats.peft import write_peft
from llama2_jax.checkpoints.load import load_model, open_model, shape_of, tokenizer_of
from llama2_jax.config import LanguageModel, ModelConfig, UserError, resumable
from llama2_jax.data.dialogs import DialogConfig, DialogData
from llama2_jax.evals.validation import make_evaluate
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.inference.open import note_llama2
from llama2_jax.inputs import check_inputs
from llama2_jax.mesh import set_mesh
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.model.lora import Adapters, LoraConfig, make_adapters, merge, to_int8, with_adapters
from llama2_jax.planning import aot
from llama2_jax.runtime import compiler_options, log
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.stages.pretrain import split, token_loss
from llama2_jax.stages.training import (
    DRY_STEPS,
    TrainingConfig,
    compile_stage,
    data_share,
    first_state,
    train_stage,
    write_example,
)
from llama2_jax.text.dialog import encode_prompt
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.toy import answers
from llama2_jax.train.devices import abstract_batch, check_mesh, describe_mesh, to_mesh
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from llama2_jax.train.step import Batch, State, init_state, make_step, microbatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """A fine-tuning run with the paper's settings (p9); warm-up, betas, clipping and the cosine's end are recipe K's.

    Attributes:
      init_from: Initial model, of any format; a dry run takes a size such as '7b', too.
      data: Sources of dialogs.
      lora: Adapters to train in place of the model, which is frozen in the compute dtype.
      merge: Writes the model with the merged adapters, too.
      context: of the model from now on, where its own is too short for the dialogs (as LLaMA 1's was for Ghost Attention, paper
        p17): the rotations of its positions go on, and what they mean is learned; 0: its own.
      prompts: Questions answered in samples.md; in --set separated by commas.
      grade: Answers the toy world's held-out questions at each evaluation.
    """

    init_from: LanguageModel = ''
    data: DialogConfig = DialogConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=2e-5, warmup_steps=0, warmup_share=0.03)
    lora: LoraConfig = LoraConfig()
    merge: bool = resumable(False, 'alone')
    context: int = 0
    prompts: tuple[str, ...] = resumable(('What can you help me with?',))
    grade: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge and not self.lora.rank:
            raise UserError('merge=true needs adapters: set lora.rank.')


def run(config: SftConfig, workdir: str, model_to: Path | None = None) -> State:
    """Fine-tunes, or continues, in `workdir`, and writes a model, by default `workdir/model`; adapters go to `workdir/adapters`.

    Raises:
      UserError: any mistake in the config, the model, the data or the workdir.
    """
    check_inputs(config, 'init_from')
    mesh = set_mesh(config.mesh)
    source = open_model(config.init_from)
    model = extended(source.config, config)
    check(config, model, mesh)
    tokenizer = tokenizer_of(source)
    note_llama2(config.init_from, source.prompts)
    path, started = open_run(workdir, config)
    record_inputs(path, made_from.of_tuning(config.init_from, config.data.mixture), started)
    data = DialogData(
        config.data,
        tokenizer,
        length=config.length,
        batch_size=config.batch_size,
        seed=config.seed,
        **data_share(),
    )
    log(f'{data.steps:,} steps, {describe_mesh(mesh)}\n{data.table()}')
    if not started:
        write_example(path, show_example(next(data.train()), tokenizer))
    compute = config.compute.on(jax.default_backend())
    abstract, step = build(config, model, compute, data.steps)
    frozen = load_base_model(config.init_from, config.lora, compute.dtype, model.context, mesh) if config.lora.rank else None
    trained = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    log(f'{trained:,} parameters are trained, {trained / model.parameters:.2%} of {model.parameters:,}.')

    def init() -> State:
        if frozen is None:
            params, _ = load_model(config.init_from, 'float32', model.context)
        else:
            params = jax.jit(partial(make_adapters, model, config.lora))(jax.random.key(config.seed))
        return first_state(config, data.steps, params)

    def merged(params: Llama | Adapters) -> Llama:
        if frozen is None:
            return params
        if config.lora.int8:
            return merge_on_host(config.init_from, params, config.lora, compute.dtype, model.context)
        return merge(frozen, params, config.lora)

    answers = make_answers(config.prompts, compute, tokenizer) if config.prompts else None
    state = train_stage(
        config,
        path,
        mesh,
        data,
        abstract=abstract,
        init=init,
        step=lambda state, batch: step(state, (frozen, batch)),
        flops=flops(config, model),
        evaluate=make_figures(config, data, compute, mesh, tokenizer, frozen, merged),
        sample=(lambda state: answers(merged(state.params))) if answers else None,
    )
    if frozen is not None:
        write_peft(path / 'adapters', state.params, config.lora, config.init_from)
        log(f'The adapters are in {path / "adapters"}.')
    if frozen is None or config.merge:
        provenance = {'stage': 'sft', 'parent': config.init_from, 'step': data.steps}
        model_to = model_to or path / 'model'
        save_model(model_to, merged(state.params), tokenizer, provenance, chat=True)
        log(f'The model is in {model_to}.')
    return state


def command(model: str, dialogs: Path) -> str:
    """The command that fine-tunes a model on what another stage wrote."""
    return f'python experiments/sft.py --config=… --set init_from={model} --set data.mixture=jsonl:{dialogs} --workdir=…'


def check_warmup(config: SftConfig, dialogs: int) -> None:
    """Raises a UserError where warm-up would take all of a run on so many dialogs, before a stage samples them.

    Dialogs share rows, so a run may still turn out shorter; what was sampled is kept then. With a mixture besides, its length is
    not known yet.
    """
    if config.data.mixture:
        return
    try:
        schedule(config.optimizer, max(1, -(-int(config.data.epochs * dialogs) // config.batch_size)))
    except UserError as error:
        raise UserError(f'sft.{error} At most {dialogs:,} dialogs are sampled for it.') from None


def run_within(config: SftConfig, path: Path, dialogs: Path) -> None:
    """Fine-tunes for another stage in `path`/sft, on `dialogs` and the mixture besides; the model becomes `path`/model."""
    mixture = ', '.join(filter(None, [config.data.mixture, f'jsonl:{dialogs}']))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=mixture))
    if not is_saved(path / 'model'):
        run(config, str(path / 'sft'), path / 'model')
        return
    workdir, started = open_run(path / 'sft', config)
    record_inputs(workdir, made_from.of_tuning(config.init_from, mixture), started)
    log(f'The model is in {path / "model"}.')


def dry_run(config: SftConfig, topology: str | None) -> aot.Report:
    """Compiles the step and reports its cost; arguments and errors as of `compile_stage`."""
    model = extended(shape_of(config.init_from or 'tiny'), config)

    def program(mesh: Mesh, compute: ComputeConfig) -> tuple:
        check(config, model, mesh)
        batch = abstract_batch(mesh, config.batch_size, config.length, tokens=jnp.int32, segment_ids=jnp.int32, trained=bool)
        state, step = build(config, model, compute, DRY_STEPS)
        frozen = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(compute.dtype), Llama(model, jax.random.key(0))))
        frozen = jax.eval_shape(to_int8, frozen) if config.lora.int8 else frozen
        batch = (frozen if config.lora.rank else None, batch)
        return step, state, batch, config.batch_size * config.length, flops(config, model)

    return compile_stage(config, topology, program)


def extended(model: ModelConfig, config: SftConfig) -> ModelConfig:
    """The model's shape with the context that the run gives it.

    Raises:
      UserError: it is shorter than before.
    """
    if 0 < config.context < model.context:
        raise UserError(f'context={config.context} is shorter than that of {config.init_from}, {model.context}.')
    return dataclasses.replace(model, context=config.context or model.context)


def check(config: SftConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Raises a UserError where model, mesh and config do not go together."""
    if config.length > model.context:
        raise UserError(f'length={config.length} exceeds the context of {config.init_from}, {model.context}; set context, too.')
    if config.lora.int8 and jax.process_count() > 1:
        raise UserError('lora.int8 is for a single host: several have room for the model as it is.')
    if config.lora.int8 and (config.prompts or config.grade):
        raise UserError('With lora.int8 there is no room for a merged model to sample from: set prompts= and grade=false.')
    check_mesh(mesh, model, config.batch_size, config.accumulation, config.length)


def flops(config: SftConfig, model: ModelConfig) -> float:
    """Model FLOPs of a batch; a third less where the model is frozen, whose matrices need no gradients."""
    return model.flops_per_token(config.length) * (2 / 3 if config.lora.rank else 1) * config.batch_size * config.length


def build(config: SftConfig, model: ModelConfig, compute: ComputeConfig, steps: int) -> tuple[State, Callable]:
    """The abstract state and the jitted step (state, (frozen model or None, batch)); a mesh must be set."""
    optimizer = make_optimizer(config.optimizer, steps)

    def init() -> State:
        key = jax.random.key(config.seed)
        return init_state(make_adapters(model, config.lora, key) if config.lora.rank else Llama(model, key), optimizer)

    def step(state: State, given: tuple[Llama | None, Batch]):
        frozen, batch = given

        def loss(params, microbatch):
            return token_loss(compute, with_adapters(frozen, params, config.lora), microbatch)

        update = make_step(loss, optimizer, schedule(config.optimizer, steps), config.accumulation)
        return update(state, split(batch, mask_documents=True))

    return jax.eval_shape(init), jax.jit(step, donate_argnums=0, compiler_options=compiler_options(jax.devices()[0]))


def heldout_loss(config: SftConfig, compute: ComputeConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted function of the frozen model or None, the trained parameters and a batch: its loss in nats, and its targets."""

    @jax.jit
    def loss_and_tokens(frozen: Llama | None, params: Llama | Adapters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch = split(batch, mask_documents=True)
        model = with_adapters(frozen, params, config.lora)
        nats = jax.lax.map(partial(token_loss, compute, model), microbatches(batch, config.accumulation))
        return nats.sum(), batch['weights'].sum()

    return loss_and_tokens


def make_figures(
    config: SftConfig,
    data: DialogData,
    compute: ComputeConfig,
    mesh: Mesh,
    tokenizer: Tokenizer,
    frozen: Llama | None,
    merged: Callable[[Llama | Adapters], Llama],
) -> Callable[[State], dict[str, float]] | None:
    """A function of the state: loss on the held-out dialogs and, for toy dialogs, the oracle's grades."""

    loss = heldout_loss(config, compute)
    heldout = make_evaluate(data, lambda params, batch: loss(frozen, params, to_mesh(batch, mesh)), config.eval_batches)

    def figures(state: State) -> dict[str, float]:
        grades = (
            answers.grade(Engine(merged(state.params), tokenizer, batch_size=64, dtype=compute.dtype)) if config.grade else {}
        )
        return (heldout(state) if heldout else {}) | grades

    return figures if heldout or config.grade else None


def make_answers(questions: tuple[str, ...], compute: ComputeConfig, tokenizer: Tokenizer) -> Callable[[Llama], str]:
    """A function that answers the questions, as Markdown."""
    prompts = [encode_prompt([{'role': 'user', 'content': question}], tokenizer) for question in questions]
    requests = [Request(prompt, max_new_tokens=256, temperature=0.0, answer=True) for prompt in prompts]

    def answers(model: Llama) -> str:
        engine = Engine(model, tokenizer, batch_size=len(requests), dtype=compute.dtype)
        sections = []
        for question, [sample] in zip(questions, engine.generate(requests), strict=True):
            text = sample.text.strip() + ('' if sample.stop_reason == 'eos' else ' … (it does not stop)')
            sections.append(f'**{question}**\n\n' + '\n'.join(f'> {line}' for line in text.splitlines()))
        return '\n\n'.join(sections)

    return answers


def show_example(batch: dict, tokenizer: Tokenizer) -> str:
    """The first dialog of a batch as Markdown, its trained tokens marked; `<s>` and `</s>` are BOS and EOS."""
    first = batch['segment_ids'][0] == 1
    pairs = zip(batch['tokens'][0][first].tolist(), batch['trained'][0][first].tolist(), strict=True)
    text = ''
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        pieces = html.escape(spell([token for token, _ in run], tokenizer))
        text += f'<mark>{pieces}</mark>' if trained else pieces
    return f'The first dialog of the run; marked tokens are trained.\n\n<pre>{text}</pre>\n\n'


def spell(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids with BOS, EOS and every space in it."""
    pieces = (tokenizer.piece(token).replace('▁', ' ') for token in ids)
    spelt = (bytes.fromhex(byte[1]) if (byte := re.fullmatch(r'<0x(..)>', piece)) else piece.encode() for piece in pieces)
    return b''.join(spelt).decode(errors='replace')
