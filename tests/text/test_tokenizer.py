"""The tokenizer against LLaMA 2's own model, and training with its settings."""

import itertools
import pickle
import random
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from llama2_jax.config import UserError
from llama2_jax.text.tokenizer import SENTENCE_BYTES, Tokenizer, sentences, train_tokenizer

GOLDEN = {
    'Hello world': '15043 3186',
    '12345': '29871 29896 29906 29941 29946 29945',
    'a\n\nb': '263 13 13 29890',
    '  two leading': '259 1023 8236',
    'naïve café': '1055 30085 345 274 28059',
    '\U0001f642': '29871 243 162 156 133',
    '[INST]': '518 25580 29962',
    '[INST] Hi [/INST]': '518 25580 29962 6324 518 29914 25580 29962',
    '[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]': (
        '518 25580 29962 3532 14816 29903 6778 13 3629 11473 29889 13 29966 829 14816 29903 6778 13 13 18567 518 29914 25580 '
        '29962'
    ),
}


@pytest.fixture(scope='module')
def texts():
    rng = random.Random(0)
    words = ['the', 'cat', 'sat', 'naïve', '12345', 'red\tmat', 'hello', '<s>', 'under', 'yellow', 'trees']
    lines = [' ' * rng.choice([0, 0, 4, 8]) + ' '.join(rng.choices(words, k=12)) for _ in range(1500)]
    return ['\n'.join(lines[i : i + 15]) for i in range(0, 1500, 15)]


@pytest.fixture(scope='module')
def trained(texts, tmp_path_factory):
    return train_tokenizer(texts, tmp_path_factory.mktemp('tok') / 'tokenizer.model', 340)


@pytest.mark.parametrize('text', GOLDEN)
def test_golden_vectors(llama2, text):
    assert llama2.encode(text, bos=False, eos=False) == [int(i) for i in GOLDEN[text].split()]
    assert llama2.decode(llama2.encode(text, bos=True, eos=True)) == text


def test_llama2_ids(llama2):
    assert (llama2.vocab_size, llama2.unk_id, llama2.bos_id, llama2.eos_id) == (32000, 0, 1, 2)
    assert llama2.encode('Hello world', bos=True, eos=True) == [1, 15043, 3186, 2]
    assert llama2.encode('', bos=False, eos=False) == []
    assert llama2.encode('', bos=True, eos=True) == [1, 2]
    assert [llama2.encode(d, False, False)[1:] for d in '0123456789'] == [
        [i] for i in (29900, 29896, 29906, 29941, 29946, 29945, 29953, 29955, 29947, 29929)
    ]
    assert llama2.decode([29871, 15043]) == ' Hello'
    assert llama2.decode([1, 15043, 2]) == 'Hello'


def test_llama2_dialog(llama2):
    """Recipe D.1: every finished pair is one text with BOS and EOS, an open question one with BOS."""
    finished = '[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! '
    expected = (
        '1 518 25580 29962 3532 14816 29903 6778 13 3629 11473 29889 13 29966 829 14816 29903 6778 13 13 18567 518 29914 25580 '
        '29962 15043 29991 29871 2 1 518 25580 29962 2648 29872 518 29914 25580 29962'
    )
    ids = llama2.encode(finished, bos=True, eos=True) + llama2.encode('[INST] Bye [/INST]', bos=True, eos=False)
    assert ids == [int(i) for i in expected.split()]


@pytest.mark.parametrize('text', ['<s>', '</s>', 'a</s><s>b', '<unk>', '<0x0A>'])
def test_control_strings_are_ordinary_text(llama2, trained, text):
    for tokenizer in (llama2, trained):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert not {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, 13} & set(ids)
        assert tokenizer.decode(ids) == text


def test_round_trips_over_arbitrary_unicode(trained):
    rng = random.Random(1)
    points = [c for c in itertools.chain(range(0x3000), range(0x1F300, 0x1F700), range(0xFFF0, 0x10000)) if c != 0x2581]
    for _ in range(300):
        text = ''.join(chr(c) for c in rng.choices(points, k=rng.randint(0, 40)))
        text = text.replace('z', '   ').replace('q', '\n \n')
        assert trained.decode(trained.encode(text, bos=True, eos=True)) == text
    ids = trained.encode('a\nb\n', bos=False, eos=False)
    assert ids.count(13) == 2


def test_batch_is_each(trained, texts):
    texts = [*texts[:5], '', 'é']
    for bos, eos in itertools.product((False, True), repeat=2):
        batch = trained.encode_batch(texts, bos, eos)
        assert batch == [trained.encode(text, bos, eos) for text in texts]
        assert all(ids[:bos] == [1] * bos and ids[len(ids) - eos :] == [2] * eos for ids in batch)


def test_settings_of_a_trained_model(trained, llama2):
    ours, theirs = (sentencepiece_model_pb2.ModelProto.FromString(Path(t.path).read_bytes()) for t in (trained, llama2))
    same = [field.name for field in theirs.trainer_spec.DESCRIPTOR.fields]
    for name in ('input', 'model_prefix', 'input_format', 'vocab_size', 'num_threads'):
        same.remove(name)
    for name in same:
        assert getattr(ours.trainer_spec, name) == getattr(theirs.trainer_spec, name), name
    for field in theirs.normalizer_spec.DESCRIPTOR.fields:
        assert getattr(ours.normalizer_spec, field.name) == getattr(theirs.normalizer_spec, field.name), field.name
    assert ours.trainer_spec.vocab_size == len(ours.pieces) == 340
    assert [(p.piece, p.type) for p in ours.pieces[:259]] == [(p.piece, p.type) for p in theirs.pieces[:259]]


def test_learned_pieces(trained):
    pieces = sentencepiece_model_pb2.ModelProto.FromString(Path(trained.path).read_bytes()).pieces[259:]
    assert not [p.piece for p in pieces if '\n' in p.piece]
    assert not [p.piece for p in pieces if len(p.piece) > 1 and any(c.isdigit() for c in p.piece)]
    runs = [p for p in pieces if not p.piece.strip('▁')]
    assert len(runs) > 1
    assert {p.score for p in runs} == {-1e9}
    assert all(p.score == -i for i, p in enumerate(pieces) if p not in runs)
    spaced = [trained.piece(i) for i in trained.encode('   cat', bos=False, eos=False)]
    assert spaced[-1] == '▁cat'  # the last space stays with the word


def test_same_texts_same_file(trained, texts, tmp_path):
    again = train_tokenizer(iter(texts), tmp_path, 340)
    assert again.path == str(tmp_path / 'tokenizer.model')
    assert Path(again.path).read_bytes() == Path(trained.path).read_bytes()
    assert again.fingerprint == trained.fingerprint
    varied = [''.join(random.Random(i).choices('abcdefg ', k=60)) for i in range(1000)]
    sampled = [train_tokenizer(varied, tmp_path / name, 330, max_sentences=150).fingerprint for name in ('a.model', 'b.model')]
    assert sampled[0] == sampled[1] != train_tokenizer(varied, tmp_path / 'a.model', 330).fingerprint
    assert [p.name for p in sorted(tmp_path.iterdir())] == ['a.model', 'b.model', 'tokenizer.model']


def test_training_sentences_hold_all_the_text():
    assert list(sentences(['a\n\n b\n'])) == ['a', ' b']
    text = ('wörd ' * 2000).strip()
    cut = list(sentences([text]))
    assert len(cut) == 3
    assert ' '.join(cut) == text
    assert max(len(s.encode()) for s in cut) <= SENTENCE_BYTES
    solid = 'ö€' * 3000
    cut = list(sentences([solid]))
    assert ''.join(cut) == solid
    assert [len(s.encode()) for s in cut] == [4192, 4190, 4190, 2428]


def test_long_lines_are_trained_on(tmp_path):
    tokenizer = train_tokenizer(['zebra quagga ' * 1000], tmp_path, 279)
    assert '▁zebra' in [tokenizer.piece(i) for i in range(279)]


def test_training_errors(tmp_path):
    def train(texts, size):
        train_tokenizer(texts, tmp_path / 'tokenizer.model', size)

    with pytest.raises(UserError, match='too small for a vocabulary of 5000: the largest possible one is 265'):
        train(['ab ab\nab'], 5000)
    train(['ab ab\nab'], 265)
    with pytest.raises(UserError, match='A vocabulary of 200 is too small: .* need 262'):
        train(['ab ab\nab'], 200)
    for nothing in ([], [''], ['\n\n']):
        with pytest.raises(UserError, match='no text'):
            train(nothing, 300)
    with pytest.raises(UserError, match='lone surrogate'):
        train(['ab', 'a\ud800'], 300)
    with pytest.raises(UserError, match='101'):
        train_tokenizer(['ab ab'], tmp_path, 265, max_sentences=5)


def test_loading_errors(tmp_path):
    with pytest.raises(UserError, match='no tokenizer at .*nowhere'):
        Tokenizer(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='no tokenizer at .*tokenizer.model'):
        Tokenizer(tmp_path)
    for content in (b'not a model', b''):
        (tmp_path / 'tokenizer.model').write_bytes(content)
        with pytest.raises(UserError, match='tokenizer.model'):
            Tokenizer(tmp_path)


def test_encoding_errors(trained):
    with pytest.raises(UserError, match=r'Character 1 .*U\+D800'):
        trained.encode('a\ud800', bos=False, eos=False)
    for ids in ([1, 340], [-1]):
        with pytest.raises(UserError, match=f'Token id {ids[-1]} is outside'):
            trained.decode(ids)


def test_travels_to_worker_processes(trained):
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode('the cat', True, True) == trained.encode('the cat', True, True)
    assert (copy.path, copy.fingerprint, copy.vocab_size) == (trained.path, trained.fingerprint, 340)


def test_fingerprint_is_of_the_content(trained, llama2, tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(Path(trained.path).read_bytes())
    assert Tokenizer(tmp_path).fingerprint == trained.fingerprint != llama2.fingerprint
