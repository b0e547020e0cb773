"""The tokenizer stage: from a source string to a workdir with a tokenizer."""

import json
import re

import pytest

from llama2_jax import toy
from llama2_jax.config import UserError
from llama2_jax.stages import tokenizer as stage
from llama2_jax.stages.tokenizer import TokenizerConfig
from llama2_jax.text.tokenizer import Tokenizer


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / 'corpus').mkdir()
    (tmp_path / 'corpus/a.txt').write_text('the cat sat on the mat\nthe dog sat too\n' * 50)
    (tmp_path / 'corpus/b.txt').write_text('naïve zebras zigzag through the zoo\n' * 50, encoding='utf-8')
    return f'text:{tmp_path}/corpus/*.txt'


def test_trains_on_files(corpus, tmp_path, capsys):
    config = TokenizerConfig(corpus, vocab_size=300)
    tokenizer = stage.run(config, str(tmp_path / 'tok'))
    assert sorted(p.name for p in (tmp_path / 'tok').iterdir()) == ['.lock', 'config.json', 'inputs.json', 'tokenizer.model']
    assert json.loads((tmp_path / 'tok/config.json').read_text())['source'] == corpus
    assert tokenizer.vocab_size == Tokenizer(tmp_path / 'tok').vocab_size == 300
    texts = [(tmp_path / 'corpus' / name).read_text(encoding='utf-8') for name in ('a.txt', 'b.txt')]
    tokens = sum(len(tokenizer.encode(text, False, False)) for text in texts)
    out = capsys.readouterr().out
    assert '300 pieces' in out
    assert float(re.search(r'([\d.]+) bytes per token', out)[1]) == pytest.approx(len(''.join(texts).encode()) / tokens, abs=0.01)


def test_again_keeps_what_is_there(corpus, tmp_path, capsys):
    config = TokenizerConfig(corpus, vocab_size=300)
    stage.run(config, str(tmp_path / 'tok'))
    before = (tmp_path / 'tok/tokenizer.model').stat().st_mtime_ns
    stage.run(config, str(tmp_path / 'tok'))
    assert (tmp_path / 'tok/tokenizer.model').stat().st_mtime_ns == before
    assert 'already trained' in capsys.readouterr().out
    with pytest.raises(UserError, match='vocab_size=300, and this one has vocab_size=310'):
        stage.run(TokenizerConfig(corpus, vocab_size=310), str(tmp_path / 'tok'))


def test_text_that_has_changed_is_noticed(corpus, tmp_path):
    config = TokenizerConfig(corpus, vocab_size=300)
    stage.run(config, str(tmp_path / 'tok'))
    with (tmp_path / 'corpus/b.txt').open('a') as file:
        file.write('more\n')
    with pytest.raises(UserError, match=r'source=text:.*has changed'):
        stage.run(config, str(tmp_path / 'tok'))


def test_a_vocabulary_that_was_too_large_can_be_set_right(corpus, tmp_path):
    with pytest.raises(UserError, match='largest possible one is (3..)') as error:
        stage.run(TokenizerConfig(corpus, vocab_size=4096), str(tmp_path / 'tok'))
    largest = int(re.search(r'is (\d+)', str(error.value))[1])
    assert stage.run(TokenizerConfig(corpus, vocab_size=largest), str(tmp_path / 'tok')).vocab_size == largest
    assert json.loads((tmp_path / 'tok/config.json').read_text())['vocab_size'] == largest


def test_several_sources_are_read_one_after_the_other(corpus):
    names = stage.source_names(TokenizerConfig(f'toy:guides, {corpus}'))
    assert names == ['toy:guides', corpus]
    documents = list(stage.documents(names))
    assert len(documents) == 452
    assert documents[:450] == list(toy.documents('guides'))


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('toy:guides:2', "leave weight and epochs away from 'toy:guides'"),
        ('toy:guides@3', "leave weight and epochs away from 'toy:guides'"),
        ('toy:poems', 'toy:poems'),
        ('text:/nowhere/*.txt', 'matches no file'),
        ('', 'empty'),
    ],
)
def test_bad_sources(source, message, tmp_path):
    with pytest.raises(UserError, match=message):
        stage.run(TokenizerConfig(source), str(tmp_path / 'tok'))
    assert not (tmp_path / 'tok').exists()


def test_toy_world_with_1024_pieces(tmp_path):
    tokenizer = stage.run(TokenizerConfig(), str(tmp_path))
    assert tokenizer.vocab_size == 1024
    assert 2.6 < stage.bytes_per_token(tokenizer, 'toy:documents') < 3.0
    assert 2 <= len(tokenizer.encode('Mira lives in Harrowby.', False, False)) <= 8
