import os
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
