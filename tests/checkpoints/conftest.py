"""Small models with tokenizers of their own."""

import pytest
from small_models import GQA, random_model

from llama2_jax.checkpoints.directory import save_model
from llama2_jax.text.tokenizer import train_tokenizer


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
    return train_tokenizer(['some words to learn from, and some more of them, 12 or 34 at a time'] * 20, path, 296)


@pytest.fixture
def model_directory(tmp_path, tokenizer):
    """(config, dtype) -> a model directory."""

    def make(config=GQA, dtype='float32'):
        path = tmp_path / f'{config.kv_heads}-{config.heads}-{config.head_dim}-{dtype}'
        save_model(path, random_model(config, dtype), tokenizer, {'stage': 'test', 'parent': None, 'step': 7})
        return path

    return make
