"""Log-likelihoods of continuations against transformers, against the forward pass of training, and against themselves alone."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface import random_pair
from letters import Letters

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.inference import likelihood
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.mesh import decoding_mesh
from llama2_jax.model.llama import Llama

CONFIG = ModelConfig(vocab_size=96, dim=32, layers=2, heads=8, kv_heads=2, head_dim=8, hidden=64, context=200)


@cache
def model_of(seed=0):
    return Llama(CONFIG, jax.random.key(seed))


def engine_of(devices=1, model=None, **options):
    mesh = decoding_mesh(CONFIG, jax.devices()[:devices])
    return Engine(model or model_of(), Letters(96), mesh=mesh, **options)


def letters(rng, longest, shortest=1):
    return rng.integers(3, 96, size=rng.integers(shortest, longest + 1)).tolist()


def few_shot(count, seed=0):
    """Questions that begin alike and whose choices are one letter each, as in MMLU; two sets of examples."""
    rng = np.random.default_rng(seed)
    examples = [[1, *letters(rng, 90, 60)] for _ in range(2)]
    contexts = [examples[index % 2] + letters(rng, 40) for index in range(count)]
    return [[(context, [letter]) for letter in (7, 8, 9, 10)] for context in contexts]


def endings(count, seed=0):
    """Questions whose choices are sentences, some of which begin alike, as in HellaSwag."""
    rng = np.random.default_rng(seed)
    questions = []
    for _ in range(count):
        context, start = [1, *letters(rng, 40)], letters(rng, 3)
        questions.append([(context, start + letters(rng, 20)) for _ in range(3)] + [(context, letters(rng, 20))])
    return questions


def blanks(count, seed=0):
    """Choices in the middle, as in WinoGrande: contexts differ, and what follows is the same."""
    rng = np.random.default_rng(seed)
    questions = []
    for _ in range(count):
        start, rest = [1, *letters(rng, 20)], letters(rng, 20)
        questions.append([(start + letters(rng, 3), rest) for _ in range(2)])
    return questions


def sums(engine, questions):
    found = dict(engine.log_likelihoods(questions))
    assert sorted(found) == list(range(len(questions)))
    return [found[index] for index in range(len(questions))]


def difference(ours, theirs):
    return max(np.abs(np.subtract(a, b)).max() for a, b in zip(ours, theirs, strict=True))


def test_the_likelihoods_are_those_of_transformers():
    """500 continuations, of all three kinds; transformers reads each whole."""
    torch = pytest.importorskip('torch')
    ours, theirs = random_pair(CONFIG)
    questions = few_shot(50) + endings(50) + blanks(50)
    choices = [choice for question in questions for choice in question]
    ids = np.zeros((len(choices), max(len(context) + len(tokens) for context, tokens in choices)), np.int64)
    for row, (context, tokens) in zip(ids, choices, strict=True):
        row[: len(context) + len(tokens)] = [*context, *tokens]
    with torch.no_grad():
        logprobs = torch.cat([theirs(part).logits.log_softmax(-1) for part in torch.tensor(ids).split(50)])
    each = iter(
        float(logprobs[row, range(len(context) - 1, len(context) + len(tokens) - 1), tokens].sum())
        for row, (context, tokens) in enumerate(choices)
    )
    expected = [[next(each) for _ in question] for question in questions]
    assert sum(map(len, expected)) == 500
    assert difference(sums(engine_of(model=ours), questions), expected) < 1e-4


def test_neither_batch_nor_mesh_matters(monkeypatch):
    monkeypatch.setattr(likelihood, 'LENGTH', 256)
    questions = few_shot(200) + endings(200) + blanks(200)
    whole = sums(engine_of(batch_size=8), questions)
    best = [np.argmax(choices) for choices in whole]
    for engine in (engine_of(batch_size=1), engine_of(devices=8, batch_size=64)):  # 64 on one device is as 8
        other = sums(engine, questions)
        assert difference(other, whole) < 1e-4
        assert [np.argmax(choices) for choices in other] == best
    assert np.bincount(best).min() > 30


def test_a_question_in_pieces_and_alone(monkeypatch):
    """Rows that are too short for a question grow, targets go in several rounds, and neighbours change nothing."""
    questions = endings(12) + few_shot(1)
    whole = sums(engine_of(), questions)
    monkeypatch.setattr(likelihood, 'LENGTH', 32)
    monkeypatch.setattr(likelihood, 'SIZES', (2, 4))
    assert difference(sums(engine_of(batch_size=2), questions), whole) < 1e-5
    assert difference([sums(engine_of(), [question])[0] for question in questions[:2]], whole[:2]) < 1e-5


def test_examples_are_read_once(monkeypatch):
    """A hundred questions after two sets of examples: what lies in rows is what each question has to itself.

    The cache is as short as the examples, since every question looks at all of it.
    """
    rng, read, engine = np.random.default_rng(0), [], engine_of()
    examples = [[1, *letters(rng, 150, 150)] for _ in range(2)]
    own = [letters(rng, 40) for _ in range(100)]
    original = likelihood._pack_rows

    def counted(batch, held, rows):
        packed, targets = original(batch, held, rows)
        read.append(int((packed.question_BL >= 0).sum()))
        return packed, targets

    monkeypatch.setattr(likelihood, '_pack_rows', counted)
    sums(engine, [[(examples[index % 2] + tokens, [letter]) for letter in (7, 8, 9, 10)] for index, tokens in enumerate(own)])
    assert engine._slots._cache[0][0].shape[2] == 256
    assert sum(map(len, own)) - 100 <= sum(read) <= sum(map(len, own))


def test_the_engine_goes_on_after_generating():
    engine, questions = engine_of(batch_size=4), endings(5)
    before = sums(engine, questions)
    [[sample]] = engine.generate([Request([1, 5, 6], 10, temperature=0)])
    assert difference(sums(engine, questions), before) < 1e-6
    [[again]] = engine.generate([Request([1, 5, 6], 10, temperature=0)])
    assert sample == again
    [[score]] = sums(engine, [[([1, 5, 6], sample.token_ids)]])
    assert score == pytest.approx(sum(sample.logprobs), abs=1e-4)


def test_mistakes():
    with pytest.raises(UserError, match='Question 1: a choice needs a context, BOS at least, and a continuation'):
        next(engine_of().log_likelihoods([[([1], [5])], [([1], [])]]))
    with pytest.raises(UserError, match='Question 0: token id 96 is outside the vocabulary of 96'):
        next(engine_of().log_likelihoods([[([1, 96], [5])]]))
    with pytest.raises(UserError, match='Question 0: the prompt has 200 tokens'):
        next(engine_of().log_likelihoods([[([1] * 200, [5])]]))
    assert jnp.isfinite(sums(engine_of(), [[([1] * 199, [5])]])[0][0])
