"""What several stages' tests need around them; a file asks for it by `pytestmark = pytest.mark.usefixtures(…)`."""

from collections import namedtuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from random_policy import DEVICES

from llama2_jax.mesh import MeshConfig, make_mesh
from llama2_jax.stages import inputs


@pytest.fixture
def any_name(monkeypatch):
    """Every name is that of a model, `s` of a reward model; all have one tokenizer."""
    source, kept = namedtuple('Source', 'head'), namedtuple('Kept', 'model')
    monkeypatch.setattr(inputs, 'open_model', lambda name: source('score_D' if name == 's' else 'head_DV'))
    monkeypatch.setattr(inputs, 'tokenizer_of', lambda _: kept(b''))


@pytest.fixture
def mesh():
    """Each stage sets a mesh for its process; here the next test must not see it."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield jax.sharding.get_mesh()


@pytest.fixture(scope='module')
def one_device():
    """Eight faked devices take turns on a few cores; most tests of long stages need none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'devices', lambda *platform: DEVICES(*platform)[:1])
        yield


@pytest.fixture(scope='module')
def compiled_once(tmp_path_factory):
    """Every run of a stage compiles its programs; here all but the first find them."""
    settings = {
        'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('jit')),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield
