"""Reading compiled programs: dumps of one toy program under each line of JAX versions, kept in dumps/.

`python tests/train/test_hlo.py` writes the dump of the JAX that runs it.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.mesh import PARAMETERS, MeshConfig, make_mesh, spec
from llama2_jax.ops.linear import linear
from llama2_jax.planning import aot
from llama2_jax.planning.cost import read_program
from llama2_jax.planning.hlo import read_memory
from llama2_jax.runtime import CHIPS

LAYERS, B, L, D, F = 5, 4, 128, 256, 512
USED = 4  # chips
DUMPS = sorted((Path(__file__).parent / 'dumps').glob('*.txt'))


def compile_toy():
    """Gradients of a stack of layers of two matrices each, float32 [D, F] cut over D on four chips, in use as bfloat16."""
    mesh = make_mesh(MeshConfig(), aot.topology_devices('v5e:2x2'))

    def loss(weights, x_BLD):
        def layer(x_BLD, weights):
            up_DF, down_DF = weights
            return x_BLD + linear('BLF,DF->BLD', jnp.tanh(linear('BLD,DF->BLF', x_BLD, up_DF)), down_DF), None

        return jax.lax.scan(layer, x_BLD, weights)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        rest = NamedSharding(mesh, P(None, *spec('DF', PARAMETERS)))
        weights = (jax.ShapeDtypeStruct((LAYERS, D, F), jnp.float32, sharding=rest),) * 2
        x_BLD = jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16, sharding=NamedSharding(mesh, spec('BLD')))
        return aot.compile_step(jax.jit(jax.grad(loss)), weights, x_BLD, mesh)


def holds(program):
    """Bytes that collectives move, and FLOPs, are those that the shardings and shapes imply."""
    matrices = 2 * LAYERS * D * F
    gathered = program.collectives['all-gather'].payload
    assert gathered == 2 * 2 * matrices  # in bfloat16, for the forward and the backward pass
    reduced = sum(program.collectives[kind].payload for kind in ('all-reduce', 'reduce-scatter'))
    assert reduced == 2 * matrices  # the gradients
    assert program.flops == 3 * 2 * matrices * B * L / USED
    assert 0 < program.seconds < 1e-3


def test_toy_program_of_this_compiler():
    compiled = compile_toy()
    holds(read_program(compiled.text, CHIPS['TPU v5e']))
    assert compiled.arguments == 4 * 2 * LAYERS * D * F / USED + 2 * B * L * D / USED
    assert compiled.arguments < compiled.temporaries < 4 * compiled.arguments and compiled.host == 0


@pytest.mark.parametrize('path', DUMPS, ids=lambda path: path.stem)
def test_dump_of_each_line_of_versions(path):
    holds(read_program(path.read_text(), CHIPS['TPU v5e']))


def test_both_ways_to_write_an_element_of_a_tuple():
    """jaxlib 0.12 has `%tuple#1` where 0.10 has a get-tuple-element."""
    assert ['#' in path.read_text() for path in DUMPS] == [False, True]
    whole = 'HloModule m\n\nENTRY %main (p: (f32[8], f32[2,4])) -> f32[2,4] {\n  %p = (f32[8], f32[2,4]) parameter(0)\n'
    last = '  ROOT %r = f32[2,4] all-reduce({}), replica_groups={{{{0,1}}}}, to_apply=%add\n}}\n'
    old = read_program(whole + '  %e = f32[2,4] get-tuple-element(%p), index=1\n' + last.format('%e'))
    new = read_program(whole + last.format('%p#1'))
    assert old == new and new.collectives['all-reduce'].payload == 32


def test_memory_is_that_of_buffer_assignment():
    report = """Memory Space: default (color=0)
Total bytes: 2514254848 (2.34GiB)
  cumulative_size;       size;
Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)
Memory Space: cmem (color=5)
Total bytes: 201326592 (192.00MiB)
"""
    assert read_memory(report) == (2514254848, 201326592)


if __name__ == '__main__':
    short = re.sub(r', metadata={[^}]*}|"(flag_configs|scoped_memory_configs|input_window_bounds)":\[\],', '', compile_toy().text)
    (Path(__file__).parent / 'dumps' / f'jax-{jax.__version__}.txt').write_text(short)
