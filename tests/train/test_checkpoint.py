import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama2_jax.config import UserError
from llama2_jax.runtime.workdir import open_workdir, report_disk_full
from llama2_jax.train.checkpoint import Checkpoints, checksums, load_params, names, save_params, to_dict

NOISE = np.random.default_rng(0).normal(size=500_000).astype(np.float32)  # 2 MB that cannot be compressed
STATE = {'w': jnp.asarray(NOISE[:1000].reshape(20, 50)), 'n': jnp.int32(7)}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def plus(amount):
    return jax.tree.map(lambda x: x + x.dtype.type(amount), STATE)


def saved(directory, steps=(1, 2), losses=(), **retention):
    losses = dict(losses)
    with Checkpoints(directory, **retention) as checkpoints:
        for step in steps:
            checkpoints.save(step, plus(step), {'tokens': 10 * step}, losses.get(step))
    return checkpoints


def test_names_know_nothing_of_the_classes():
    assert names(toy.make_state()) == [
        'step', 'params/b_F', 'params/w_DF', 'opt_state/0/count',
        'opt_state/0/mu/b_F', 'opt_state/0/mu/w_DF', 'opt_state/0/nu/b_F', 'opt_state/0/nu/w_DF',
    ]  # fmt: skip
    assert to_dict({'a': [1, {'b': 2}]}) == {'a': {'0': 1, '1': {'b': 2}}}


def test_params_come_back_on_any_mesh(tmp_path):
    plain = toy.Linear(jax.random.key(3))
    save_params(tmp_path / 'plain', plain)
    params = toy.Linear(jax.random.key(3))
    params.b_F[...] = params.b_F[...].astype(jnp.bfloat16) + 1.5
    save_params(tmp_path / 'params', params)
    equal(load_params(tmp_path / 'params', jax.eval_shape(lambda: params)), params)
    save_params(tmp_path / 'params', jax.tree.map(lambda x: 2 * x, params))  # in place of the others
    equal(load_params(tmp_path / 'params', params), jax.tree.map(lambda x: 2 * x, params))
    mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: toy.Linear(jax.random.key(0)))
        loaded = load_params(tmp_path / 'plain', abstract)
        assert loaded.w_DF[...].sharding == NamedSharding(mesh, PartitionSpec('data', None))
    equal(loaded, plain)


@pytest.mark.parametrize(
    ('wanted', 'sentence'),
    [
        ({'w': jnp.zeros((20, 51)), 'n': STATE['n']}, r"'w' is float32\[20, 50\], and float32\[20, 51\] is wanted\."),
        (
            {'w': STATE['w'].astype(jnp.bfloat16), 'n': STATE['n']},
            r"'w' is float32\[20, 50\], and bfloat16\[20, 50\] is wanted\.",
        ),
        ({'w_x': STATE['w'], 'n': STATE['n']}, "holds no 'w_x'; did you mean 'w'?"),
        ({'n': STATE['n']}, "holds 'w', which is unexpected; valid: n."),
    ],
)
def test_first_mismatch_is_named(tmp_path, wanted, sentence):
    save_params(tmp_path / 'p', STATE)
    with pytest.raises(UserError, match=sentence):
        load_params(tmp_path / 'p', wanted)
    saved(tmp_path / 'c')
    with Checkpoints(tmp_path / 'c') as checkpoints, pytest.raises(UserError, match=sentence):
        checkpoints.restore(wanted)
    assert (tmp_path / 'c' / '2').is_dir()  # another configuration is no damage


def test_missing_and_damaged_params(tmp_path):
    with pytest.raises(UserError, match='none does not exist'):
        load_params(tmp_path / 'none', STATE)
    save_params(tmp_path / 'p', STATE)
    (tmp_path / 'p' / '_METADATA').write_text('{')
    with pytest.raises(UserError, match=r'p are damaged or incomplete \(JSONDecodeError: .*\)\.$'):
        load_params(tmp_path / 'p', STATE)


def test_restores_the_newest(tmp_path):
    with Checkpoints(tmp_path / 'c') as checkpoints:
        assert checkpoints.restore(STATE) is None
    saved(tmp_path / 'c')
    with Checkpoints(tmp_path / 'c') as checkpoints:
        state, progress = checkpoints.restore(jax.eval_shape(lambda: STATE))
    equal(state, plus(2))
    assert progress == {'tokens': 20}


def damages(data):
    yield 'half', data[: len(data) // 2]
    yield 'flipped', data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    yield 'gone', None


def test_no_damage_to_any_file_passes_silently(tmp_path, capfd):
    saved(tmp_path / 'sound')
    files = sorted(path.relative_to(tmp_path / 'sound') for path in (tmp_path / 'sound' / '2').rglob('*') if path.is_file())
    fell_back = set()
    for file in files:
        for kind, data in damages((tmp_path / 'sound' / file).read_bytes()):
            shutil.copytree(tmp_path / 'sound', tmp_path / 'c')
            (tmp_path / 'c' / file).unlink() if data is None else (tmp_path / 'c' / file).write_bytes(data)
            capfd.readouterr()
            with Checkpoints(tmp_path / 'c') as checkpoints:
                state, progress = checkpoints.restore(STATE)
                equal(state, plus(progress['tokens'] // 10))  # never anything else
                if progress['tokens'] == 10:
                    fell_back.add((file.name if file.parts[1] == 'extras' else file.parts[2], kind))
                    (line,) = [line for line in capfd.readouterr().err.splitlines() if 'Checkpoint' in line]
                    assert line.startswith('Checkpoint 2 is damaged (') and line.endswith('continuing from step 1.')
                    assert checkpoints.steps == [1] and (tmp_path / 'c' / 'damaged-2').is_dir()
                else:
                    assert progress['tokens'] == 20
            shutil.rmtree(tmp_path / 'c')
    kinds = {'half', 'flipped', 'gone'}
    assert {kind for name, kind in fell_back if name == 'metadata'} == kinds
    assert {kind for name, kind in fell_back if name == 'ocdbt.process_0'} == kinds
    assert {kind for name, kind in fell_back if name == 'manifest.ocdbt'} == kinds


def test_nothing_is_touched_when_all_are_damaged(tmp_path):
    saved(tmp_path / 'c')
    for step in (1, 2):
        shutil.rmtree(tmp_path / 'c' / str(step) / 'state')
    with Checkpoints(tmp_path / 'c') as checkpoints:
        with pytest.raises(UserError, match=r'No checkpoint in .*c can be read; step 2: FileNotFoundError'):
            checkpoints.restore(STATE)
        assert checkpoints.steps == [1, 2]


def test_a_damaged_step_can_be_saved_again(tmp_path):
    for _ in range(2):
        saved(tmp_path / 'c', steps=(1, 2) if not (tmp_path / 'c').exists() else (2,))
        shutil.rmtree(tmp_path / 'c' / '2' / 'state')
        with Checkpoints(tmp_path / 'c') as checkpoints:
            assert checkpoints.restore(STATE)[1] == {'tokens': 10}
    assert sorted(path.name for path in (tmp_path / 'c').iterdir()) == ['1', 'damaged-2', 'damaged-2-2']


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    saved(tmp_path / 'c', steps=(1,))
    shutil.copytree(tmp_path / 'c' / '1', tmp_path / 'c' / '2.orbax-checkpoint-tmp')
    with Checkpoints(tmp_path / 'c') as checkpoints:
        equal(checkpoints.restore(STATE)[0], plus(1))
        assert checkpoints.steps == [1]
    assert sorted(path.name for path in (tmp_path / 'c').iterdir()) == ['1']


@pytest.mark.parametrize(
    ('retention', 'left'),
    [
        ({'keep_last': 2, 'keep_best': False}, [8, 9]),
        ({'keep_last': 1, 'keep_best': True}, [4, 9]),
        ({'keep_last': 1, 'keep_best': False, 'keep_every': 3}, [3, 6, 9]),
        ({'keep_last': 2, 'keep_best': True, 'keep_every': 5}, [4, 5, 8, 9]),
    ],
)
def test_retention(tmp_path, retention, left):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}
    saved(tmp_path / 'c', range(1, 6), losses, **retention)
    saved(tmp_path / 'c', range(6, 10), losses, **retention)  # what was best is known after a restart
    with Checkpoints(tmp_path / 'c') as checkpoints:
        assert checkpoints.steps == left


def test_checksums_by_hand():
    tree = [jnp.float32([1.0, 2.0]), jnp.bfloat16([1.0]), jnp.bool_([True, True, False]), jnp.int32(-1), jnp.int8([-1, 1])]
    assert checksums(tree) == [(0x3F800000 + 0x40000000) % 2**32, 0x3F80, 2, 2**32 - 1, 256]


def test_no_space_left(small_disk):
    noise = jnp.asarray(NOISE)
    sentence = f'^No space left while writing to {small_disk}: '
    with pytest.raises(UserError, match=sentence), report_disk_full(small_disk), Checkpoints(small_disk / 'c') as checkpoints:
        checkpoints.save(1, {'w': noise}, {})
        checkpoints.wait()
        checkpoints.save(2, {'w': noise + 1}, {})
    with Checkpoints(small_disk / 'c') as checkpoints:
        equal(checkpoints.restore({'w': noise})[0], {'w': noise})
        assert checkpoints.steps == [1]
    with pytest.raises(UserError, match=f'^No space left while writing to {small_disk}/p: '):
        save_params(small_disk / 'p', {'w': noise})


def test_a_file_size_limit_is_no_space_left(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=f'^No space left while writing to {tmp_path}/p: '):
            save_params(tmp_path / 'p', {'w': jnp.asarray(NOISE)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('name', ['run[lr=0.01]', 'a\\b', 'run*', 'run?', '\udcff'])
def test_names_that_cannot_be_read_back_are_refused(tmp_path, name):
    for save in (save_params, lambda directory, state: saved(directory), open_workdir):
        with pytest.raises(UserError, match='use another name'):
            save(tmp_path / name, STATE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['a b', 'ünï 漢', 'a%20b', '{x}', '-lead', "a'b", 'a#b', 'lr=0.1,b:2'])
def test_names_that_look_odd_are_read_back(tmp_path, name):
    save_params(tmp_path / name / 'params', STATE)
    equal(load_params(tmp_path / name / 'params', STATE), STATE)
    saved(tmp_path / name / 'checkpoints')
    with Checkpoints(tmp_path / name / 'checkpoints') as checkpoints:
        equal(checkpoints.restore(STATE)[0], plus(2))


def test_a_save_that_cannot_be_read_back_is_an_error(tmp_path, monkeypatch):
    merge = 'orbax.checkpoint._src.serialization.ocdbt_utils.merge_ocdbt_per_process_files'
    monkeypatch.setattr(merge, merged_to_nothing)
    with pytest.raises(UserError, match=r"params cannot be read back: of the array '[wn]' 0 of"):
        save_params(tmp_path / 'params', STATE)
    with pytest.raises(UserError, match=r'checkpoints/1/state cannot be read back'):
        saved(tmp_path / 'checkpoints')


async def merged_to_nothing(*arguments, **settings):
    """What a glob that finds nothing amounts to."""


def test_saves_in_pieces_are_counted(tmp_path):
    zeros = {'w': jnp.zeros((3, 7, 5)), 'n': jnp.int32(0)}
    save_params(tmp_path / 'params', zeros)
    equal(load_params(tmp_path / 'params', zeros), zeros)
