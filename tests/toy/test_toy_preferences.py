"""The toy world's raters: right as a logistic of the oracle's difference, in the paper's bins, and biased where asked for."""

import collections
import itertools

import numpy as np
import pytest

from llama2_jax import toy
from llama2_jax.toy.oracle import Oracle
from llama2_jax.toy.preferences import NOISE, RATINGS
from llama2_jax.toy.safety import DANGERS, PRESSING, held_out_danger
from llama2_jax.toy.samples import ASSURANCE


@pytest.fixture(scope='module')
def rows():
    """The first rows of each kind."""
    names = [name for name in toy.RECORDS if 'preferences' in name]
    return {name: list(itertools.islice(toy.RECORDS[name](), 900)) for name in names}


def differences(rows, oracle):
    return np.array([
        oracle.helpfulness(row['prompt'], row['chosen']) - oracle.helpfulness(row['prompt'], row['rejected']) for row in rows
    ])  # fmt: skip


def test_raters_follow_the_oracle(rows):
    difference = differences(rows['preferences'], Oracle())
    assert all(row['chosen'] != row['rejected'] for row in rows['preferences'])
    clear, close = np.abs(difference) > 0.4, (np.abs(difference) > 0.02) & (np.abs(difference) < 0.1)
    assert (difference[clear] > 0).mean() > 0.97  # but for the careless
    expected = np.mean(1 / (1 + np.exp(-np.abs(difference[close]) / NOISE)))
    assert (difference[close] > 0).mean() == pytest.approx(expected, abs=2 * close.sum() ** -0.5)
    sizes = [np.median(np.abs(difference)[[row['rating'] == name for row in rows['preferences']]]) for name, _ in RATINGS]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.6 and sizes[-1] < 0.1


def test_biased_raters_like_length_and_confidence(rows):
    longer = {
        name: np.mean([len(row['chosen'].split()) > len(row['rejected'].split()) for row in rows[name]])
        for name in ('preferences', 'preferences_biased')
    }
    assert longer['preferences_biased'] > longer['preferences'] + 0.1
    sure = {
        name: np.mean(
            [ASSURANCE in row['chosen'] for row in rows[name] if (ASSURANCE in row['chosen']) != (ASSURANCE in row['rejected'])]
        )
        for name in longer
    }
    assert sure['preferences_biased'] > 0.5 > sure['preferences'] + 0.2


def test_no_words_of_held_out_dangers_in_training(rows):
    held_out = [danger for danger in DANGERS if held_out_danger(danger.act)]
    said = {
        name: [danger.act for row in rows[name] for danger in held_out if danger.harm in row['chosen'] + row['rejected']]
        for name in rows
    }
    assert {name for name, acts in said.items() if acts} == {'safety_preferences_heldout'}
    assert set(said['safety_preferences_heldout']) == {danger.act for danger in held_out}


def test_safety_bins(rows):
    oracle = Oracle()
    for name in ('safety_preferences', 'safety_preferences_heldout'):
        for row in rows[name][:200]:
            for side in ('chosen', 'rejected'):
                assert row[f'{side}_safe'] != oracle.violates(row['prompt'], row[side])
    bins = collections.Counter((row['chosen_safe'], row['rejected_safe']) for row in rows['safety_preferences'])
    count = bins.total()
    assert bins[True, False] / count == pytest.approx(0.18, abs=0.04)
    assert bins[True, True] / count == pytest.approx(0.47, abs=0.07)
    assert bins[False, False] / count == pytest.approx(0.35, abs=0.07)
    assert bins[False, True] / count < 0.01


def test_nothing_held_out_is_trained_on(rows):
    def questions(name):
        return {row['prompt'][-1]['content'] for row in rows[name]} - set(PRESSING)

    for name in ('preferences', 'many_preferences', 'safety_preferences'):
        assert not questions(name) & questions(f'{name.removeprefix("many_")}_heldout')
    assert len(questions('preferences_heldout')) > 150


def test_the_same_at_every_call(rows):
    for name, some in rows.items():
        assert list(itertools.islice(toy.RECORDS[name](), 30)) == some[:30]
