"""Every program compiles for TPUs, and is lowered for GPUs: see programs.py."""

import ast
from pathlib import Path

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from programs import COVERED, DECODING, EXEMPT, PROGRAMS, Target, lower, on_mesh, options

from llama2_jax.planning import aot

ROOT = Path(__file__).parents[1]
WITHOUT_ATTENTION = ('_init', 'first_', 'merge', 'to_int8')
ATTENDING = {name for name in set(PROGRAMS) - DECODING if not any(part in name for part in WITHOUT_ATTENTION)}
WIDE = ('pretrain_step', 'lora_int8_step', 'score_long_rows', 'decode_tokens', 'likelihood_read')  # more take too long
CHEAP = ('score_short_rows', 'reward_heldout')  # in the default suite


def jitted(path):
    """Names of the functions of a module in which `jax.jit` is used, as decorator or call."""
    module = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')

    def visit(node, names):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = (*names, node.name)
        if isinstance(node, ast.Attribute) and node.attr in ('jit', 'pmap') and getattr(node.value, 'id', '') == 'jax':
            yield '.'.join((module, *names))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, names)

    return set(visit(ast.parse(path.read_text()), ()))


def test_every_jit_is_in_the_registry():
    found = set().union(*(jitted(path) for path in (ROOT / 'llama2_jax').rglob('*.py')))
    assert found == COVERED | set(EXEMPT)


def compile_for(name, topology, big):
    target = Target('tpu', tuple(aot.topology_devices(topology)), big)
    with jax.set_mesh(target.decoding if name in DECODING else target.mesh):
        call = PROGRAMS[name](target)
        return aot.compile_lowered(lower(call), call.mesh, options(call))


@pytest.mark.parametrize('name', CHEAP)
def test_toy_program_compiles_for_one_chip(name):
    assert compile_for(name, 'v5e:1x1', big=False).temporaries > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(set(PROGRAMS) - set(CHEAP)))
def test_every_toy_program_compiles_for_one_chip(name):
    compile_for(name, 'v5e:1x1', big=False)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x1'])
@pytest.mark.parametrize('name', WIDE)
def test_program_as_wide_as_7b_compiles(name, topology):
    compile_for(name, topology, big=True)


@pytest.mark.slow
@pytest.mark.parametrize('big', [False, True], ids=['toy', '7b'])
@pytest.mark.parametrize('name', PROGRAMS)
def test_program_is_lowered_for_gpus(name, big, monkeypatch):
    """As far as it goes without one: cuDNN takes dtypes and shapes, its version is assumed."""
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
    target = Target('cuda', tuple(jax.devices()[:1]), big)
    trusted = [f'__cudnn$fmha{kind}{way}' for kind in ('Softmax', 'ScaleBiasSoftmax') for way in ('', 'Backward')]
    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in trusted]
    with jax.set_mesh(target.decoding if name in DECODING else target.mesh):
        call = PROGRAMS[name](target)
        exported = jax.export.export(call.function, platforms=['cuda'], disabled_checks=checks)(*on_mesh(call), **call.keywords)
    assert exported.platforms == ('cuda',)
    assert ('__cudnn$fmha' in str(exported.mlir_module())) == (name in ATTENDING)
