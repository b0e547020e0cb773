"""Tokenizers of other people's models: a tokenizer.json in place of tokenizer.model, added tokens, and padded vocabularies."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import MHA
from text.test_template import CHATML

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.formats.tokenizer_json import make_tokenizer_json, read_tokenizer_json
from llama2_jax.checkpoints.load import load_model, open_model, tokenizer_of
from llama2_jax.checkpoints.verify import against_transformers
from llama2_jax.config import UserError
from llama2_jax.text import template
from llama2_jax.text.tokenizer import Tokenizer

SIZE = 296  # pieces of the small models' tokenizer
CHATML_TOKENS = ('<|im_start|>', '<|im_end|>')


@pytest.fixture
def hf(model_directory, tmp_path):
    """A Hugging Face directory with a tokenizer.json and no tokenizer.model."""
    convert(open_model(model_directory(MHA)), tmp_path / 'hf', 'hf')
    (tmp_path / 'hf/tokenizer.model').unlink()
    return tmp_path / 'hf'


def change(file, **values):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def widen(hf, rows):
    """Adds rows of the vocabulary, as resize_token_embeddings of transformers does."""
    tensors = load_file(hf / 'model.safetensors')
    for name in ('model.embed_tokens.weight', 'lm_head.weight'):
        tensors[name] = np.concatenate([tensors[name], np.arange(rows * 64, dtype=np.float32).reshape(rows, 64) / 999])
    save_file(tensors, hf / 'model.safetensors', {'format': 'pt'})
    change(hf / 'config.json', vocab_size=SIZE + rows)


def add(hf, *tokens, special=True):
    """Lists tokens after the last piece in tokenizer.json."""
    content = json.loads((hf / 'tokenizer.json').read_text())
    new = [{**content['added_tokens'][0], 'id': SIZE + i, 'content': text, 'special': special} for i, text in enumerate(tokens)]
    change(hf / 'tokenizer.json', added_tokens=content['added_tokens'] + new)


def mixed_texts():
    rng = random.Random(0)
    drawn = [''.join(rng.choices('some words 12\n\t  é漢.▁', k=50)) for _ in range(300)]
    return ['', ' ', '  two', 'some  words\n\n\n to\tlearn', '🤗 12 or 34', '    ' * 9 + 'x', 'trail  ', *drawn]


def test_ids_of_a_tokenizer_json_are_those_of_the_tokenizers_library(hf):
    tokenizers = pytest.importorskip('tokenizers')
    theirs = tokenizers.Tokenizer.from_file(str(hf / 'tokenizer.json'))
    _, ours = load_model(hf)
    for text in mixed_texts():
        assert ours.encode(text, bos=False, eos=False) == theirs.encode(text, add_special_tokens=False).ids, text
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, 2, SIZE)


def test_ids_of_llama2s_own_tokenizer_json(llama2, tmp_path):
    """Also as older versions of transformers write it, each merge in one string, and as transformers 5 saves it."""
    transformers = pytest.importorskip('transformers')
    original = llama2
    content = make_tokenizer_json(original.model)
    content['model']['merges'] = [' '.join(merge) for merge in content['model']['merges']]
    (tmp_path / 'tokenizer.model').write_bytes(original.model)
    transformers.LlamaTokenizer.from_pretrained(str(tmp_path)).save_pretrained(tmp_path / 'saved')
    from tokenizers import Tokenizer as Theirs

    (tmp_path / 'old.json').write_text(json.dumps(content))
    for file in (tmp_path / 'old.json', tmp_path / 'saved/tokenizer.json'):
        ours, theirs = Tokenizer.from_bytes(read_tokenizer_json(file, {}, {})), Theirs.from_file(str(file))
        for text in mixed_texts():
            if file.name == 'old.json' or not text.startswith((' ', '▁')):  # where transformers 5 leaves a space away
                assert ours.encode(text, bos=False, eos=False) == theirs.encode(text, add_special_tokens=False).ids, text
            if file.name == 'old.json':
                assert ours.encode(text, bos=False, eos=False) == original.encode(text, bos=False, eos=False)


def test_a_byte_level_tokenizer_is_refused(hf):
    tokenizers = pytest.importorskip('tokenizers')
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    theirs.train_from_iterator(['hello world'], tokenizers.trainers.BpeTrainer(special_tokens=['<unk>', '<s>', '</s>']))
    theirs.save(str(hf / 'tokenizer.json'))
    with pytest.raises(UserError, match=r'tokenizer\.json is a byte-level BPE.*tokenizer\.model'):
        load_model(hf)
    (hf / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match=r'hf has no tokenizer\.model'):
        load_model(hf)


BPE = {'type': 'BPE', 'byte_fallback': True, 'merges': [], 'vocab': {'<unk>': 0, '<s>': 1, '</s>': 2}}


@pytest.mark.parametrize(
    'content',
    [
        {'model': []},
        {'model': {**BPE, 'type': 'Unigram'}},
        {'model': {**BPE, 'byte_fallback': False}},
        {'model': {'type': 'BPE', 'byte_fallback': True}},
        {'model': {**BPE, 'vocab': {'<unk>': 'x'}}},
        {'model': {**BPE, 'vocab': {**BPE['vocab'], 'a': 4}}},
        {'model': {**BPE, 'merges': [1]}},
        {'model': {**BPE, 'merges': [['a', 'b']]}},
        {'model': {**BPE, 'unk_token': '<none>'}},
        {'model': BPE},
        {'model': BPE, 'pre_tokenizer': {'a': 1}},
        {'model': BPE, 'normalizer': {'type': 'NFKC'}},
        {'added_tokens': [1]},
        {'added_tokens': [{'id': -1, 'content': 'a'}]},
    ],
)
def test_tokenizer_jsons_of_another_kind(content, hf):
    (hf / 'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'hf/tokenizer\.json'):
        load_model(hf)


@pytest.mark.parametrize(
    ('merges', 'right'),
    [
        ('a a, aa b, a ab, a b', True),
        ('a a, aa b, a ab, aa a', False),
        ('a b, a ab, a a, aa b', False),
        ('a a, a b, aa b, a ab', True),
        ('a a, a b, a ab', False),
    ],
)
def test_merges_that_no_scores_give(merges, right, tmp_path):
    """Of a piece that can be made in two ways, one way is missing, or comes at another time."""
    bytes_ = [f'<0x{i:02X}>' for i in range(256)]
    vocab = {text: i for i, text in enumerate(['<unk>', '<s>', '</s>', *bytes_, 'a', 'b', 'aa', 'ab', 'aab', 'aaa'])}
    model = {'model': {**BPE, 'vocab': vocab, 'merges': merges.split(', ')}}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(model))
    if right:
        tokenizer = Tokenizer.from_bytes(read_tokenizer_json(tmp_path / 'tokenizer.json', {}, {}))
        assert [tokenizer.piece(i) for i in tokenizer.encode('aaab', bos=False, eos=False)] == ['aa', 'ab']
        return
    with pytest.raises(UserError, match=r'tokenizer\.json'):
        read_tokenizer_json(tmp_path / 'tokenizer.json', {}, {})


@pytest.mark.parametrize('where', ['tokenizer.json', 'added_tokens.json', 'tokenizer_config.json'])
@pytest.mark.parametrize('slow', [True, False])
def test_tokens_of_a_chat_template_are_added(where, slow, hf, model_directory, tmp_path):
    """The ids of dialogs equal those of transformers, and they come back from our directory and its export."""
    transformers = pytest.importorskip('transformers')
    widen(hf, 2)
    change(hf / 'tokenizer_config.json', chat_template=CHATML)
    change(hf / 'generation_config.json', eos_token_id=[2, SIZE + 1])
    add(hf, *CHATML_TOKENS)
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    if where != 'tokenizer.json':
        content = json.loads((hf / 'tokenizer.json').read_text())
        change(hf / 'tokenizer.json', added_tokens=content['added_tokens'][:-2])
    if where == 'added_tokens.json':
        change(hf / where, **{text: SIZE + i for i, text in enumerate(CHATML_TOKENS)})
    if where == 'tokenizer_config.json':
        decoder = {str(SIZE + i): {'content': text, 'special': True} for i, text in enumerate(CHATML_TOKENS)}
        change(hf / where, added_tokens_decoder=decoder)
    if slow:
        (hf / 'tokenizer.model').write_bytes((model_directory(MHA) / 'tokenizer.model').read_bytes())
    convert(open_model(hf), tmp_path / 'ours', 'orbax')
    convert(open_model(tmp_path / 'ours'), tmp_path / 'back', 'hf')
    dialog = [
        {'role': 'user', 'content': 'some  words'},
        {'role': 'assistant', 'content': 'to'},
        {'role': 'user', 'content': 'x'},
    ]
    expected = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    assert {SIZE, SIZE + 1} < set(expected)
    for path in (hf, tmp_path / 'ours', tmp_path / 'back'):
        source = open_model(path)
        assert (source.config.vocab_size, source.stop_ids, source.notes) == (SIZE + 2, (2, SIZE + 1), ())
        tokenizer = tokenizer_of(source)
        tokenizer.prompts = source.prompts
        assert template.encode(dialog, tokenizer, 'dialog') == expected
        assert not {SIZE, SIZE + 1} & set(tokenizer.encode('<|im_end|>', bos=False, eos=False))  # typed, it is text
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / 'back')
    assert exported.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False) == expected
    assert against_transformers(open_model(tmp_path / 'ours'), tmp_path / 'back') < 1e-4


def test_added_tokens_that_are_text_are_written(hf):
    widen(hf, 1)
    add(hf, 'hello', special=False)
    _, tokenizer = load_model(hf)
    ids = tokenizer.encode('some hello', bos=False, eos=False)
    assert ids[-1] == SIZE and tokenizer.decode(ids) == 'some hello'


@pytest.mark.parametrize(('rows', 'tokens'), [(1, ['<pad>']), (24, []), (24, ['<pad>'])])
def test_rows_that_pad_are_cut_and_come_back(rows, tokens, hf, tmp_path):
    pytest.importorskip('transformers')
    widen(hf, rows)
    add(hf, *tokens)
    source = open_model(hf)
    assert source.config.vocab_size == SIZE and f'vocabulary of {SIZE + rows} is cut to the {SIZE} pieces' in source.notes[0]
    convert(source, tmp_path / 'ours', 'orbax')
    convert(open_model(tmp_path / 'ours'), tmp_path / 'back', 'hf')
    assert json.loads((tmp_path / 'back/config.json').read_text())['vocab_size'] == SIZE + rows
    head = load_file(tmp_path / 'back/model.safetensors')['lm_head.weight']
    assert np.array_equal(head[:SIZE], load_file(hf / 'model.safetensors')['lm_head.weight'][:SIZE])
    assert np.array_equal(head[SIZE:], np.repeat(head[:1], rows, 0))  # <unk>, which is never drawn
    assert against_transformers(open_model(tmp_path / 'ours'), tmp_path / 'back') < 1e-4


def test_rows_that_pad_are_kept_on_request(hf, tmp_path):
    widen(hf, 24)
    add(hf, '<pad>')
    source = open_model(hf, keep_padding=True)
    assert source.config.vocab_size == SIZE + 24 and not source.notes
    convert(source, tmp_path / 'ours', 'orbax')
    convert(open_model(tmp_path / 'ours'), tmp_path / 'back', 'hf')
    tensors, before = (load_file(path / 'model.safetensors') for path in (tmp_path / 'back', hf))
    assert all(np.array_equal(tensors[name], before[name]) for name in before)
    assert tokenizer_of(open_model(tmp_path / 'back')).piece(SIZE) == '<pad>'


def test_a_damaged_padded_size(hf, tmp_path):
    convert(open_model(hf), tmp_path / 'ours', 'orbax')
    for value in ('300', SIZE, True, 2**40):
        change(tmp_path / 'ours/config.json', padded_vocab_size=value)
        with pytest.raises(UserError, match=r'config\.json: padded_vocab_size'):
            open_model(tmp_path / 'ours')
