"""However a run is cut over devices and processes, its numbers are those of one device."""

import contextlib
import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import ModelConfig
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.mesh import MeshConfig, make_mesh, reshard, shard_batch
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.ops.attention import attention
from llama2_jax.stages import pretrain
from llama2_jax.stages.pretrain import PretrainConfig
from llama2_jax.train.optimizer import OptimizerConfig

MODEL = ModelConfig(vocab_size=64, dim=32, layers=2, heads=8, kv_heads=4, head_dim=8, hidden=48, context=32)
CONFIG = PretrainConfig(
    model=MODEL,
    data=DataConfig(mask_documents=True),
    optimizer=OptimizerConfig(peak_lr=0.001, warmup_steps=0),
    tokens=16 * 16 * 10,
    batch_size=16,
    length=16,
)
MESHES = [
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(fsdp=2, tensor=4),
    MeshConfig(replica=2, fsdp=4),
    MeshConfig(replica=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=4, sequence=2),
    MeshConfig(fsdp=2, sequence=2, tensor=2),
    MeshConfig(replica=2, sequence=2, tensor=2, fsdp=1),
]


def batch(seed):
    """Rows of up to three documents and, in some, padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(64, size=(16, 17)).astype(np.int32)
    ends = np.sort(rng.integers(1, 17, size=(16, 2)), axis=1)
    segments = 1 + (np.arange(17) >= ends[:, :1]) + (np.arange(17) >= ends[:, 1:])
    segments[3:6, 9:] = 0
    return {'tokens': tokens, 'segment_ids': segments.astype(np.int32)}


def mesh_of(config):
    """The mesh of a config over as many of the eight devices as it names; None: no mesh at all."""
    if config is None:
        return contextlib.nullcontext()
    count = int(np.prod(dataclasses.astuple(config)))
    return jax.set_mesh(make_mesh(config, jax.devices()[:count]))


@cache
def first_state():
    """Made without a mesh."""
    _, init, _ = pretrain.build(CONFIG, ComputeConfig().on('cpu'))
    return jax.tree.map(np.asarray, init())


def place(state, abstract, mesh):
    """The state on the mesh, as its abstract twin says."""
    if mesh.empty:
        return jax.tree.map(jnp.asarray, state)
    specs = jax.tree.map(lambda x: x.sharding.spec if x.sharding else P(), abstract)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), state, specs)


def compiled(function, *arguments):
    """Compiled in half the time, to code that is slow."""
    return function.lower(*arguments).compile(compiler_options={'xla_backend_optimization_level': 0})


def train(mesh_config, accumulation=1, steps=2):
    """Whole steps: the state's leaves and the metrics as numpy. Adam's first moments show the gradients."""
    with mesh_of(mesh_config):
        config = dataclasses.replace(CONFIG, accumulation=accumulation)
        abstract, _, step = pretrain.build(config, config.compute.on('cpu'))
        mesh, metrics = jax.sharding.get_mesh(), []
        state = place(first_state(), abstract, mesh)
        for k in range(steps):
            arrays = batch(k) if mesh.empty else {name: shard_batch(array, mesh) for name, array in batch(k).items()}
            step = step if k else compiled(step, state, arrays)
            state, figures = step(state, arrays)
            metrics.append({name: float(value) for name, value in figures.items()})
        return jax.tree.map(np.asarray, (state.params, state.opt_state)), metrics


@cache
def single():
    return train(MeshConfig(fsdp=1))


def check(result, expected, atol):
    """Parameters may differ by more: where a gradient is about 0, Adam divides its last bits by eps."""
    for name in expected[1][-1]:
        assert [m[name] for m in result[1]] == pytest.approx([m[name] for m in expected[1]], rel=atol, abs=atol), name
    for part, wanted, factor in zip(result[0], expected[0], (3, 1), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=factor * atol), part, wanted)


@pytest.mark.parametrize('mesh', [None, *MESHES], ids=lambda m: m and 'x'.join(map(str, dataclasses.astuple(m))))
def test_two_steps_are_those_of_one_device(mesh):
    check(train(mesh), single(), 2e-6)


def test_single_device_run_is_sensible():
    """So that the comparisons above are not of nothing: the first loss is near log V, gradients move all parameters."""
    (params, _), metrics = single()
    assert abs(metrics[0]['loss'] - np.log(64)) < 0.5
    assert metrics[0]['tokens'] == program.trained(batch(0)['segment_ids'], mask_documents=True)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max() > 5e-4, params, first_state().params)))


def test_first_state_is_that_of_one_device():
    with mesh_of(MeshConfig(replica=1, fsdp=2, sequence=2, tensor=2)):
        _, init, _ = pretrain.build(CONFIG, ComputeConfig().on('cpu'))
        state = compiled(init)()
        for parameter, *moments in zip(*map(jax.tree.leaves, (state.params, *moments_of(state))), strict=True):
            assert all(moment.sharding == parameter.sharding for moment in moments)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), state, first_state())


def moments_of(state):
    """Adam's two."""
    adam = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda part: hasattr(part, 'mu')) if hasattr(part, 'mu')
    )
    return adam.mu, adam.nu


@pytest.mark.parametrize('mesh', [MeshConfig(fsdp=1), MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=['single', 'sharded'])
def test_accumulation_changes_nothing(mesh):
    check(train(mesh, accumulation=4), single(), 1e-6)


@pytest.mark.parametrize('mesh', [None, MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=['unsharded', 'sharded'])
def test_packed_documents_do_not_see_each_other(mesh):
    model = first_state().params
    rng = np.random.default_rng(0)
    documents = [rng.integers(64, size=size) for size in (5, 8, 3)]
    packed = np.concatenate(documents)[None].repeat(2, axis=0).astype(np.int32)
    segments = np.repeat([1, 2, 3], [5, 8, 3])[None].repeat(2, axis=0).astype(np.int32)
    forward = jax.jit(lambda model, *arrays: model.logits(model(*arrays)))
    alone = np.concatenate([forward(model, document[None].astype(np.int32))[0] for document in documents])
    with mesh_of(mesh):
        if mesh:
            abstract, _, _ = pretrain.build(CONFIG, ComputeConfig().on('cpu'))
            model = place(model, abstract.params, jax.sharding.get_mesh())
            packed, segments = (reshard(jnp.asarray(array), 'BL') for array in (packed, segments))
        together = np.asarray(forward(model, packed, segments))
        crossing = np.asarray(forward(model, packed))
    for row in together:
        np.testing.assert_allclose(row, alone, rtol=0, atol=1e-5)
    assert np.abs(crossing[0] - alone)[5:].max() > 0.1


@pytest.mark.parametrize('mask_documents', [False, True])
def test_padding_never_counts(mask_documents):
    config = dataclasses.replace(CONFIG, data=DataConfig(mask_documents=mask_documents))
    _, _, step = pretrain.build(config, config.compute.on('cpu'))
    one = batch(0)
    other = one | {'tokens': np.where(one['segment_ids'] == 0, 63 - one['tokens'], one['tokens'])}
    step = compiled(step, first_state(), one)
    results = [step(jax.tree.map(jnp.asarray, first_state()), arrays) for arrays in (one, other)]
    assert not np.array_equal(one['tokens'], other['tokens'])
    assert float(results[0][1]['tokens']) == program.trained(one['segment_ids'], mask_documents)
    jax.tree.map(np.testing.assert_array_equal, *jax.tree.map(np.asarray, results))


@pytest.mark.parametrize('segmented', [False, True])
@pytest.mark.parametrize(
    ('mesh', 'length'),
    [(MeshConfig(fsdp=2, tensor=2), 256), (MeshConfig(fsdp=1, sequence=2, tensor=2), 256), (MeshConfig(fsdp=1, sequence=4), 200)],
    ids=['fsdp', 'sequence', 'odd'],
)
def test_splash_on_a_mesh(mesh, length, segmented):
    """Outputs and gradients of the TPU kernel, interpreted, cut over heads, rows and length, against the reference."""
    rng = np.random.default_rng(0)
    q, target = rng.normal(size=(2, 2, length, 4, 32)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, 2, 32)).astype(np.float32)
    segments = np.repeat([[1, 2, 3], [1, 2, 0]], [100, 60, 96], axis=1)[:, :length].astype(np.int32) if segmented else None

    def run(q, k, v, segments, **options):
        if not jax.sharding.get_abstract_mesh().empty:
            q, k, v = (reshard(x, letters) for x, letters in ((q, 'BLHK'), (k, 'BLGK'), (v, 'BLGK')))
            segments = None if segments is None else reshard(segments, 'BL')

        def loss(q, k, v):
            out = attention(q, k, v, segments, **options)
            return jnp.sum(out * reshard(target, 'BLHK')), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    expected = jax.jit(run)(q, k, v, segments)
    with mesh_of(mesh):
        result = jax.jit(partial(run, implementation='splash', interpret=True))(q, k, v, segments)
        reference = jax.jit(run)(q, k, v, segments)
    for found in (result, reference):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), found[1], expected[1])
        np.testing.assert_allclose(found[0][1], expected[0][1], rtol=0, atol=1e-5)


def test_two_processes_are_one(tmp_path):
    """The whole stage on a small text: two processes of four devices, and one of eight."""
    text, cache = program.write_text(tmp_path / 'text.txt'), str(tmp_path / 'cache')
    options = {'text': text, 'cache': cache, 'steps': 6}
    program.finish(*program.launch_several(tmp_path / 'two', 2, 4, **options))
    program.finish(program.launch(tmp_path / 'one', 8, **options))
    one, two = program.trace(tmp_path / 'one'), program.trace(tmp_path / 'two')
    assert len(one) == len(two) == 6
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(program.final(tmp_path / 'two'), program.final(tmp_path / 'one'), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_mistake_that_one_process_meets_ends_all(tmp_path):
    """Process 0 alone trains the tokenizer, with too few pieces, while the other waits for it."""
    options = {'text': program.write_text(tmp_path / 'text.txt'), 'cache': str(tmp_path / 'cache'), 'vocab_size': 300}
    first, second = program.launch_several(tmp_path / 'run', 2, 1, **options)
    try:
        _, error = first.communicate(timeout=60)
        assert first.returncode == 1
        assert (
            error.splitlines()[-1] == 'Error: A vocabulary of 300 is too small: the bytes and characters of this text need 322.'
        )
        second.communicate(timeout=60)
        assert second.returncode != 0
    finally:
        second.kill()
