import os
import random
import signal
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from llama2_jax.config import UserError
from llama2_jax.train.loop import LoopConfig, fit


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def same(a, b):
    assert [x.dtype for x in a] == [y.dtype for y in b]
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def final(workdir):
    with np.load(workdir / 'final.npz') as arrays:
        return [arrays[name] for name in arrays.files]


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """40 steps without an interruption: the workdir and the leaves of the state."""
    workdir = tmp_path_factory.mktemp('straight')
    return workdir, leaves(toy.run(workdir))


def test_trace_is_that_of_the_bare_loop(straight):
    workdir, state = straight
    lines = toy.trace(workdir)
    expected, step = toy.make_state(), jax.jit(toy.step_fn)
    for number, (batch, _) in zip(range(1, 41), toy.batches(0), strict=False):
        expected, metrics = step(expected, batch)
        line = lines[number - 1]
        assert (line['step'], line['tokens'], line['learning_rate']) == (number, 16 * number, np.float32(1e-2))
        np.testing.assert_allclose(line['loss'], metrics['loss'], rtol=1e-5)
        np.testing.assert_allclose(line['perplexity'], np.exp(line['loss']), rtol=1e-12)
        np.testing.assert_allclose(line['update_norm'], metrics['update_norm'], rtol=1e-5)
    for ours, theirs in zip(state, leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(lines) == 40
    assert [line['step'] for line in lines if 'heldout/loss' in line] == [10, 20, 30, 40]
    assert (workdir / 'samples.md').read_text().count('## Step') == 2
    assert (workdir / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir()) == [30, 35, 40]


@pytest.mark.parametrize('stop', [3, 5, 12])
def test_resumed_run_is_the_straight_one(straight, tmp_path, stop):
    with pytest.raises(UserError, match=f'^The data ended after {stop} of 40 steps.$'):
        toy.run(tmp_path, stop=stop)
    same(leaves(toy.run(tmp_path)), straight[1])
    assert toy.trace(tmp_path) == toy.trace(straight[0])
    assert (tmp_path / 'samples.md').read_text() == (straight[0] / 'samples.md').read_text()
    taken = []
    same(leaves(toy.run(tmp_path, callback=taken.append)), straight[1])
    assert taken == []  # it is done already


def test_metrics_are_read_after_the_next_step_is_queued(tmp_path):
    """All but those of the first step, which compiles: the clock of the steps starts after it."""
    events = []

    class Scalar:
        def __init__(self, number):
            self.number = number

        def __array__(self, dtype=None, copy=None):
            events.append(f'read {self.number}')
            return np.array(1.0)

    def step(state, batch):
        events.append(f'step {batch}')
        return state, {'loss': Scalar(batch), 'tokens': np.array(1.0), 'finite': np.array(True)}

    state = {'x': jnp.zeros(2)}
    config = LoopConfig(checkpoint_every=0)
    numbers = iter([(k, [k]) for k in range(1, 5)])
    fit(tmp_path, config, abstract_state=state, init=lambda: state, step=step, batches=lambda start: numbers, steps=4)
    assert events == ['step 1', 'read 1', 'step 2', 'step 3', 'read 2', 'step 4', 'read 3', 'read 4']


def test_nonfinite_loss_stops_and_names_the_batch(tmp_path):
    for _ in range(2):  # and again when run again
        with pytest.raises(UserError) as error:
            toy.run(tmp_path, bad=(13,))
        text = str(error.value)
        assert text.startswith('Step 13 has the loss nan; its batch is: batch 12 row 0, batch 12 row 1, ')
        assert f'row 7 and 8 more. The last good checkpoint: {tmp_path}/checkpoints/10. ' in text
    assert [line['step'] for line in toy.trace(tmp_path)] == list(range(1, 13))


def test_nonfinite_steps_are_skipped_up_to_the_limit(tmp_path, capfd):
    with pytest.raises(UserError, match='^Step 33 has'):
        toy.run(tmp_path / 'a', bad=(7, 21, 33), skip_nonfinite=2)
    assert 'Step 21 has the loss nan' in capfd.readouterr().err
    straight = leaves(toy.run(tmp_path / 'b', bad=(7, 21), skip_nonfinite=2))
    line = toy.trace(tmp_path / 'b')[6]
    assert (line['step'], line['loss'], line['tokens']) == (7, None, 6 * 16)
    with pytest.raises(UserError, match='^The data ended'):
        toy.run(tmp_path / 'c', bad=(7, 21), skip_nonfinite=2, stop=17)
    same(leaves(toy.run(tmp_path / 'c', bad=(7, 21), skip_nonfinite=2)), straight)
    assert toy.trace(tmp_path / 'c') == toy.trace(tmp_path / 'b')
    with pytest.raises(UserError, match='^The data ended'):
        toy.run(tmp_path / 'd', bad=(7, 21), skip_nonfinite=1, stop=17)
    with pytest.raises(UserError, match='^Step 21 has'):  # the count of step 7 has survived the restart
        toy.run(tmp_path / 'd', bad=(7, 21), skip_nonfinite=1)


def test_a_step_with_a_bad_gradient_only(tmp_path):
    def step(state, batch):
        finite = batch != 2
        return state, {'loss': np.float32(3.5), 'tokens': np.array(1.0), 'finite': np.array(finite)}

    state = {'x': jnp.zeros(2)}
    numbers = iter([(k, f'row {k}') for k in range(1, 5)])
    with pytest.raises(
        UserError, match='^Step 2 has a gradient that is not finite; its batch is: row 2. The last good checkpoint: none'
    ):
        fit(tmp_path, LoopConfig(), abstract_state=state, init=lambda: state, step=step, batches=lambda start: numbers, steps=4)


@pytest.mark.parametrize(('name', 'code'), [('sigterm', 143), ('sigint', 130)])
def test_a_signal_saves_says_how_to_go_on_and_exits_with_its_code(straight, tmp_path, name, code):
    process = toy.launch(tmp_path, {'kill': {name: 23}})
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert f'Interrupted: step 23 of 40 is saved in {tmp_path}/checkpoints. To continue, run it again: ' in err
    assert err.splitlines()[-1].endswith(f'toy.py {tmp_path} \'{{"kill": {{"{name}": 23}}}}\'')
    assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [15, 20, 23]
    same(leaves(toy.run(tmp_path)), straight[1])
    assert toy.trace(tmp_path) == toy.trace(straight[0])


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    toy.run(tmp_path, steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def twice(k):
        if k == 3:
            os.kill(os.getpid(), signal.SIGINT)
            assert not (tmp_path / 'checkpoints' / '3').exists()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, callback=twice)
    assert not (tmp_path / 'checkpoints' / '3').exists()


def test_killed_five_times_changes_nothing(straight, tmp_path):
    """SIGKILL while a save is under way (three times) and at random moments (twice); then to the end."""
    dice = random.Random(0)
    kills = [
        {'save': 4},
        {'timer': 8, 'seconds': dice.uniform(0, 0.05)},
        {'save': 14},
        {'save': 24},
        {'timer': 29, 'seconds': dice.uniform(0, 0.05)},
    ]
    unfinished = 0
    for kill in kills:
        process = toy.launch(tmp_path, {'kill': kill, 'slow': 0.02})
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, err
        unfinished += any('tmp' in path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert unfinished >= 1
    same(leaves(toy.run(tmp_path)), straight[1])
    assert toy.trace(tmp_path) == toy.trace(straight[0])
    assert (tmp_path / 'samples.md').read_text() == (straight[0] / 'samples.md').read_text()


def test_two_processes_are_one_and_stop_together(tmp_path):
    """The second of two processes gets a SIGTERM; both save and leave with 143; one process with two devices goes on."""
    whole = toy.launch(tmp_path / 'straight', {}, devices=2)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    options = [{'slow': 0.03}, {'slow': 0.03, 'kill': {'sigterm': 12}}]
    processes = [toy.launch(tmp_path / 'two', options[index], (index, 2, address), devices=1) for index in (0, 1)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    stopped = max(int(path.name) for path in (tmp_path / 'two' / 'checkpoints').iterdir())
    assert 12 <= stopped < 40
    assert f'Interrupted: step {stopped} of 40' in errors[0] and 'Interrupted' not in errors[1]
    rest = toy.launch(tmp_path / 'two', {}, devices=2)
    for process in (whole, rest):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert toy.trace(tmp_path / 'two') == toy.trace(tmp_path / 'straight')
    same(final(tmp_path / 'two'), final(tmp_path / 'straight'))
    same(leaves(toy.run(tmp_path / 'two')), final(tmp_path / 'two'))  # and from two devices to however many are here


def test_another_shape_is_named(tmp_path):
    toy.run(tmp_path, steps=5)
    with pytest.raises(UserError, match=r"'params/w_DF' is float32\[24, 8\], and float32\[32, 8\] is wanted"):
        toy.run(tmp_path, steps=5, width=32)


def test_damaged_checkpoint_costs_some_steps_only(straight, tmp_path, capfd):
    with pytest.raises(UserError):
        toy.run(tmp_path, stop=23)
    for path in (tmp_path / 'checkpoints' / '20' / 'state').rglob('manifest.ocdbt'):
        path.write_bytes(path.read_bytes()[:10])
    capfd.readouterr()
    same(leaves(toy.run(tmp_path)), straight[1])
    assert toy.trace(tmp_path) == toy.trace(straight[0])
    err = capfd.readouterr().err
    assert 'Checkpoint 20 is damaged' in err and 'Continuing from the checkpoint of step 15.' in err


@pytest.mark.parametrize(('field', 'value'), [('log_every', 0), ('keep_last', 0), ('eval_every', -1)])
def test_loop_config_is_checked(field, value):
    with pytest.raises(UserError, match=f'^{field} is {value}'):
        LoopConfig(**{field: value})


def test_a_full_disk_costs_nothing_but_time(straight, small_disk):
    ballast = small_disk / 'ballast'

    def fill(k):
        if k == 13:
            with pytest.raises(OSError), ballast.open('wb', buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    workdir = small_disk / 'run'
    with pytest.raises(UserError, match=f'^No space left while writing to {workdir}: '):
        toy.run(workdir, callback=fill)
    ballast.unlink()
    assert 10 in [int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]
    same(leaves(toy.run(workdir)), straight[1])
    assert toy.trace(workdir) == toy.trace(straight[0])


def test_the_steps_that_are_asked_for_are_traced(tmp_path):
    config = LoopConfig(profile='3:4')
    numbers = iter([(np.float32(i), [i]) for i in range(6)])

    @jax.jit
    def step(state, batch):
        return {'x': state['x'] + batch}, {'loss': state['x'][0], 'tokens': jnp.float32(1), 'finite': jnp.bool_(True)}

    state = {'x': jnp.zeros(2)}
    fit(tmp_path, config, abstract_state=state, init=lambda: state, step=step, batches=lambda start: numbers, steps=6)
    [file] = (tmp_path / 'profile').rglob('*.xplane.pb')
    events = (
        event for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events
    )
    found = {dict(event.stats).get('step_num') for event in events if event.name == 'train'}
    assert found == {3, 4}


@pytest.mark.parametrize('profile', ['5', '4:3', '0:2', 'a:b', ':'])
def test_what_to_trace_is_checked(profile):
    with pytest.raises(UserError, match=r'loop\.profile'):
        LoopConfig(profile=profile)
