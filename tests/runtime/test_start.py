import os
import signal
import subprocess
import sys

import jax
import pytest

from llama2_jax import runtime

START = 'import jax; from llama2_jax import runtime; runtime.start(); print(jax.devices()[0].platform)'


@pytest.mark.skipif(any(map(runtime.glob.glob, runtime.ACCELERATORS)), reason='this machine has an accelerator')
def test_libtpu_beside_a_cpu_prints_nothing():
    pytest.importorskip('libtpu')
    environment = {name: value for name, value in os.environ.items() if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
    result = subprocess.run([sys.executable, '-c', START], env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ('cpu\n', '')


@pytest.mark.parametrize(
    ('chosen', 'files', 'expected'), [(None, [], 'cpu'), (None, ['/dev/accel0'], None), ('tpu,cpu', [], 'tpu,cpu')]
)
def test_accelerators_and_the_users_choice_stay(chosen, files, expected, monkeypatch):
    pytest.importorskip('libtpu')
    monkeypatch.setattr(runtime.glob, 'glob', lambda pattern: files)
    before = jax.config.jax_platforms
    try:
        jax.config.update('jax_platforms', chosen)
        runtime.keep_libtpu_unloaded()
        assert jax.config.jax_platforms == expected
    finally:
        jax.config.update('jax_platforms', before)


TOOL = """
import signal, sys, time
from etils.epath import Path
from llama2_jax import runtime
from llama2_jax.runtime.jsonl import growing
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs in their background
with runtime.user_errors(), growing(Path(sys.argv[1])) as add:
    runtime.start()
    add({'id': 0}, {'id': 1})
    print('ready', flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_tool_that_is_stopped_keeps_its_rows_and_prints_no_traceback(number, code, tmp_path):
    command = [sys.executable, '-c', TOOL, str(tmp_path / 'rows.jsonl')]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, '')
    assert (tmp_path / 'rows.jsonl').read_text() == '{"id": 0}\n{"id": 1}\n'
