import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Literal

import pytest

from llama2_jax.config import MODELS, ModelConfig, UserError, from_dict, hidden_size, nearest, override, to_json
from llama2_jax.mesh import MeshConfig

EXPERIMENTS = Path(__file__).parents[1] / 'experiments'


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal['plain', 'fancy'] = 'plain'


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    steps: int = 10
    wide: bool = False
    name: str = ''
    prompts: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1,)


@pytest.mark.parametrize(
    ('assignment', 'field', 'value'),
    [
        ('steps=12', 'steps', 12),
        ('steps=-1', 'steps', -1),
        ('steps=1_000', 'steps', 1000),
        ('steps=2e6', 'steps', 2_000_000),
        (' steps = 3 ', 'steps', 3),
        ('wide=True', 'wide', True),
        ('wide=0', 'wide', False),
        ('name=a=b', 'name', 'a=b'),
        ('name=', 'name', ''),
        ('prompts=Once upon, Dear', 'prompts', ('Once upon', 'Dear')),
        ('prompts=', 'prompts', ()),
        ('sizes=1,2', 'sizes', (1, 2)),
        ('inner.rate=3e-4', 'inner', Inner(rate=3e-4)),
        ('inner.rate=1', 'inner', Inner(rate=1.0)),
        ('inner.kind=fancy', 'inner', Inner(kind='fancy')),
    ],
)
def test_override(assignment, field, value):
    found = override(Outer(), [assignment])
    assert found == dataclasses.replace(Outer(), **{field: value})
    assert type(getattr(found, field)) is type(value)


def test_the_last_override_counts():
    assert override(Outer(), ['steps=1', 'inner.rate=2', 'steps=3']) == Outer(Inner(2.0), 3)


@pytest.mark.parametrize(
    ('assignment', 'message'),
    [
        ('steps', "--set 'steps' is not of the form path.to.field=value."),
        ('stepz=1', "--set stepz: Outer has no field 'stepz'; did you mean 'steps'?"),
        ('qqq=1', "--set qqq: Outer has no field 'qqq'; valid: inner, name, prompts, sizes, steps, wide."),
        ('inner.rat=1', "--set inner.rat: Inner has no field 'rat'; did you mean 'rate'?"),
        ('inner=1', '--set inner is a section, not a value; its fields: rate, kind.'),
        ('steps.more=1', "--set steps.more: 'steps' is a value and has no field 'more'."),
        ('steps=1.5', "--set steps=1.5: '1.5' is not of type int."),
        ('steps=1e-1', "--set steps=1e-1: '1e-1' is not of type int."),
        ('steps=1e999', "--set steps=1e999: '1e999' is not of type int."),
        ('steps=', "--set steps=: '' is not of type int."),
        ('wide=maybe', "--set wide=maybe: 'maybe' is not of type bool."),
        ('inner.rate=fast', "--set inner.rate=fast: 'fast' is not of type float."),
        ('inner.kind=fanci', "--set inner.kind=fanci: did you mean 'fancy'?"),
        ('sizes=1,b', "--set sizes=b: 'b' is not of type int."),
    ],
)
def test_bad_override_is_one_sentence(assignment, message):
    with pytest.raises(UserError, match=f'^{re.escape(message)}$'):
        override(Outer(), [assignment])


def test_nearest():
    assert nearest('7B', MODELS) == "did you mean '7b'?"
    assert nearest('?', ['b', 'a']) == 'valid: a, b.'


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'dim': 0}, 'dim is 0, not a number from 1 to 1048576.'),
        ({'norm_eps': float('nan')}, 'norm_eps is nan, not a number from 1e-30 to 1.0.'),
        ({'rope_theta': float('inf')}, 'rope_theta is inf, not a number from 1.0 to 1000000000000000.0.'),
        ({'layers': 10**9}, 'layers is 1000000000, not a number from 1 to 10000.'),
        ({'norm_eps': True}, 'norm_eps is True, not a number.'),
        ({'hidden': 1.5}, 'hidden is 1.5, not a whole number.'),
        ({'heads': 6, 'kv_heads': 4}, 'model.heads=6 is not a multiple of model.kv_heads=4.'),
        ({'head_dim': 7}, 'model.head_dim=7 must be even: RoPE rotates its two halves.'),
    ],
)
def test_impossible_models(values, message):
    with pytest.raises(UserError, match=f'^{re.escape(message)}$'):
        dataclasses.replace(ModelConfig(), **values)


def test_json_round_trip():
    config = MODELS['70b']
    assert from_dict(ModelConfig, json.loads(to_json(config)), 'config.json') == config
    assert to_json(Inner()) == '{\n  "rate": 0.5,\n  "kind": "plain"\n}\n'


@dataclasses.dataclass(frozen=True)
class Flat:
    count: int
    rate: float = 0.5


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'count': 1, 'rat': 2}, "f.json: unknown field 'rat'; did you mean 'rate'?"),
        ([], 'f.json: [] is not an object with the fields of a Flat.'),
        ({'count': 1, 'rate': float('nan')}, "f.json: field 'rate' is nan, not a finite number of at least 0."),
        ({'rate': 2}, "f.json: field 'count' is missing."),
        ({'count': '1'}, "f.json: field 'count' is '1', not a whole number."),
        ({'count': True}, "f.json: field 'count' is True, not a whole number."),
        ({'count': 1.5}, "f.json: field 'count' is 1.5, not a whole number."),
    ],
)
def test_bad_json_is_one_sentence(values, message):
    with pytest.raises(UserError, match=f'^{re.escape(message)}$'):
        from_dict(Flat, values, 'f.json')
    assert from_dict(Flat, {'count': 1, 'rate': 2}, 'f.json') == Flat(1, 2)


def test_feed_forward_widths():
    """Meta's integer rule (recipe A.2): 7B, 13B, 34B, 70B."""
    assert [hidden_size(4096), hidden_size(5120), hidden_size(8192), hidden_size(8192, 4096, 1.3)] == [11008, 13824, 22016, 28672]


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (MeshConfig(tensor=3), 'mesh replica=1 × fsdp=-1 × sequence=1 × tensor=3 does not fit 8 devices.'),
        (MeshConfig(fsdp=4), 'mesh replica=1 × fsdp=4 × sequence=1 × tensor=1 does not fit 8 devices.'),
        (MeshConfig(tensor=-1), 'mesh replica=1 × fsdp=-1 × sequence=1 × tensor=-1: sizes are positive, and at most one is -1.'),
        (MeshConfig(tensor=0), 'mesh replica=1 × fsdp=-1 × sequence=1 × tensor=0: sizes are positive, and at most one is -1.'),
    ],
)
def test_meshes_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=f'^{re.escape(message)}$'):
        config.sizes(8)


STAGES = ('train_tokenizer', 'pretrain', 'sft', 'reward_model', 'rejection_sampling', 'ppo', 'rlhf', 'ghost_attention')
STAGES += ('context_distillation', 'collect_preferences')


def numbers(config, prefix=''):
    """The dotted path and type of every number in a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f'{prefix}{field.name}.')
        elif field.type in (int, float):
            yield prefix + field.name, field.type


@pytest.mark.parametrize('stage', STAGES)
def test_every_number_of_a_stage_has_a_range(stage, monkeypatch):
    """No setting can be NaN, infinite, far below 0 or beyond what arrays count with; the error names it by its whole path."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    preset = runpy.run_path(str(EXPERIMENTS / f'{stage}.py'))['PRESETS']['tiny']()
    found = list(numbers(preset))
    assert found
    for path, kind in found:
        for value in ('-2', str(2**80)) if kind is int else ('-2', 'nan', 'inf'):
            with pytest.raises(UserError, match=f'^--set {re.escape(path)} is '):
                override(preset, [f'{path}={value}'])
