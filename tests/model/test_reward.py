"""Scores: of the last token, of the row alone, those of transformers, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_model, load_score_model, open_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.inference.open import open_scorer
from llama2_jax.inference.scorer import Scorer
from llama2_jax.mesh import MeshConfig, make_mesh, parameter_name, parameter_spec
from llama2_jax.model.llama import Llama
from llama2_jax.model.reward import ScoreModel, scores_at, with_score
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.train.optimizer import decays

SHAPE = ModelConfig(vocab_size=296, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=80)
LENGTHS = (5, 32, 33, 1, 80, 17)


@pytest.fixture(scope='module')
def model():
    """Random norms too, so that scores differ much."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32), ScoreModel(SHAPE, jax.random.key(3)))


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
    return train_tokenizer(['some words to learn from, and some more of them, 12 or 34 at a time'] * 20, path, 296)


@pytest.fixture(scope='module')
def rows():
    """Ids of any value, 0 among them, also at the end."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, SHAPE.vocab_size, length).tolist() for length in LENGTHS]
    rows[1][-3:] = [0, 0, 0]
    return rows


@pytest.fixture(scope='module')
def expected(model, rows):
    """Each row by itself, unpadded."""
    return np.array([float(model(jnp.array([row]))[0, -1]) for row in rows])


def test_a_score_is_the_head_times_the_hidden_state(model):
    tokens = jnp.arange(14).reshape(2, 7)
    hidden = super(ScoreModel, model).__call__(tokens)
    assert model(tokens).dtype == jnp.float32
    np.testing.assert_allclose(model(tokens), np.asarray(hidden) @ np.asarray(model.score_D[...]), rtol=0, atol=1e-5)
    later = model(tokens.at[0, 5].set(99)) - model(tokens)
    assert (np.abs(later[0, :5]) < 1e-6).all() and abs(later[0, 6]) > 1e-3  # causal


def test_a_new_head():
    spread = ScoreModel(ModelConfig(dim=4096, layers=1, heads=1, kv_heads=1, hidden=8), jax.random.key(0)).score_D[...].std()
    assert float(spread) == pytest.approx(4097**-0.5, rel=0.03)
    chat = Llama(SHAPE, jax.random.key(7))
    scored = with_score(chat, jax.random.key(8))
    for name in ('table_VD', 'norm_D'):
        assert np.array_equal(getattr(scored, name)[...], getattr(chat, name)[...])
    assert np.array_equal(scored.blocks.w_q_DHK[...], chat.blocks.w_q_DHK[...])
    assert np.array_equal(scored.score_D[...], ScoreModel(SHAPE, jax.random.key(8)).score_D[...])
    assert not hasattr(scored, 'head_DV')


def test_scores_at_indices():
    scores = jnp.array([[1.0, 2.0, jnp.nan], [4.0, 5.0, 6.0]])
    assert scores_at(scores, jnp.array([1, 2])).tolist() == [2.0, 6.0]
    assert scores_at(scores, jnp.array([[[0, 1]], [[2, 0]]])).tolist() == [[[1.0, 2.0]], [[6.0, 4.0]]]


def test_the_head_is_a_vector():
    """It is replicated, and weight decay spares it."""
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        model = jax.eval_shape(lambda: ScoreModel(SHAPE, jax.random.key(0)))
        assert parameter_spec('score_D') == jax.sharding.PartitionSpec(None)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    spared = [parameter_name(path) for path, decayed in jax.tree_util.tree_leaves_with_path(decays(model)) if not decayed]
    assert sorted(spared) == ['attention_norm_D', 'ffn_norm_D', 'norm_D', 'score_D']
    assert count == SHAPE.parameters - SHAPE.vocab_size * SHAPE.dim + SHAPE.dim


def test_a_score_depends_on_its_row_alone(model, tokenizer, rows, expected):
    assert np.ptp(expected) > 0.5
    for batch_size, count in ((1, 1), (8, 4)):
        mesh = make_mesh(MeshConfig(), jax.devices()[:count])
        scores = Scorer(model, tokenizer, mesh=mesh, batch_size=batch_size).score(rows)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    scorer = Scorer(model, tokenizer, mesh=make_mesh(MeshConfig(), jax.devices()[:1]), batch_size=4, shift=0.25)
    np.testing.assert_allclose(scorer.score(rows[::-1]), expected[::-1] + 0.25, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(scorer.score(rows[2:3]), scorer.score(rows)[2:3])
    assert scorer.score([]).shape == (0,)


def test_meshes(model, tokenizer, rows, expected):
    some = np.s_[:4]
    scores = Scorer(model, tokenizer, mesh=make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))).score(rows[some])
    np.testing.assert_allclose(scores, expected[some], rtol=0, atol=1e-5)


def test_rows_that_cannot_be_scored(model, tokenizer):
    with pytest.raises(UserError, match='Row 1 has 81 tokens, and not 1 to 80, the context'):
        Scorer(model, tokenizer).score([[1], [1] * 81])
    with pytest.raises(UserError, match='Row 0 has 0 tokens'):
        Scorer(model, tokenizer).score([[]])


def test_files_and_transformers(model, tokenizer, rows, expected, tmp_path):
    """Written, read with its shift, and scored by `LlamaForSequenceClassification`, padded on either side."""
    scores = {'shift': 0.5, 'mean': -0.5, 'std': 1.0}
    provenance = {'stage': 'reward_model', 'parent': 'sft', 'step': 3, 'scores': scores}
    save_model(tmp_path / 'rm', model, tokenizer, provenance)
    again, _ = load_score_model(tmp_path / 'rm')
    assert np.array_equal(again.score_D[...], model.score_D[...])
    ours = open_scorer(tmp_path / 'rm').score(rows)
    np.testing.assert_allclose(ours, expected + 0.5, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match='rm is a reward model: it gives scores'):
        load_model(tmp_path / 'rm')
    save_model(tmp_path / 'lm', Llama(SHAPE, jax.random.key(0)), tokenizer, {})
    with pytest.raises(UserError, match='lm is a language model: it gives next tokens'):
        open_scorer(tmp_path / 'lm')

    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    convert(open_model(tmp_path / 'rm'), tmp_path / 'hf', 'hf')
    assert np.array_equal(load_score_model(tmp_path / 'hf')[0].score_D[...], model.score_D[...])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'hf').eval()
    for row, score in zip(rows, ours, strict=True):
        if row[-1] == 0:  # its padding: there they look further to the left
            continue
        there = theirs(torch.tensor([row + [0] * 3]), attention_mask=torch.tensor([[1] * len(row) + [0] * 3])).logits
        assert there.item() + 0.5 == pytest.approx(float(score), abs=1e-4)
