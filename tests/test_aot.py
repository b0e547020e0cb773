"""Dry runs: what is counted, against arithmetic and an independent reader; what fits; and the real sizes."""

import dataclasses
import json
import runpy
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import MODELS, ModelConfig, UserError
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.inference.plan import compile_step
from llama2_jax.mesh import BATCH_AXES, MeshConfig, decoding_mesh, make_mesh
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.planning import aot
from llama2_jax.planning.cost import read_program
from llama2_jax.rl import plan as ppo_plan
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.runtime import CHIPS, compiler_options
from llama2_jax.stages import pretrain

SMALL = ModelConfig(vocab_size=1024, dim=256, layers=3, heads=2, kv_heads=1, head_dim=128, hidden=512, context=512)


def config(model, batch_size, length, remat='none', **mesh):
    return pretrain.PretrainConfig(
        model=model,
        data=DataConfig(mixture='toy:documents'),
        compute=ComputeConfig(remat=remat),
        mesh=MeshConfig(**mesh),
        batch_size=batch_size,
        length=length,
    )


def compiled_for(config, topology):
    """A compiled pretraining step and its mesh."""
    mesh = make_mesh(config.mesh, aot.topology_devices(topology))
    array = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32, sharding=NamedSharding(mesh, P(BATCH_AXES)))
    with jax.set_mesh(mesh):
        state, _, step = pretrain.build(config, config.compute.on('tpu'))
        return aot.compile_step(step, state, {'tokens': array, 'segment_ids': array}, mesh), mesh


@pytest.fixture(scope='module')
def small():
    """A small model on four chips: (compiled, mesh)."""
    return compiled_for(config(SMALL, 8, 512), 'v5e:2x2')


def test_loops_and_collectives_are_counted_as_often_as_they_run():
    mesh = make_mesh(MeshConfig())

    @jax.jit
    def step(x, w):
        def layer(x, _):
            return jax.sharding.reshard(jnp.tanh(x @ jax.sharding.reshard(w, P())), P('fsdp')), None

        return jax.lax.scan(layer, x, length=5)[0]

    with jax.set_mesh(mesh):
        x, w = (jax.ShapeDtypeStruct((64, n), jnp.float32, sharding=NamedSharding(mesh, P('fsdp'))) for n in (64, 64))
        compiled = aot.compile_step(step, x, w, mesh)
    report = aot.analyse(compiled, mesh, tokens=64, model_flops=5 * 2 * 64**3)
    assert report.program.flops == 5 * 2 * 8 * 64 * 64  # a device has 8 of 64 rows
    gathers = report.program.collectives['all-gather']
    assert (gathers.payload / gathers.count, gathers.wire / gathers.payload) == (4 * 64 * 64, 7 / 8)
    assert (report.chips, report.chip, report.arguments, report.mfu) == (8, None, 2 * 4 * 8 * 64, None)
    assert 'all-gather' in str(report) and 'predicted' not in str(report)


def test_a_loop_whose_first_turn_was_peeled_off():
    text = """HloModule m

%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %x = f32[4,4] get-tuple-element(%p), index=1
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]) tuple(%next, %y)
}

%condition (q: (s32[], f32[4,4])) -> pred[] {
  %q = (s32[], f32[4,4]) parameter(0)
  %m = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%m, %limit), direction=LT
}

ENTRY %main (a: f32[4,4]) -> (s32[], f32[4,4]) {
  %a = f32[4,4] parameter(0)
  %begin = s32[] constant(1)
  %start = s32[] copy(%begin)
  %init = (s32[], f32[4,4]) tuple(%start, %a)
  ROOT %loop = (s32[], f32[4,4]) while(%init), condition=%condition, body=%body
}
"""
    assert read_program(text).flops == 4 * 2 * 4**3


def test_dry_run_of_the_stage_here():
    report = pretrain.dry_run(config(MODELS['tiny'], 8, 64), None)
    # Plain attention computes both halves of the scores, so half of attention comes on top of the model's own FLOPs.
    attention = 6 * 4 * 4 * 32 * 63 * 8 * 64 / 8
    assert report.program.flops == pytest.approx(report.model_flops + attention, rel=0.02)
    assert report.arguments > 12 * MODELS['tiny'].parameters / 8
    assert report.program.seconds is None


def test_flops_of_a_tpu_program(small):
    compiled, mesh = small
    tokens = 8 * 512
    report = aot.analyse(compiled, mesh, tokens, SMALL.flops_per_token(512) * tokens)
    # The fused backward kernel multiplies five times, the model counts four.
    kernels = 7 / 6 * 6 * SMALL.layers * 2 * 128 * 512 * tokens / 4
    products = 6 * (SMALL.parameters - 1024 * 256 - 7 * 256) * tokens / 4
    assert report.program.flops == pytest.approx(kernels + products, rel=0.005)
    assert report.model_flops / report.chip.peak_flops < report.program.seconds < 1e-2
    assert report.mfu == pytest.approx(report.model_flops / 197e12 / report.program.seconds)
    assert 12 * SMALL.parameters / 4 < report.arguments < 1.1 * 12 * SMALL.parameters / 4
    # In bfloat16, layers are gathered for the forward and for the backward pass, embedding and head once; norms are not cut.
    embeddings, norms = 2 * 1024 * 256, 7 * 256
    layers = SMALL.parameters - embeddings - norms
    moved = report.program.collectives
    assert moved['all-gather'].payload == 2 * (2 * layers + embeddings)
    reduced = sum(moved[kind].payload for kind in ('all-reduce', 'reduce-scatter'))
    assert reduced == pytest.approx(2 * SMALL.parameters, rel=1e-3)
    assert 'predicted step' in str(report) and '17.2 GB' in str(report)


def test_program_reads_as_by_the_independent_reader(small, fixtures):
    analyze = runpy.run_path(str(fixtures / 'hlo_stats.py'))['analyze']
    text = small[0].text
    theirs, ours = analyze(text, 'v5e'), read_program(text, CHIPS['TPU v5 lite'])
    assert ours.flops == pytest.approx(theirs['dot_flops'] + theirs['kernel_flops'], rel=1e-3)
    assert ours.seconds == pytest.approx(theirs['pred_s'], rel=1e-3)
    assert set(ours.collectives) == set(theirs['collectives'])
    for kind, total in ours.collectives.items():
        other = theirs['collectives'][kind]
        assert (total.count, total.payload) == (other['count'], pytest.approx(other['payload']))
        assert (total.wire, total.asynchronous) == pytest.approx((other['wire'], other['async_wire']))


def test_gradients_summed_over_microbatches_compile(small):
    """The compiler stopped at them; each microbatch of two rows a chip takes half of the FLOPs of four."""
    halved = compiled_for(dataclasses.replace(config(SMALL, 8, 512), accumulation=2), 'v5e:2x2')
    whole, halves = (aot.analyse(*program, 8 * 512, 0).program.flops for program in (small, halved))
    assert halves == pytest.approx(whole, rel=0.02)


def test_too_little_memory_is_one_sentence(small):
    with pytest.raises(UserError, match=r'needs [\d.]+G of the 15.75G of memory'):
        compiled_for(config(MODELS['7b'], 4, 4096, remat='full'), 'v5e:2x2')
    report = dataclasses.replace(aot.analyse(*small, tokens=1, model_flops=1), temporaries=20 * 10**9)
    with pytest.raises(UserError, match=r'needs 20.0 GB on every v5e chip, which has 17.2 GB'):
        report.check()


@pytest.mark.parametrize(
    ('name', 'chips'), [('v5e:1x1', 1), ('v6e:1x4', 4), ('v5e:2x4', 8), ('v5p:2x2x1', 4), ('v5p:4x8x8', 256), ('v4:2x2x1', 4)]
)
def test_topology_has_a_device_for_each_chip(name, chips):
    devices = aot.topology_devices(name)
    assert len(devices) == chips and {device.core_on_chip for device in devices} == {0}
    assert aot.chip_of(devices[0]).name == name.split(':')[0]


@pytest.mark.parametrize(
    'name', ['v9:4x4', 'v5p-512', 'v5e:3x5', 'v6e:0x1', 'v5e:-1x2', 'v5e:', 'v5e:4', 'v5e:2x2;', ' v5e:2x2', '4x4']
)
def test_wrong_topology_is_named(name):
    with pytest.raises(UserError, match=f'{name}.* v5e:16x16'):
        aot.topology_devices(name)


@pytest.mark.parametrize(('dry_run', 'topology', 'named'), [(False, 'v5e:2x2', 'v5e:2x2 .*--dry_run'), (True, '', 'empty')])
def test_topology_goes_with_a_dry_run(dry_run, topology, named):
    compiles_only = runpy.run_path(str(Path(__file__).parents[1] / 'experiments' / 'common.py'))['compiles_only']
    with pytest.raises(UserError, match=f'--topology.*{named}'):
        compiles_only(dry_run, topology)
    assert compiles_only(True, 'v5e:2x2') and not compiles_only(False, None)


def test_missing_compiler(monkeypatch):
    def missing(**_):
        raise jax.errors.JaxRuntimeError('NOT_FOUND: libtpu.so')

    monkeypatch.setattr(topologies, 'get_topology_desc', missing)
    with pytest.raises(UserError, match='pip install libtpu'):
        aot.topology_devices('v5e:2x2')


def test_another_compiler_than_the_pods_is_named(monkeypatch):
    [device] = aot.topology_devices('v5e:1x1')
    assert aot.compiler_of(device) == f'libtpu {metadata.version("libtpu")}'
    monkeypatch.setattr(metadata, 'version', lambda name: '0.0.1')
    assert aot.compiler_of(device).startswith(f'libtpu 0.0.1, but jax[tpu]=={jax.__version__} installs libtpu==0.0.')
    assert aot.compiler_of(jax.devices()[0]) == 'jaxlib 0.0.1'


def test_options_by_chip():
    assert compiler_options(jax.devices()[0]) == {}
    assert list(compiler_options(aot.topology_devices('v5e:2x2')[0])) == ['xla_disable_hlo_passes']
    assert (
        compiler_options(aot.topology_devices('v5p:2x2x1')[0])['xla_tpu_enable_sparse_core_collective_offload_all_gather']
        == 'true'
    )


def test_a_plan_of_ppo_here():
    """What is held, from the count of parameters; without a value model there is none of it."""
    small = PPOConfig(init_from='tiny', prompts=PromptConfig(longest=64), max_new_tokens=64, batch_size=16, minibatch_size=8)
    plan = ppo_plan.dry_run(dataclasses.replace(small, decode_batch=8, rewards=RewardsConfig(batch_size=8)), None)
    shares = {name: bytes_ / (4 * MODELS['tiny'].parameters / 8) for name, bytes_ in plan.held.items()}
    assert shares['policy and optimizer'] == pytest.approx(3, rel=0.02)
    assert shares['reference'] == pytest.approx(1, rel=0.02)
    assert shares['value and optimizer'] == pytest.approx(3, rel=0.15)  # no head, but a score
    assert [(phase.name, phase.times) for phase in plan.phases] == [
        ('generate', 128),
        ('score', 4),
        ('prepare', 1),
        ('update', 2),
    ]
    assert 'predicted' not in str(plan) and '8 × cpu' in str(plan)
    alone = ppo_plan.dry_run(dataclasses.replace(small, decode_batch=8, samples=2, advantages='rloo'), None)
    assert alone.held['value and optimizer'] == 0 and alone.phases[3].report.program.flops < plan.phases[3].report.program.flops


@pytest.mark.slow
def test_ppo_of_the_largest_model_fits():
    """Everything resident together, with the paper's batch, in less time than the paper's 330 s an iteration (p16)."""
    some = PPOConfig(init_from='70b', compute=ComputeConfig(remat='full'), mesh=MeshConfig(fsdp=64, tensor=-1), decode_batch=512)
    plan = ppo_plan.dry_run(some, 'v5p:8x8x8')
    learners = 12 * MODELS['70b'].parameters / 512
    assert plan.held['policy and optimizer'] == pytest.approx(learners, rel=0.01) and plan.peak < 20e9
    assert 10 < sum(phase.times * phase.report.program.seconds for phase in plan.phases) < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ('model', 'topology', 'chips', 'remat'),
    [
        ('7b', 'v5e:16x16', 256, 'q+k+v+attention'),
        ('70b', 'v5p:8x8x8', 512, 'q+k+v+attention'),
        ('70b', 'v5e:16x16', 256, 'offload'),
    ],
)
def test_the_real_sizes_compile_and_fit(model, topology, chips, remat):
    report = pretrain.dry_run(config(MODELS[model], chips, 4096, remat=remat), topology)
    assert report.arguments > 12 * MODELS[model].parameters / chips
    assert 0.3 < report.mfu < 0.7
    # As docs/hardware.md says: a slower or larger program shows here.
    results = json.loads((Path(__file__).parents[1] / 'benchmarks' / 'tpu_programs.json').read_text())
    figures = results[f'pretrain llama2_{model} {topology} batch_size={chips} length=4096 compute.remat={remat}'][report.compiler]
    assert report.program.seconds == pytest.approx(figures['seconds'], rel=0.01)
    assert report.memory == pytest.approx(figures['memory'], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('model', 'topology', 'batch_size', 'int8', 'times_the_bound'),
    [('7b', 'v5e:1x1', 1, True, 1.5), ('70b', 'v5p:2x2x4', 64, False, 3.1)],
)
def test_decoding_compiles_fits_and_gathers_no_weights(model, topology, batch_size, int8, times_the_bound):
    """With 4,096 tokens in each sequence's cache; the bound is to read weights and cache once."""
    mesh = decoding_mesh(MODELS[model], aot.topology_devices(topology))
    report, bound = compile_step(MODELS[model], mesh, batch_size, 4096, int8)
    report.check()
    weights = MODELS[model].parameters * (1 if int8 else 2) / mesh.size
    cache = 2 * MODELS[model].layers * MODELS[model].kv_heads * 128 * 2 * 4096 * batch_size / mesh.size
    assert weights + cache < report.arguments < 1.1 * (weights + cache)
    assert bound < report.program.seconds < times_the_bound * bound
    # Activations travel, weights stay: sums of [B, D] twice a layer, and rows traded for heads.
    traffic = sum(total.payload for total in report.program.collectives.values())
    assert traffic < 1.5 * 2 * MODELS[model].layers * batch_size * MODELS[model].dim * 2
