"""What others compute from our files: transformers, a re-implementation of Meta's model in PyTorch, and reward models."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import GQA, MHA, random_model

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_model, load_tree, open_model
from llama2_jax.checkpoints.names import keys
from llama2_jax.checkpoints.source import DTYPES, Source
from llama2_jax.checkpoints.verify import against_transformers
from llama2_jax.config import UserError
from llama2_jax.model.llama import Llama
from llama2_jax.model.reward import ScoreModel
from llama2_jax.text.dialog import encode_dialog, encode_prompt

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKENS = np.random.default_rng(1).integers(3, 296, size=(2, 33)).astype(np.int32)


def logits(model, tokens):
    return np.asarray(jax.jit(lambda model: model.logits(model(tokens)))(model))


@torch.no_grad()
def metas_logits(directory, tokens):
    """Meta's model as its code defines it: weights as stored, neighbours rotated as complex numbers (recipe A.3, A.4)."""
    params = json.loads((directory / 'params.json').read_text())
    files = sorted(directory.glob('consolidated.*.pth'))
    shards = [torch.load(file, weights_only=True, mmap=True) for file in files]
    rows = ('wq', 'wk', 'wv', 'w1', 'w3', 'output')

    def weight(name):
        if 'norm' in name:
            return shards[0][name].float()
        return torch.cat([shard[name] for shard in shards], 0 if name.split('.')[-2] in rows else 1).float()

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params['norm_eps']) * weight(name)

    B, L = tokens.shape
    heads, groups = params['n_heads'], params['n_kv_heads']
    size = params['dim'] // heads
    angles = torch.outer(torch.arange(L), 10_000.0 ** (-torch.arange(0, size, 2) / size))
    rotation = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(3)

    x = weight('tok_embeddings.weight')[torch.tensor(tokens).long()]
    mask = torch.full((L, L), -math.inf).triu(1)
    for layer in range(params['n_layers']):
        name = f'layers.{layer}.'
        y = norm(x, name + 'attention_norm.weight')
        q, k, v = (y @ weight(f'{name}attention.{w}.weight').T for w in ('wq', 'wk', 'wv'))
        q, k, v = q.view(B, L, heads, size), k.view(B, L, groups, size), v.view(B, L, groups, size)
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // groups, 2) for t in (k, v))
        scores = torch.einsum('blhk,bmhk->bhlm', q, k) / math.sqrt(size) + mask
        out = torch.einsum('bhlm,bmhk->blhk', scores.softmax(-1), v).flatten(2)
        x = x + out @ weight(name + 'attention.wo.weight').T
        y = norm(x, name + 'ffn_norm.weight')
        gate, up = (y @ weight(f'{name}feed_forward.{w}.weight').T for w in ('w1', 'w3'))
        x = x + (torch.nn.functional.silu(gate) * up) @ weight(name + 'feed_forward.w2.weight').T
    return (norm(x, 'norm.weight') @ weight('output.weight').T).numpy()


@pytest.mark.parametrize('config', [MHA, GQA], ids=['MHA', 'GQA'])
def test_logits_of_what_is_exported(config, model_directory, tmp_path):
    start = model_directory(config)
    expected = logits(load_model(start)[0], TOKENS)
    assert expected.std() > 0.1
    convert(open_model(start), tmp_path / 'hf', 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert theirs.dtype == torch.float32 and theirs.config.tie_word_embeddings is False
    np.testing.assert_allclose(theirs(torch.tensor(TOKENS).long()).logits.detach(), expected, rtol=0, atol=1e-4)
    for shards in (1, 8):
        convert(open_model(start), tmp_path / f'meta-{shards}', 'meta', shards=shards)
        np.testing.assert_allclose(metas_logits(tmp_path / f'meta-{shards}', TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_dtypes_of_what_is_exported(dtype, model_directory, tmp_path):
    start = model_directory(dtype=dtype)
    expected = logits(load_model(start, 'float32')[0], TOKENS)
    convert(open_model(start), tmp_path / 'hf', 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype='auto')
    assert theirs.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(theirs.float()(torch.tensor(TOKENS).long()).logits.detach(), expected, rtol=0, atol=1e-4)


def test_what_transformers_saves_is_read(tmp_path, tokenizer):
    config = transformers.LlamaConfig(
        vocab_size=296,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / str(dtype)
        theirs.to(dtype).save_pretrained(path, max_shard_size='100KB')
        shutil.copy(tokenizer.path, path / 'tokenizer.model')
        assert len(list(path.glob('*.safetensors'))) > 1
        model, _ = load_model(path, 'float32')
        expected = theirs.float()(torch.tensor(TOKENS).long()).logits.detach()
        np.testing.assert_allclose(logits(model, TOKENS), expected, rtol=0, atol=1e-4)
        assert model.config.context == 128


def test_transformers_reads_our_gguf(tmp_path, llama2):
    """Its GGUF reader undoes llama.cpp's order of rows by itself."""
    config = dataclasses.replace(GQA, vocab_size=32_000, layers=2)
    save_model(tmp_path / 'model', random_model(config), llama2, {})
    convert(open_model(tmp_path / 'model'), tmp_path / 'model.gguf', 'gguf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='model.gguf')
    expected = logits(load_model(tmp_path / 'model')[0], TOKENS)
    np.testing.assert_allclose(theirs(torch.tensor(TOKENS).long()).logits.detach(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('form', ['hf', 'meta', 'orbax', 'gguf'])
def test_stories260k_gives_its_golden_logits(form, fixtures, tmp_path):
    stories = fixtures / 'stories260K'
    path = tmp_path / ('model.gguf' if form == 'gguf' else 'converted')
    convert(open_model(stories / ('meta' if form == 'hf' else 'hf')), path, form)
    golden = json.loads((stories / 'golden.json').read_text())
    tokens = np.array([golden['greedy'][:32]], np.int32)
    np.testing.assert_allclose(
        logits(load_model(path)[0], tokens)[0], np.load(stories / 'golden_logits_first32.npy'), rtol=0, atol=1e-3
    )


def test_chat_template_and_tokenizer_are_metas(llama2, tmp_path):
    save_model(tmp_path / 'model', random_model(dataclasses.replace(GQA, vocab_size=32_000, layers=1)), llama2, {}, chat=True)
    convert(open_model(tmp_path / 'model'), tmp_path / 'hf', 'hf', 'bfloat16')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    texts = ['Hello world', '12345', 'a\n\nb', 'naïve café', '🙂', '[INST] Hi [/INST]', 'def f(x):\n    return  x\t# 1']
    texts += [f'two{n * " "}words and {n * " "} {n}' for n in range(2, 40)]
    texts += [' Hello', '  Hello', ' \n b', '▁x', '   ', '', ' ', '\n', '\t x ', ' 日本', ' 🙂', ' </ s>', '  \n  ']
    for text in texts:
        assert theirs(text).input_ids == llama2.encode(text, bos=True, eos=False), text
    brief = {'role': 'system', 'content': 'Be brief.'}
    hi, hello, bye = (
        {'role': role, 'content': content}
        for role, content in (('user', ' Hi\n'), ('assistant', 'Hello! '), ('user', 'Bye, 12 <<x>>'))
    )
    for messages in ([hi], [brief, hi], [hi, hello, bye], [brief, hi, hello, bye], [brief, hi, hello, hi, hello, bye]):
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert ids == encode_prompt(messages, llama2)
        assert theirs.apply_chat_template([*messages, hello], return_dict=False) == encode_dialog([*messages, hello], llama2)[0]
    text = theirs.apply_chat_template([brief, hi, hello, bye], tokenize=False)
    assert text == ('<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello! </s><s>[INST] Bye, 12 <<x>> [/INST]')
    vector = [{**hi, 'content': 'Hi'}, hello, {**bye, 'content': 'Bye'}]
    assert theirs.apply_chat_template([brief, *vector], return_dict=False) == [
        *(1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 11473, 29889, 13, 29966, 829, 14816, 29903, 6778, 13, 13),
        *(18567, 518, 29914, 25580, 29962, 15043, 29991, 29871, 2, 1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962),
    ]  # recipe D.1
    for wrong in ([hello], [hi, hi], [hi, brief], [brief, hello]):
        with pytest.raises(Exception, match='take turns'):
            theirs.apply_chat_template(wrong, tokenize=False)


def reward_source(model, score_D, tokenizer):
    def read(name, layer):
        if name == 'score_D':
            return score_D
        array = getattr(model if layer is None else model.blocks, name)[...]
        return np.asarray(array if layer is None else array[layer])

    return Source(tokenizer.path, 'memory', GQA, DTYPES['float32'], 'score_D', read, lambda: tokenizer.model, {})


def test_reward_models(tokenizer, tmp_path):
    """A score of the last token: equal in transformers, and the head survives hf -> orbax -> hf."""
    model = random_model(GQA)
    score_D = np.random.default_rng(5).normal(size=64).astype(np.float32)
    source = reward_source(model, score_D, tokenizer)
    source = dataclasses.replace(source, path=tmp_path / 'nowhere')
    convert(source, tmp_path / 'orbax', 'orbax')
    convert(open_model(tmp_path / 'orbax'), tmp_path / 'hf', 'hf')
    convert(open_model(tmp_path / 'hf'), tmp_path / 'again', 'orbax')
    assert np.array_equal(open_model(tmp_path / 'again').read('score_D', None), score_D)
    lengths = [33, 20]
    tokens = TOKENS.copy()
    tokens[1, 20:] = 0
    hidden = np.asarray(model(tokens))
    expected = [hidden[i, length - 1] @ score_D for i, length in enumerate(lengths)]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'hf').eval()
    scores = theirs(torch.tensor(tokens).long(), attention_mask=torch.tensor(tokens > 0).long()).logits.detach()
    assert scores.shape == (2, 1)
    np.testing.assert_allclose(scores[:, 0], expected, rtol=0, atol=1e-4)

    class Reward(nnx.Module):
        def __init__(self, key):
            model = Llama(GQA, key)
            self.table_VD, self.blocks, self.norm_D = model.table_VD, model.blocks, model.norm_D
            self.score_D = nnx.Param(jnp.zeros(64))

    abstract = jax.eval_shape(Reward, jax.random.key(0))
    for path in ('orbax', 'hf'):
        tree = load_tree(open_model(tmp_path / path), abstract, DTYPES['float32'])
        assert np.array_equal(tree.score_D[...], score_D)
        assert np.array_equal(tree.blocks.w_q_DHK[...], model.blocks.w_q_DHK[...])
    for form in ('meta', 'gguf'):
        with pytest.raises(UserError, match=f"^The format {form} has no place for 'score_D'"):
            convert(open_model(tmp_path / 'hf'), tmp_path / 'x.gguf', form)
    with pytest.raises(UserError, match='is a reward model'):
        load_model(tmp_path / 'hf')
    assert list(keys(GQA, 'score_D'))[-1] == ('score_D', None)


def test_verify(model_directory, tokenizer, tmp_path):
    """Close for what was exported, for language models and reward models; far off for another model's weights."""
    start, other = model_directory(GQA), model_directory(MHA)
    save_model(tmp_path / 'rm', ScoreModel(GQA, jax.random.key(0)), tokenizer, {})
    for directory in (start, tmp_path / 'rm'):
        source = open_model(directory)
        exported = tmp_path / f'{source.head}-hf'
        convert(source, exported, 'hf')
        assert 0 < against_transformers(source, exported) < 1e-4
    convert(open_model(other), tmp_path / 'other', 'hf')
    assert against_transformers(open_model(start), tmp_path / 'other') > 0.1
