"""One suffix is the name, the sharding, the decay rule and the shape of a parameter."""

import math
from functools import partial

import jax
import pytest
from jax.sharding import PartitionSpec as P

from llama2_jax.config import MODELS
from llama2_jax.mesh import AXES, PARAMETERS, MeshConfig, make_mesh, parameter_letters, parameter_name, parameter_spec, spec
from llama2_jax.model.llama import Llama
from llama2_jax.train.optimizer import OptimizerConfig, decays, make_optimizer

COUNTS = {'7b': 6_738_415_616, '13b': 13_015_864_320, '34b': 33_743_970_304, '70b': 68_976_648_192}


def abstract(name):
    return jax.eval_shape(partial(Llama, MODELS[name]), jax.random.key(0))


def sizes(config):
    """Letter -> size."""
    return {
        'V': config.vocab_size, 'D': config.dim, 'N': config.layers, 'H': config.heads,
        'G': config.kv_heads, 'K': config.head_dim, 'F': config.hidden,
    }  # fmt: skip


def named(tree):
    """(name, letters with N in front where stacked, leaf) of every parameter."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        stacked = any(getattr(key, 'name', None) == 'blocks' for key in path)
        yield parameter_name(path), 'N' * stacked + parameter_letters(parameter_name(path)), leaf


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_obeys_its_suffix(name):
    legend = sizes(MODELS[name])
    for parameter, letters, leaf in named(abstract(name)):
        assert leaf.shape == tuple(legend[letter] for letter in letters), parameter
        assert leaf.dtype == 'float32', parameter


@pytest.mark.parametrize('name', MODELS)
def test_numbers_of_parameters(name):
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(name)))
    assert count == MODELS[name].parameters == COUNTS.get(name, count)


def test_flops_of_a_token():
    """7B: 6 for each of 6,607,077,376 weights that multiply, and 6 × 32 layers × 4096 × (L + 1) for causal attention."""
    assert MODELS['7b'].flops_per_token(4096) == 39_642_464_256 + 3_222_011_904


def test_every_parameter_is_placed_by_the_table():
    with jax.set_mesh(make_mesh(MeshConfig(replica=1, fsdp=2, sequence=2, tensor=2))):
        for parameter, letters, leaf in named(abstract('70b')):
            if len(parameter_letters(parameter)) == 1:
                assert parameter_spec(parameter) == P(None), parameter  # vectors are replicated
                continue
            expected = [PARAMETERS[letter] for letter in letters]
            placed = [(entry,) if isinstance(entry, str) else entry or () for entry in leaf.sharding.spec]
            assert placed == expected, parameter
            assert {'fsdp', 'sequence'} <= {axis for entry in placed for axis in entry}, parameter


def test_what_the_tables_do_not_know_is_an_error():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        with pytest.raises(KeyError, match='X'):
            parameter_spec('w_secret_DX')
        with pytest.raises(ValueError, match='^HF: two letters land on one mesh axis'):
            spec('HF')
        with pytest.raises(ValueError, match='^HV: two letters'):
            parameter_spec('w_HV')
    assert spec('HF') is None  # without a mesh nothing lands anywhere


def test_specs_by_hand():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        assert spec('BLD') == P(('replica', 'fsdp'), 'sequence', None)
        assert spec('BLHK') == P(('replica', 'fsdp'), 'sequence', 'tensor', None)
        assert spec('BLV') == P(('replica', 'fsdp'), 'sequence', 'tensor')
        assert parameter_spec('w_gate_DF') == P(('fsdp', 'sequence'), 'tensor')


def test_weight_decay_by_suffix():
    """Exactly the norm scales are spared, though a stacked one has rank 2."""
    mask = {name: decayed for name, _, decayed in named(decays(abstract('tiny')))}
    assert {name for name, decayed in mask.items() if not decayed} == {'attention_norm_D', 'ffn_norm_D', 'norm_D'}
    assert len(mask) >= 8 and all(len(parameter_letters(name)) >= 2 for name, decayed in mask.items() if decayed)


def test_moments_rest_where_their_parameters_do():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))):
        model = abstract('7b')
        state = jax.eval_shape(make_optimizer(OptimizerConfig(), 10_000).init, model)
        adam = next(part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(part, 'mu'))
        for moments in (adam.mu, adam.nu):
            for parameter, moment in zip(jax.tree.leaves(model), jax.tree.leaves(moments), strict=True):
                assert (moment.shape, moment.dtype, moment.sharding) == (parameter.shape, parameter.dtype, parameter.sharding)


def test_mesh_sizes():
    assert dict(zip(AXES, MeshConfig(tensor=2).sizes(8), strict=True)) == {'replica': 1, 'fsdp': 4, 'sequence': 1, 'tensor': 2}
    assert MeshConfig(2, 2, 1, -1).sizes(16) == (2, 2, 1, 4)
