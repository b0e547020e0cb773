"""Contaminated tokens against the definition by brute force; Z by hand; a corpus with planted questions end to end."""

import dataclasses
import json
import math

import numpy as np
import pytest
import random_policy

from llama2_jax.config import UserError
from llama2_jax.evals.contamination import PREFIX, SKIPS, Spans, affected, as_rows, subsets, verbalise
from llama2_jax.evals.task import Example
from llama2_jax.stages import contamination
from llama2_jax.stages.evaluate import EvaluateConfig


def by_definition(sample, document):
    """Tries every start in both and every end."""
    longest = np.zeros(len(sample), int)
    for i in range(len(sample) - PREFIX + 1):
        for j in range(len(document) - PREFIX + 1):
            for length in range(PREFIX, min(len(sample) - i, len(document) - j) + 1):
                same = sample[i : i + length] == document[j : j + length]
                if same[:PREFIX].all() and same[-1] and (~same).sum() <= SKIPS:
                    longest[i : i + length] = np.maximum(longest[i : i + length], length)
    return longest


@pytest.mark.parametrize('seed', range(6))
def test_spans_are_those_of_the_definition(seed):
    """A small vocabulary and noisy copies make spans with gaps, at both ends and overlapping."""
    rng = np.random.default_rng(seed)
    sample = rng.integers(0, 50, 40)
    document = rng.integers(0, 50, 60)
    document[7:47] = sample
    noisy = rng.integers(0, 60, rng.integers(1, 8))
    document[noisy] = rng.integers(0, 50, len(noisy))
    spans = Spans([sample, rng.integers(0, 50, 30)])
    spans.add(document)
    assert spans.longest[0].tolist() == by_definition(sample, document).tolist()
    assert not spans.longest[1].any()
    assert spans.shares(10)[0] == (spans.longest[0] > 10).mean() and spans.shares(30)[0] == (spans.longest[0] >= 30).mean()


def test_differences_by_hand():
    """Ten equal tokens are too few; a fifth difference ends a span at the match before it; trailing ones do not count."""
    sample = np.arange(30)
    for changed, length in (([10], 30), ([10, 12, 14, 16], 30), ([10, 12, 14, 16, 18], 18), ([28, 29], 28), ([9], 20)):
        document = sample.copy()
        document[changed] = 99
        spans = Spans([sample])
        spans.add(document)
        assert spans.longest[0].max() == length, changed
    spans = Spans([sample])
    spans.add(sample[:10])
    assert spans.longest[0].max() == 10 and spans.shares(10)[0] == 0
    spans.add(sample[20:25])  # shorter than a prefix
    assert spans.longest[0].max() == 10


def test_z_by_hand():
    """Of ten samples eight are clean with half of them right, two dirty and right: mean .6, deviation sqrt(.24)."""
    shares, scores = [0.0] * 8 + [0.9] * 2, [1.0, 0.0] * 4 + [1.0] * 2
    clean, not_clean, not_dirty, dirty = found = subsets(shares, scores)
    assert clean.z == pytest.approx((0.5 - 0.6) / math.sqrt(0.24) * math.sqrt(8)) == not_dirty.z
    assert dirty.z == not_clean.z == pytest.approx((1 - 0.6) / math.sqrt(0.24) * math.sqrt(2))
    assert not affected(found)
    assert affected(subsets([0.0] * 800 + [0.9] * 200, [1.0, 0.0] * 400 + [1.0] * 200))
    assert subsets([0.0, 0.0], [1.0, 1.0])[0].z is None  # all alike


def test_scores_belong_to_samples():
    with pytest.raises(UserError, match='gsm8k has 2 scores for 1 samples'):
        as_rows('gsm8k', Spans([[1, 2]]), [1.0, 0.0])


def test_a_sample_is_verbalised_with_choices_and_answer():
    assert verbalise(Example(0, choices=(('Q: 1?', ' a'), ('Q: 1?', ' b')))) == 'Q: 1?\n a\n b'
    assert verbalise(Example(['four', '4'], 'How many?')) == 'How many? four'
    assert verbalise(Example('x', [{'role': 'user', 'content': 'Hi'}])) == 'Hi x'


def test_planted_questions_are_found(tmp_path, fixtures, one_device, monkeypatch):
    """Two of twelve questions of TruthfulQA are in the corpus."""
    rows = [{'messages': [{'role': 'user', 'content': f'What is {i} and {i}?'}], 'is_safety': False} for i in range(40)]
    monkeypatch.setattr(random_policy, 'SHAPE', dataclasses.replace(random_policy.SHAPE, context=512))
    home = random_policy.make_home(tmp_path, rows)
    config = EvaluateConfig(
        model=str(home / 'policy'), tasks=('truthfulqa_mc',), data_dir=str(fixtures), output=str(tmp_path / 'out'), limit=12
    )
    asked = [verbalise(example) for example in contamination.read_examples('truthfulqa_mc', config)]
    corpus = ['Nothing of it is here.', f'Before. {asked[3]} After.', asked[7], 'The end.']
    (tmp_path / 'corpus.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in corpus))
    rows = contamination.run(config, f'jsonl:{tmp_path}/corpus.jsonl')
    counts = {row['name']: row['count'] for row in rows if row['L'] == 50}
    assert counts == {'clean': 10, 'not clean': 2, 'not dirty': 10, 'dirty': 2}
    assert '| truthfulqa_mc |' in (tmp_path / 'out/contamination.md').read_text()
    assert contamination.run(config, f'jsonl:{tmp_path}/corpus.jsonl') == rows  # read from the files
    (tmp_path / 'corpus.jsonl').write_text('{"text": "another"}')
    with pytest.raises(UserError, match=r'spans\.json.*corpus'):
        contamination.run(config, f'jsonl:{tmp_path}/corpus.jsonl')
