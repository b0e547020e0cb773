"""The script that measures a chip runs whole, here on the CPU at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'on_device.py'


@pytest.mark.slow
def test_every_program_is_measured(tmp_path):
    command = [sys.executable, SCRIPT, '--size=tiny', '--steps=3', f'--output={tmp_path}/measured.json']
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads((tmp_path / 'measured.json').read_text())
    names = [row['program'] for row in result['programs']]
    assert names == ['training step, tiny', 'decoding, tiny', 'scoring, tiny', 'PPO iteration, tiny']
    for row in result['programs']:
        assert row['seconds'] > 0 and f'| {row["program"]} |' in shown
    assert result['programs'][0]['loss'] < 8 and result['programs'][0]['predicted_gb'] > 0.01
