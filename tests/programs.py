"""Every program that the package compiles and runs, with the shapes that it runs with: a new `jax.jit` is added here.

An entry is a function of `Target` that returns a `Call`; it names the functions of the package whose `jax.jit` it covers.
`test_tpu_programs.py` compiles all of them for TPUs and lowers them for GPUs.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import MODELS, ModelConfig
from llama2_jax.inference import decode, likelihood
from llama2_jax.inference.scorer import SHORTEST, scoring
from llama2_jax.inference.slots import PIECES, shards
from llama2_jax.mesh import BATCH_AXES, MeshConfig, decoding_mesh, make_mesh, parameter_spec, spec
from llama2_jax.model import lora
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.model.reward import ScoreModel
from llama2_jax.planning import aot
from llama2_jax.rl import ppo
from llama2_jax.runtime import compiler_options
from llama2_jax.stages import dpo, pretrain, reward, sft
from llama2_jax.train.devices import abstract_batch
from llama2_jax.train.optimizer import make_optimizer
from llama2_jax.train.step import init_state

sys.path.insert(0, str(Path(__file__).parents[1] / 'experiments'))
import dpo as dpo_presets  # noqa: E402
import ppo as ppo_presets  # noqa: E402
import pretrain as pretrain_presets  # noqa: E402
import reward_model as reward_presets  # noqa: E402
import sft as sft_presets  # noqa: E402

sys.path.pop(0)
STEPS = 100  # of a schedule


class Call(NamedTuple):
    """A jitted function, its abstract arguments, the mesh that is set, and the compiler options if they are not training's."""

    function: Any
    arguments: tuple
    mesh: Mesh
    keywords: Mapping[str, Any] = {}
    decodes: bool = False


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices and the size that a program is compiled for.

    Attributes:
      platform: 'tpu' or 'cuda'.
      devices: Described devices of a TPU, or the CPU's in place of GPUs.
      big: A model as wide as the 7B, of two layers, in place of the toy's.
    """

    platform: str
    devices: tuple[jax.Device, ...]
    big: bool

    @cached_property
    def model(self) -> ModelConfig:
        """The model's shape."""
        return dataclasses.replace(MODELS['7b'], layers=2) if self.big else MODELS['tiny']

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh for training."""
        return make_mesh(MeshConfig(), self.devices)

    @cached_property
    def decoding(self) -> Mesh:
        """The mesh for decoding."""
        return decoding_mesh(self.model, self.devices)

    @cached_property
    def compute(self) -> ComputeConfig:
        """As the presets have it."""
        return ComputeConfig(remat='full' if self.big else 'none').on(self.platform)

    def rows(self, preset: int) -> int:
        """Rows of a batch: the preset's, or for a big model two a chip."""
        return 2 * len(self.devices) if self.big else -(-preset // len(self.devices)) * len(self.devices)

    def preset(self, presets: Any, big: str, tiny: str = 'tiny') -> Any:
        """A stage's preset."""
        return presets.PRESETS[big if self.big else tiny]()

    def model_of(self, kind: type) -> Any:
        """Abstract parameters in the compute dtype; a mesh must be set."""
        return jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(self.compute.dtype), kind(self.model, jax.random.key(0))))


Entry = Callable[[Target], Call]
PROGRAMS: dict[str, Entry] = {}
DECODING: set[str] = set()  # those that run under the mesh for decoding
COVERED: set[str] = set()

# jax.jit whose programs need no entry: they hold no kernel and no product of matrices, or run on the host's CPU only.
EXEMPT = {
    'llama2_jax.checkpoints.load.load_tree.load': 'zeros',
    'llama2_jax.checkpoints.load._set_layer': 'a copy',
    'llama2_jax.checkpoints.formats.peft.write_peft': 'a copy',
    'llama2_jax.train.checkpoint._sums_of_bits': 'sums',
    'llama2_jax.checkpoints.verify.against_transformers': 'compares with PyTorch in float32, on the host',
    'llama2_jax.checkpoints.convert.compare.logits': 'compares two models in float32, on the host',
    'llama2_jax.rl.plan.learning': 'the dry run of scorer.scoring',
    'llama2_jax.inference.plan.compile_step': 'the dry run of decode.decode',
}


def program(*covers: str) -> Callable[[Entry], Entry]:
    """Registers an entry that covers the `jax.jit` in these functions of the package."""

    def add(entry: Entry) -> Entry:
        PROGRAMS[entry.__name__] = entry
        if covers[0].startswith(('inference.decode', 'inference.likelihood')):
            DECODING.add(entry.__name__)
        COVERED.update(f'llama2_jax.{name}' for name in covers)
        return entry

    return add


def pretraining(target: Target) -> pretrain.PretrainConfig:
    """The preset with the target's model and rows."""
    config = target.preset(pretrain_presets, 'llama2_7b')
    return dataclasses.replace(config, model=target.model, batch_size=target.rows(config.batch_size))


@program('stages.pretrain.build')
def pretrain_step(target: Target) -> Call:
    config = pretraining(target)
    state, _, step = pretrain.build(config, target.compute)
    batch = abstract_batch(target.mesh, config.batch_size, config.length, tokens=jnp.int32, segment_ids=jnp.int32)
    return Call(step, (state, batch), target.mesh)


@program('stages.pretrain.build')
def pretrain_init(target: Target) -> Call:
    return Call(pretrain.build(pretraining(target), target.compute)[1], (), target.mesh)


@program('stages.pretrain.heldout_loss.loss_and_tokens')
def pretrain_heldout(target: Target) -> Call:
    config = pretraining(target)
    state, _, _ = pretrain.build(config, target.compute)
    batch = abstract_batch(target.mesh, config.batch_size, config.length, tokens=jnp.int32, segment_ids=jnp.int32)
    return Call(pretrain.heldout_loss(config, target.compute), (state.params, batch), target.mesh)


def tuning(target: Target, preset: str, heldout: bool = False) -> Call:
    """A step of fine-tuning, or its loss on held-out dialogs."""
    config = target.preset(sft_presets, preset)
    rows = target.rows(config.batch_size)
    config = dataclasses.replace(config, batch_size=rows, accumulation=min(config.accumulation, 2))
    if not target.big and preset != 'llama2_7b':
        config = dataclasses.replace(config, lora=sft_presets.PRESETS[preset]().lora)
    state, step = sft.build(config, target.model, target.compute, STEPS)
    frozen = target.model_of(Llama) if config.lora.rank else None
    frozen = jax.eval_shape(lora.to_int8, frozen) if config.lora.int8 else frozen
    kinds = {'tokens': jnp.int32, 'segment_ids': jnp.int32, 'trained': bool}
    batch = abstract_batch(target.mesh, rows, config.length, **kinds)
    if heldout:
        return Call(sft.heldout_loss(config, target.compute), (frozen, state.params, batch), target.mesh)
    return Call(step, (state, (frozen, batch)), target.mesh)


@program('stages.sft.build')
def sft_step(target: Target) -> Call:
    return tuning(target, 'llama2_7b')


@program('stages.sft.build')
def lora_step(target: Target) -> Call:
    return tuning(target, 'lora_7b')


@program('stages.sft.build')
def lora_int8_step(target: Target) -> Call:
    return tuning(target, 'lora_7b_int8')


@program('stages.sft.heldout_loss.loss_and_tokens')
def sft_heldout(target: Target) -> Call:
    return tuning(target, 'llama2_7b', heldout=True)


@program('stages.training.first_state')
def first_state(target: Target) -> Call:
    init = jax.jit(partial(init_state, optimizer=make_optimizer(sft_presets.tiny().optimizer, STEPS)), donate_argnums=0)
    return Call(init, (jax.eval_shape(lambda: Llama(target.model, jax.random.key(0))),), target.mesh)


def adapters(target: Target) -> tuple[lora.LoraConfig, Any]:
    """Settings and abstract adapters of the presets."""
    config = sft_presets.lora_7b().lora
    return config, jax.eval_shape(lambda: lora.make_adapters(target.model, config, jax.random.key(0)))


@program('stages.sft.run.init', 'rl.ppo.initial_learners')
def first_adapters(target: Target) -> Call:
    make = partial(lora.make_adapters, target.model, sft_presets.lora_7b().lora)
    return Call(jax.jit(make), (jax.eval_shape(lambda: jax.random.key(0)),), target.mesh)


@program('model.lora.merge')
def lora_merge(target: Target) -> Call:
    config, factors = adapters(target)
    return Call(lora.merge, (target.model_of(Llama), factors), target.mesh, {'lora': config})


@program('model.lora.to_int8')
def lora_to_int8(target: Target) -> Call:
    return Call(lora.to_int8, (target.model_of(Llama),), target.mesh)


def comparing(target: Target, heldout: bool) -> Call:
    """A step of a reward model, or its sums over held-out pairs."""
    config = target.preset(reward_presets, 'llama2_7b_safety', 'tiny_safety')
    rows, pairs = target.rows(4), 1 if target.big else 6
    sharding = NamedSharding(target.mesh, P(BATCH_AXES))
    shapes = {'tokens': (rows, config.length), 'segment_ids': (rows, config.length), 'last': (rows, pairs, 2)}
    shapes |= {'rating': (rows, pairs), 'safe': (rows, pairs, 2)}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name, shape in shapes.items()}
    batch['weights'] = jax.ShapeDtypeStruct((rows, pairs), jnp.float32, sharding=sharding)
    state, step = reward.build(config, target.model, target.compute, STEPS)
    if heldout:
        return Call(reward.heldout_sums(config, target.compute), (state.params, batch), target.mesh)
    return Call(step, (state, batch), target.mesh)


@program('stages.reward.build')
def reward_step(target: Target) -> Call:
    return comparing(target, heldout=False)


@program('stages.reward.heldout_sums.sums')
def reward_heldout(target: Target) -> Call:
    return comparing(target, heldout=True)


def preferring(target: Target) -> tuple[dpo.DpoConfig, dict]:
    """The preset of DPO, and a batch."""
    config = target.preset(dpo_presets, 'llama2_7b')
    return config, dpo.abstract_batch(target.mesh, target.rows(4), config.length, 1 if target.big else 6)


@program('stages.dpo.build')
def dpo_step(target: Target) -> Call:
    config, batch = preferring(target)
    state, step = dpo.build(config, target.model, target.compute, STEPS)
    return Call(step, (state, batch), target.mesh)


@program('stages.dpo.heldout_sums.sums')
def dpo_heldout(target: Target) -> Call:
    config, batch = preferring(target)
    state, _ = dpo.build(config, target.model, target.compute, STEPS)
    return Call(dpo.heldout_sums(config, target.compute), (state.params, batch), target.mesh)


@program('stages.dpo.reference_log_probs.log_probs')
def dpo_reference(target: Target) -> Call:
    _, batch = preferring(target)
    del batch['reference'], batch['weights']
    return Call(dpo.reference_log_probs(target.compute, 1), (target.model_of(Llama), batch), target.mesh)


def scores(target: Target, length: int) -> Call:
    """Rows of one length, as evaluation, rejection sampling and PPO score them."""
    sharding = NamedSharding(target.mesh, P(BATCH_AXES))
    rows = target.rows(32)
    shapes = ((rows, length), (rows,))
    tokens, last = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in shapes)
    return Call(scoring(target.compute), (target.model_of(ScoreModel), tokens, last), target.mesh)


@program('inference.scorer.scoring.score')
def score_short_rows(target: Target) -> Call:
    return scores(target, SHORTEST)


@program('inference.scorer.scoring.score')
def score_long_rows(target: Target) -> Call:
    return scores(target, target.model.context)


def learning(target: Target, program: str, **settings: Any) -> Call:
    """A program of PPO."""
    config = dataclasses.replace(target.preset(ppo_presets, 'llama2_7b'), **settings)
    if target.big:
        rows = 4 * len(target.devices)
        config = dataclasses.replace(config, mesh=MeshConfig(), batch_size=rows, minibatch_size=rows // 2)
    programs = ppo.build(config, target.model, target.model, target.compute)
    kinds = {'tokens': jnp.int32, 'answer': bool, 'logprobs': jnp.float32}
    batch = abstract_batch(target.mesh, config.batch_size, config.length - 1, **kinds)
    row = NamedSharding(target.mesh, P(BATCH_AXES))
    batch['score'] = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32, sharding=row)
    reference = target.model_of(Llama)
    given = (reference, jax.ShapeDtypeStruct((), jnp.float32), batch)
    if program == 'init':
        value = programs.abstract.value.params if config.has_value else None
        return Call(programs.init, (programs.abstract.policy.params, value), target.mesh)
    if program == 'prepare':
        return Call(programs.prepare, (programs.abstract, given), target.mesh)
    bound = aot.on_mesh((programs.abstract, given), target.mesh)
    minibatch = jax.eval_shape(programs.prepare, *bound)[0][0]
    return Call(programs.update, (programs.abstract, (reference if config.lora.rank else None, minibatch)), target.mesh)


@program('rl.ppo.build')
def ppo_init(target: Target) -> Call:
    return learning(target, 'init')


@program('rl.ppo.build')
def ppo_prepare(target: Target) -> Call:
    return learning(target, 'prepare')


@program('rl.ppo.build')
def ppo_update(target: Target) -> Call:
    return learning(target, 'update')


@program('rl.ppo.build')
def grpo_prepare(target: Target) -> Call:
    return learning(target, 'prepare', advantages='grpo', samples=4)


@program('rl.ppo.build')
def ppo_update_of_adapters(target: Target) -> Call:
    return learning(target, 'update', lora=sft_presets.lora_7b().lora)


class Held(NamedTuple):
    """Abstract weights, cache and rows of an engine."""

    weights: Any
    cache: Any
    rows: Any


def held(target: Target, int8: bool = False, places: int = 512) -> Held:
    """As the engine lays them out: 32 rows, or as many as the mesh cuts them into."""
    rows = max(8 if target.big else 32, shards(target.decoding))
    weights = decode.abstract_weights(target.model, target.compute.dtype, int8)
    cache = jax.eval_shape(lambda: decode.empty_cache(target.model, rows, places, target.compute.dtype))
    return Held(weights, cache, decode.abstract_rows(rows))


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    """Whole numbers, of the host."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def prefilling(target: Target, length: int, fresh: bool) -> Call:
    """Pieces of four prompts on each shard."""
    weights, cache, _ = held(target)
    lines = 4 * shards(target.decoding)
    used = jax.ShapeDtypeStruct((lines,), bool)
    arguments = (weights, cache, int32(lines, length), int32(lines), int32(lines), used)
    return Call(decode.programs(target.devices[0])[0], arguments, target.decoding, {'fresh': fresh}, decodes=True)


@program('inference.decode.programs')
def prefill_first_piece(target: Target) -> Call:
    return prefilling(target, PIECES[0], fresh=True)


@program('inference.decode.programs')
def prefill_later_piece(target: Target) -> Call:
    return prefilling(target, PIECES[-1], fresh=False)


def decoding(target: Target, int8: bool) -> Call:
    """Up to CHUNK tokens of every row."""
    return Call(decode.programs(target.devices[0])[1], (*held(target, int8), int32(), int32()), target.decoding, decodes=True)


@program('inference.decode.programs')
def decode_tokens(target: Target) -> Call:
    return decoding(target, int8=False)


@program('inference.decode.programs')
def decode_tokens_int8(target: Target) -> Call:
    return decoding(target, int8=True)


@program('inference.decode.kept')
def keep_decoded(target: Target) -> Call:
    _, cache, rows = held(target)
    _, recent, _ = held(target, places=decode.CHUNK)
    return Call(decode.kept, (cache, recent, rows), target.decoding)


@program('inference.decode.copied')
def copy_rows(target: Target) -> Call:
    lines = 4 * shards(target.decoding)
    used = jax.ShapeDtypeStruct((lines,), bool)
    return Call(decode.copied, (held(target).cache, int32(lines), int32(lines), used), target.decoding)


@program('inference.decode.resized')
def resize_cache(target: Target) -> Call:
    return Call(decode.resized, (held(target).cache,), target.decoding, {'places': 1024})


@program('inference.decode._finish')
def lay_out_layers(target: Target) -> Call:
    sharding = NamedSharding(target.decoding, P(None, *parameter_spec('w_gate_DF')))
    shape = (target.model.layers, target.model.dim, target.model.hidden)
    stack = jax.ShapeDtypeStruct(shape, target.compute.dtype, sharding=sharding)
    return Call(decode._finish, (stack, 'w_gate_DF', True), target.decoding)


@program('inference.likelihood.programs')
def likelihood_read(target: Target) -> Call:
    weights, cache, _ = held(target, places=64)
    rows = cache[0][0].shape[0]
    packed = likelihood.Packed(*[int32(rows, likelihood.STEP)] * 4)
    read, _ = likelihood.programs(target.devices[0])
    return Call(read, (weights, cache, packed, int32(rows)), target.decoding, decodes=True)


@program('inference.likelihood.programs')
def likelihood_pick(target: Target) -> Call:
    weights, cache, _ = held(target, places=64)
    rows = cache[0][0].shape[0]
    shape, sharding = (rows, likelihood.STEP, target.model.dim), NamedSharding(target.decoding, spec('BLD'))
    hidden = jax.ShapeDtypeStruct(shape, target.compute.dtype, sharding=sharding)
    _, pick = likelihood.programs(target.devices[0])
    asked = [int32(rows, likelihood.SIZES[0])] * 3
    return Call(pick, (weights, cache, hidden, *asked), target.decoding, decodes=True)


def lower(call: Call) -> jax.stages.Lowered:
    """The program for the devices of its mesh, which must be set."""
    return call.function.lower(*on_mesh(call), **call.keywords)


def on_mesh(call: Call) -> tuple:
    """The arguments bound to the mesh; static ones stay."""
    return tuple(aot.on_mesh(x, call.mesh) if not isinstance(x, str | bool) else x for x in call.arguments)


def options(call: Call) -> Mapping[str, str]:
    """The compiler options that the program runs with."""
    device = call.mesh.devices.flat[0]
    return decode.compiler_options(device) if call.decodes else compiler_options(device)
