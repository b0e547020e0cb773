"""Every test sees eight CPU devices, whatever the machine has, and JAX at its strictest."""

import os
import tempfile
import threading

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
from jax.sharding import Mesh  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

SHARED = Path(__file__).parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared() -> Path:
    """The optional folder of models and texts beside the repository; tests that need it skip where it is absent."""
    if not SHARED.exists():
        pytest.skip(f'no optional test data at {SHARED}')
    return SHARED


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
