"""Two processes of one device each do in every stage what one process with two devices does."""

import json

import all_stages
import numpy as np
import program
import pytest
from random_policy import make_home

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.load import open_model

pytestmark = pytest.mark.slow

MACHINE = ('seconds', 'tokens_per', 'tflops', 'mfu', 'memory_gb')  # how names begin of what tells of it


def numbers(path):
    """What metrics.jsonl says, a list of (step, name, value)."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line['step'], name, value) for line in lines for name, value in line.items() if not name.startswith(MACHINE)]


def test_every_stage(tmp_path):
    home, one, two = (tmp_path / name for name in ('home', 'one', 'two'))
    for path in (home, one, two):
        path.mkdir()
    make_home(home, all_stages.write_data(home))
    for name in ('policy', 'help'):  # every process reads the layers of such a model one by one
        convert(open_model(home / name), home / f'{name}-hf', 'hf')
    program.finish(*(program.start([all_stages.__file__, home, two], 1, member) for member in program.members(2)), seconds=500)
    program.finish(program.start([all_stages.__file__, home, one], 2), seconds=500)
    for name in ('out.jsonl', 'rejection/choices.jsonl', 'collect/answers.jsonl', 'ppo/rollouts/000001.jsonl'):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    for stage in ('sft', 'reward', 'dpo', 'ppo'):  # the order in which choices are learned goes by the name of their file
        for ours, theirs in zip(*(numbers(path / stage / 'metrics.jsonl') for path in (two, one)), strict=True):
            assert ours[:2] == theirs[:2]
            np.testing.assert_allclose(ours[2] or 0, theirs[2] or 0, rtol=1e-3, atol=1e-4, err_msg=f'{stage} {ours}')
    for name in ('sft/model', 'reward/model', 'dpo/model', 'rejection/model', 'ppo/model'):
        assert (two / name / 'config.json').exists()
    for name in ('judged/preferences.png', 'rejection/rewards_by_n.png', 'ppo/reward_kl.png', 'sft/samples.md'):
        assert (two / name).stat().st_size > 100
