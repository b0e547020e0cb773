"""Models in a bucket: every format read from it and written to it, and nothing that looks whole before it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from small_models import GQA, random_model

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_model, open_model
from llama2_jax.checkpoints.names import keys
from llama2_jax.config import UserError
from llama2_jax.train.checkpoint import Checkpoints

pytestmark = pytest.mark.filterwarnings('default')  # of Google's libraries


@pytest.mark.parametrize(('form', 'shards'), [('hf', 1), ('meta', 2), ('gguf', 1), ('orbax', 1)])
def test_every_format_goes_to_a_bucket_and_comes_back(form, shards, objects, model_directory, tmp_path):
    if form == 'meta':
        pytest.importorskip('torch')
    objects.clear()
    local = open_model(model_directory(dtype='bfloat16'))
    there = f'gs://bucket/{form}/m.gguf' if form == 'gguf' else f'gs://bucket/{form}'
    convert(local, there, form, shards=shards)
    assert not any('incomplete' in name for name in objects)
    source = open_model(there)
    assert (source.form, source.dtype.name) == (form, 'bfloat16')
    convert(source, tmp_path / 'back', 'orbax')
    back = open_model(tmp_path / 'back')
    for key in keys(GQA, 'head_DV'):
        assert back.read(*key).tobytes() == local.read(*key).tobytes(), key
    with pytest.raises(UserError, match=f'{there} exists already'):
        convert(local, there, form)


def test_a_conversion_that_failed_or_was_killed(objects, model_directory):
    objects.clear()
    source = open_model(model_directory())
    read, there = source.read, 'gs://bucket/out'

    def broken(name, layer):
        if (name, layer) == ('w_q_DHK', 1):
            raise UserError('It broke.')
        return read(name, layer)

    object.__setattr__(source, 'read', broken)
    for form in ('orbax', 'hf', 'meta'):
        with pytest.raises(UserError, match='It broke'):
            convert(source, there, form)
        assert not objects
    objects |= {'out.incomplete': b'', 'out/model.safetensors': b'half'}  # what a kill leaves
    with pytest.raises(UserError, match='gs://bucket/out is not a model directory'):
        open_model(there)
    convert(open_model(model_directory()), there, 'hf')
    assert 'out.incomplete' not in objects and open_model(there).form == 'hf'


def test_model_directories_and_checkpoints(objects, tokenizer):
    objects.clear()
    model = random_model(GQA)
    for step in (1, 2):  # the second in place of the first
        save_model('gs://bucket/run/model', model, tokenizer, {'stage': 'test', 'parent': None, 'step': step})
    loaded, _ = load_model('gs://bucket/run/model')
    assert open_model('gs://bucket/run/model').provenance['step'] == 2
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    state = {'x': jnp.arange(6.0)}
    with Checkpoints('gs://bucket/run/checkpoints', keep_last=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {'x': state['x'] * step}, {'step': step})
    with Checkpoints('gs://bucket/run/checkpoints', keep_last=1) as checkpoints:
        assert checkpoints.steps == [2]
        restored, progress = checkpoints.restore(state)
    assert restored['x'].tolist() == [0, 2, 4, 6, 8, 10] and progress == {'step': 2}


def test_what_is_not_there(objects, monkeypatch):
    objects.clear()
    with pytest.raises(UserError, match=r'There is no model at gs://bucket/nothing\.$'):
        open_model('gs://bucket/nothing')

    def exists(self):
        raise ImportError('Please install gcsfs to access Google Storage')

    monkeypatch.setattr(epath.gpath._GPath, 'exists', exists)
    with pytest.raises(
        UserError, match=r'^gs://bucket/model cannot be reached: Please install gcsfs to access Google Storage\.$'
    ):
        open_model('gs://bucket/model')
