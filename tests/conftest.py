"""Every test sees eight CPU devices, whatever the machine has, and JAX at its strictest."""

import os
import subprocess
import tempfile
import threading
from collections import namedtuple

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'  # or it would ask Google over gRPC what kind of bucket it is
os.environ['JAX_CPU_ENABLE_ASYNC_DISPATCH'] = 'false'  # as runtime.start does, and here for subprocesses too
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

worker = os.environ.get('PYTEST_XDIST_WORKER')
if worker and hasattr(os, 'sched_setaffinity'):  # a core for each of pytest's processes, and what it starts
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix('gw')) % len(cores)]})

if 'LLAMA2_JAX_CACHE' not in os.environ:  # one for this session: pytest's worker processes find it set
    CACHE = tempfile.TemporaryDirectory(prefix='llama2_jax-')
    os.environ['LLAMA2_JAX_CACHE'] = CACHE.name

from pathlib import Path  # noqa: E402 (the environment must be set before JAX is imported)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from bucket import Bucket  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from random_policy import DEVICES  # noqa: E402

from llama2_jax import inputs  # noqa: E402
from llama2_jax.mesh import MeshConfig, make_mesh  # noqa: E402
from llama2_jax.text.tokenizer import Tokenizer  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

LLAMA2 = Path(__file__).parents[2] / 'shared' / 'data' / 'tokenizer'  # under a licence that forbids copying it here


@pytest.fixture(scope='session')
def fixtures() -> Path:
    """The folder of real data and of one really trained small model; its README names sources and licences."""
    return Path(__file__).parent / 'fixtures'


@pytest.fixture(scope='session')
def llama2() -> Tokenizer:
    """The LLaMA 2 tokenizer, from $LLAMA2_TOKENIZER or beside the repository; the only thing without which tests are skipped."""
    path = Path(os.environ.get('LLAMA2_TOKENIZER', LLAMA2))
    if not path.exists():
        pytest.skip('the LLaMA 2 tokenizer is not here: LLAMA2_TOKENIZER=DIR names it')
    return Tokenizer(path)


@pytest.fixture(scope='module')
def objects():
    """What the bucket gs://bucket holds, name -> bytes; it is served by a thread of this process."""
    fsspec = pytest.importorskip('fsspec')
    pytest.importorskip('gcsfs')
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ('STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL'):
            patch.setenv(name, server.url)
        patch.setenv('GCE_METADATA_ROOT', '127.0.0.1:1')  # nobody is asked who we are
        patch.setitem(fsspec.config.conf, 'gcs', {'token': 'anon', 'use_listings_cache': False})
        yield server.objects
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module', autouse=True)
def no_mesh_left():
    """Stages set a mesh for their process, which the next file's tests must not see."""
    yield
    if not jax.sharding.get_abstract_mesh().empty:
        jax.set_mesh(Mesh(np.empty((), object), ()))


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, full when that is written."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('mounting a small file system is not allowed here')
    yield disk
    subprocess.run(['umount', disk], check=True)
