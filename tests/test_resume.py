"""The pretraining stage killed at any moment and run again gives, bit for bit, what it gives undisturbed."""

import random
import signal
import time

import numpy as np
import program
import pytest

pytestmark = pytest.mark.slow


def same(workdir, expected):
    assert program.trace(workdir) == program.trace(expected)
    for ours, theirs in zip(program.final(workdir), program.final(expected), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    directory = tmp_path_factory.mktemp('data')
    # Compiled once for all processes.
    environment = {'JAX_COMPILATION_CACHE_DIR': str(directory / 'jit'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2'}
    return {'text': program.write_text(directory / 'text.txt'), 'cache': str(directory / 'cache'), 'environment': environment}


@pytest.fixture(scope='module')
def straight(tmp_path_factory, options):
    """24 steps undisturbed, on one device; a checkpoint every 4."""
    workdir = tmp_path_factory.mktemp('straight')
    program.finish(program.launch(workdir, 1, **options))
    assert [line['step'] for line in program.trace(workdir)] == list(range(1, 25))
    return workdir


def test_killed_five_times(straight, options, tmp_path):
    """SIGKILL in the first save after steps 3 and 11, at random moments after 6, 14 and 19; then with two data workers."""
    dice = random.Random(0)
    kills = [(3, None), (6, dice.uniform(0, 0.1)), (11, None), (14, dice.uniform(0, 0.1)), (19, dice.uniform(0, 0.1))]
    for kill in kills:
        program.finish(program.launch(tmp_path, 1, kill=kill, **options), code=-signal.SIGKILL)
        assert not (tmp_path / 'final.npz').exists()
    program.finish(program.launch(tmp_path, 1, workers=2, **options))
    same(tmp_path, straight)


def test_killed_one_at_a_time_and_continued_by_another_number_of_processes(options, tmp_path):
    """Two devices in one process, then in two of which the last dies, then in two of which the first dies, then in one."""
    program.finish(program.launch(tmp_path / 'one', 2, **options))
    program.finish(program.launch(tmp_path / 'many', 2, kill=(4, 0.0), **options), code=-signal.SIGKILL)
    for victim, step in ((1, 10), (0, 16)):
        processes = program.launch_several(tmp_path / 'many', 2, 1, workers=2, **options)
        [said] = program.kill_one(processes, victim, tmp_path / 'many', step)
        assert 'Traceback' in said or 'another task died' in said
    program.finish(program.launch(tmp_path / 'many', 2, **options))
    same(tmp_path / 'many', tmp_path / 'one')


def test_four_processes_are_one(straight, options, tmp_path):
    """Four processes, of which the last dies, go on as two: sums of more than two parts have another order, so within 1e-5."""
    processes = program.launch_several(tmp_path, 4, 1, **options)
    program.kill_one(processes, 3, tmp_path, 10)
    program.finish(*program.launch_several(tmp_path, 2, 2, **options))
    for ours, theirs in zip(program.trace(tmp_path), program.trace(straight), strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], abs=1e-5)
    for ours, theirs in zip(program.final(tmp_path), program.final(straight), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_processes_of_other_settings_do_not_train_together(options, tmp_path):
    environment = options['environment']
    given = {key: value for key, value in options.items() if key != 'environment'}
    processes = [
        program.launch(tmp_path, 1, environment=environment | member, **given, steps=steps)
        for member, steps in zip(program.members(2), (24, 23), strict=True)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert all('Error: Process 1 has config.tokens=5888, process 0 has 6144' in text for text in said), said
    assert not (tmp_path / 'metrics.jsonl').exists()


def test_sigterm_before_the_first_step_ends_each_of_several_processes(options, tmp_path):
    processes = program.launch_several(tmp_path, 2, 1, **options)
    while not (tmp_path / 'config.json').exists():
        assert all(process.poll() is None for process in processes), [process.communicate()[1] for process in processes]
        time.sleep(0.01)
    for process in processes:
        process.terminate()
    program.finish(*processes, code=-signal.SIGTERM, seconds=20)
    assert not (tmp_path / 'metrics.jsonl').exists()
