"""A PPO iteration compiled without running it: what each phase takes, and whether all fits the same chips at the same time."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.checkpoints.load import shape_of
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.inference import decode
from llama2_jax.inference.plan import compile_step
from llama2_jax.inference.scorer import scoring
from llama2_jax.mesh import BATCH_AXES, decoding_mesh, make_mesh
from llama2_jax.model.llama import Llama
from llama2_jax.model.reward import ScoreModel
from llama2_jax.planning import aot
from llama2_jax.rl.ppo import PPOConfig, build, check_shapes
from llama2_jax.train.devices import abstract_batch


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase: its program, how often it runs in an iteration, and the bytes it needs on a chip beside what always lies there."""

    name: str
    report: aot.Report
    times: int
    needs: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an iteration takes.

    Attributes:
      held: bytes on a chip, by what lies there all the time.
      phases: in their order.
    """

    held: dict[str, int]
    phases: list[Phase]

    @property
    def peak(self) -> int:
        """Bytes on a chip at the fullest moment."""
        return sum(self.held.values()) + max(phase.needs for phase in self.phases)

    def check(self) -> None:
        """Raises a UserError if the chip has too little memory."""
        chip = self.phases[0].report.chip
        if chip and self.peak > chip.memory:
            raise UserError(
                f'PPO needs {self.peak / aot.GB:.1f} GB on every {chip.name} chip, which has {chip.memory / aot.GB:.1f} GB: '
                'use more chips, shorter answers, smaller batches or lora.rank.'
            )

    def __str__(self) -> str:
        report = self.phases[0].report
        limit = f' of {report.chip.memory / aot.GB:.1f}' if report.chip else ''
        rows = [
            ('chips', f'{report.chips} × {report.kind}'),
            ('compiler', report.compiler),
            ('memory a chip', f'{self.peak / aot.GB:.2f}{limit} GB at the fullest'),
        ]
        rows += [(f'  {name}', f'{size / aot.GB:.2f} GB') for name, size in self.held.items()]
        total = 0.0
        for phase in self.phases:
            seconds = phase.report.program.seconds
            timing = f', {phase.times} × {seconds:.3f} s = {phase.times * seconds:.1f} s' if seconds else ''
            total += phase.times * (seconds or 0)
            rows.append((f'  {phase.name}', f'{phase.needs / aot.GB:.2f} GB{timing}'))
        if total:
            rows.append(('an iteration', f'{total:.0f} s predicted, if every answer has max_new_tokens'))
        return '\n'.join(f'{name:<24} {value}' for name, value in rows)


def dry_run(config: PPOConfig, topology: str | None) -> Plan:
    """Compiles all programs of an iteration for the local devices, or for a TPU topology that need not be attached.

    Raises:
      UserError: the mesh does not divide the config, there is no such slice, or all together do not fit its chips.
    """
    model = shape_of(config.init_from or 'tiny')
    given = list(config.rewards.models.values())
    score = shape_of(given[0]) if given else model
    value = shape_of(config.value_from) if config.value_from else score
    judges = len(given) if config.rewards.are_given else 2
    devices = aot.topology_devices(topology) if topology else None
    mesh, decoding = make_mesh(config.mesh, devices), decoding_mesh(model, devices)
    check_shapes(config, model, value, mesh)
    compute = config.compute.on(mesh.devices.flat[0].platform)
    with jax.set_mesh(mesh):
        programs = build(config, model, value, compute)
        reference, judge = (
            jax.eval_shape(lambda k=kind, c=c: cast(k(c, jax.random.key(0)), compute.dtype))
            for kind, c in ((Llama, model), (ScoreModel, score))
        )
        held = {
            'policy and optimizer': size(programs.abstract.policy, mesh),
            'value and optimizer': size(programs.abstract.value, mesh),
            'reference': size(reference, mesh),
            'reward models': judges * size(judge, mesh),
        }
        phases = learning(config, programs, reference, judge, judges, mesh, compute)
    with jax.set_mesh(decoding):
        held['policy to decode'] = size(decode.abstract_weights(model, compute.dtype), decoding)
    plan = Plan(held, [generating(config, model, decoding), *phases])
    plan.check()
    return plan


def generating(config: PPOConfig, model: ModelConfig, mesh: Mesh) -> Phase:
    """A step of decoding, with all answers that are drawn at a time in the cache."""
    report, _ = compile_step(model, mesh, config.decode_batch, config.length, False)
    dtype = 'bfloat16' if mesh.devices.flat[0].platform != 'cpu' else 'float32'
    with jax.set_mesh(mesh):
        cache = size(jax.eval_shape(lambda: decode.empty_cache(model, config.decode_batch, config.length, dtype)), mesh)
    times = -(-config.batch_size // config.decode_batch) * config.max_new_tokens
    return Phase('generate', report, times, cache + report.temporaries)


def learning(config: PPOConfig, programs: Any, reference: Any, judge: Any, judges: int, mesh: Mesh, compute: Any) -> list[Phase]:
    """Scoring with all reward models, `prepare`, and `update` on each minibatch."""
    names = {'tokens': jnp.int32, 'answer': bool, 'logprobs': jnp.float32}
    batch = abstract_batch(mesh, config.batch_size, config.length, **names)
    row = NamedSharding(mesh, P(BATCH_AXES))
    batch['score'] = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32, sharding=row)
    answers = -(-config.rewards.batch_size // row.num_devices) * row.num_devices
    tokens = jax.ShapeDtypeStruct((answers, config.length), jnp.int32, sharding=row)
    last = jax.ShapeDtypeStruct((answers,), jnp.int32, sharding=row)
    score = jax.jit(lambda model, given: scoring(compute)(model, *given))
    given = reference, jax.ShapeDtypeStruct((), jnp.float32), batch
    minibatch = jax.eval_shape(programs.prepare, aot.on_mesh(programs.abstract, mesh), aot.on_mesh(given, mesh))[0][0]
    frozen = reference if config.lora.rank else None
    learned = config.batch_size * config.length

    def phase(name: str, program: Any, state: Any, given: Any, times: int, own: int) -> Phase:
        report = aot.analyse(aot.compile_step(program, state, given, mesh), mesh, learned // times, 0)
        return Phase(name, report, times, report.temporaries + own)

    minibatches = config.updates * size(minibatch, mesh)
    return [
        phase('score', score, judge, (tokens, last), judges * -(-config.batch_size // answers), size((tokens, last), mesh)),
        phase('prepare', programs.prepare, programs.abstract, given, 1, size(batch, mesh)),
        phase('update', programs.update, programs.abstract, (frozen, minibatch), config.updates, minibatches),
    ]


def cast(model: Any, dtype: str) -> Any:
    """The parameters in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), model)


def size(tree: Any, mesh: Mesh) -> int:
    """Bytes on one device."""
    leaves = jax.tree.leaves(aot.on_mesh(tree, mesh))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
