import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from llama2_jax.config import UserError
from llama2_jax.train import metrics as metrics_lib
from llama2_jax.train.metrics import Meter, Progress, Report, read_metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until told."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(metrics_lib.time, 'perf_counter', lambda: Clock.now)
    return Clock


def scalars(loss, tokens=16, finite=True):
    return {'loss': np.float32(loss), 'tokens': np.float32(tokens), 'finite': np.bool_(finite), 'grad_norm': np.float32(0.5)}


def report(workdir, steps=1000, **progress):
    return Report(workdir, Progress(**progress), Meter(0.0, None), steps)


def write(workdir, numbers, **progress):
    with report(workdir, **progress) as opened:
        for number in numbers:
            opened.write(opened.complete(number, scalars(number / 4)))
            opened.sample(number, f'text {number}\n## Step 1')


def test_meter_by_hand(clock):
    meter = Meter(flops_per_step=6e12 * jax.device_count(), peak_flops=100e12)
    meter.start()
    meter.count(1000)  # this step has compiled
    assert meter.read() == {'tokens_per_second': None, 'tflops': None, 'mfu': None}
    meter.pause()
    meter.start()
    clock.now += 1.0
    meter.start()
    meter.count(1000)  # two steps that are settled one after the other, as on a CPU
    meter.count(500)
    assert meter.read() == {'tokens_per_second': 1500.0, 'tflops': 12.0, 'mfu': 0.12}
    meter.pause()
    clock.now += 1000
    meter.start()
    clock.now += 2
    meter.count(1000)
    assert meter.read() == {'tokens_per_second': 500.0, 'tflops': 3.0, 'mfu': 0.03}
    unknown = Meter(flops_per_step=6e12 * jax.device_count(), peak_flops=None)
    unknown.pause()
    unknown.start()
    clock.now += 1
    unknown.count(10)
    assert unknown.read() == {'tokens_per_second': 10.0, 'tflops': 6.0, 'mfu': None}


def test_lines(tmp_path, clock):
    with report(tmp_path, step=7, tokens=100, seconds=50.0) as opened:
        clock.now += 1.5
        line = opened.complete(8, scalars(2.0))
        assert line == {
            'step': 8, 'tokens': 116, 'seconds': 51.5, 'loss': 2.0, 'perplexity': math.exp(2.0), 'grad_norm': 0.5, 'finite': True,
        }  # fmt: skip
        opened.write({'step': 8, 'loss': 2.0, 'mfu': None, 'heldout/loss': 3.0})
        opened.write({'step': 9, 'loss': math.nan, 'perplexity': math.inf})
        opened.complete(9, scalars(math.nan, finite=False))
        assert opened.complete(10, scalars(800.0))['perplexity'] == math.inf
        assert opened.progress == Progress(step=10, tokens=132, skipped=1, seconds=51.5)
    assert (tmp_path / 'metrics.jsonl').read_text() == (
        '{"step": 8, "loss": 2.0, "mfu": null, "heldout/loss": 3.0}\n{"step": 9, "loss": null, "perplexity": null}\n'
    )


def test_what_lies_beyond_the_restored_step_is_dropped(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 8, "lo')  # killed while writing
    write(tmp_path, range(5, 7), step=4)
    assert [line['step'] for line in read_metrics(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / 'samples.md').read_text() == ''.join(
        f'<!-- step {step} -->\n## Step {step}\n\ntext {step}\n## Step 1\n\n' for step in range(1, 7)
    )


def test_a_preamble_of_the_samples_stays(tmp_path):
    (tmp_path / 'samples.md').write_text('# One example, coloured\n\n')
    write(tmp_path, [1, 2])
    write(tmp_path, [])
    assert (tmp_path / 'samples.md').read_text() == '# One example, coloured\n\n'


def test_damaged_line_is_named(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n{"loss": 1}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r'metrics.jsonl:2 is damaged: it is not a JSON object with a "step"\.'):
        report(tmp_path)


def test_tensorboard_holds_the_same(tmp_path):
    write(tmp_path, [5, 6], step=4)
    from tensorboardX.proto.event_pb2 import Event  # only now: `TensorBoard` sees to it that torch is not imported

    (path,) = (tmp_path / 'tensorboard').iterdir()
    data, events = path.read_bytes(), []
    while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], 'little')
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[1].step == 5 and events[1].session_log.status == 1  # what earlier files hold from here on is hidden
    losses = [(event.step, event.summary.value[0].simple_value) for event in events[2:] if event.summary.value[0].tag == 'loss']
    assert losses == [(5, 1.25), (6, 1.5)]


def test_without_a_terminal_lines_are_few(tmp_path, capfd):
    with report(tmp_path, steps=400) as opened:
        for number in range(1, 401):
            opened.write(opened.complete(number, scalars(1.0)) | ({'heldout/loss': 2.5} if number == 200 else {}))
    err = capfd.readouterr().err
    assert '\r' not in err
    lines = err.splitlines()
    assert lines[0].startswith('step 1/400: loss 1.0000, ') and lines[0].endswith(' left')
    assert lines[-1].startswith('step 400/400: loss 1.0000, 00:00 left')
    assert [line for line in lines if line.startswith('step 200/400: loss 1.0000, heldout/loss 2.5000')]
    assert len(lines) <= 5
    assert len(json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[199])) == 8


def test_plot_of_nothing_but_nulls(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": null}\n')
    metrics_lib.plot(tmp_path)
    assert (tmp_path / 'loss.png').stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ['loss.png', 'metrics.jsonl']


def test_torch_is_not_imported(tmp_path):
    code = 'import sys; from pathlib import Path; from llama2_jax.train.metrics import TensorBoard as T'
    code += f'; T(Path({str(tmp_path / "t")!r}), 0).close(); assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
