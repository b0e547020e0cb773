from collections import Counter
from fractions import Fraction

import pytest

from llama2_jax.config import UserError
from llama2_jax.data.mixing import Component, Interleave, parse_mixture, water_fill


def test_mixture_strings():
    assert parse_mixture('toy:documents') == (Component('toy:documents'),)
    assert parse_mixture(' text:a/*.txt:0.1@2.5 , tfds:wiki/en:1.0.0#train[:10%]:3,jsonl:b@x.jsonl,text:c@4,') == (
        Component('text:a/*.txt', Fraction(1, 10), Fraction(5, 2)),
        Component('tfds:wiki/en:1.0.0#train[:10%]', Fraction(3)),
        Component('jsonl:b@x.jsonl'),
        Component('text:c', epochs=Fraction(4)),
    )
    assert parse_mixture('tfds:wiki:1.0.0')[0].source == 'tfds:wiki:1.0.0'


@pytest.mark.parametrize(
    ('mixture', 'sentence'),
    [
        (' , ', 'The mixture is empty'),
        ('text:a:0', "Mixture entry 'text:a:0': weight and epochs must be positive"),
        ('text:a:-1', "Mixture entry 'text:a:-1': weight and epochs must be positive"),
        ('text:a@0', "Mixture entry 'text:a@0': weight and epochs must be positive"),
        ('text:a,text:a:2', "Mixture names the source 'text:a' twice"),
    ],
)
def test_bad_mixtures(mixture, sentence):
    with pytest.raises(UserError, match=f'^{sentence}'):
        parse_mixture(mixture)


def shares(mixture, counts, rows):
    return water_fill(parse_mixture(mixture), counts, rows)


def test_shares_follow_the_weights_while_no_limit_binds():
    assert shares('text:a:3,text:b,text:c:0.5@2', [10, 10, 500], 1000) == [Fraction(6, 9), Fraction(2, 9), Fraction(1, 9)]


def test_a_binding_limit_gives_its_excess_to_the_others_in_proportion():
    # Of 1000 rows a would give 500 but has 2 * 100; of the other 800 b would give 600 but has 1 * 450; c takes what is left.
    assert shares('text:a:4@2,text:b:3@1,text:c:1', [100, 450, 10], 1000) == [
        Fraction(20, 100),
        Fraction(45, 100),
        Fraction(35, 100),
    ]
    # A limit that binds only because of another one's excess.
    assert shares('text:a:8@1,text:b:1@1,text:c:1', [100, 200, 10], 1000) == [Fraction(1, 10), Fraction(2, 10), Fraction(7, 10)]
    # A fraction of an epoch, and limits that are exactly enough.
    assert shares('text:a@0.5,text:b@1', [100, 50], 100) == [Fraction(1, 2), Fraction(1, 2)]


def test_too_little_within_the_limits_is_said_with_numbers():
    with pytest.raises(UserError, match=r'needs 1000 sequences, .* allow 450 \(text:a 200, text:b 250\)'):
        shares('text:a:4@2,text:b:3@2.5', [100, 100], 1000)


@pytest.mark.parametrize(
    ('parts', 'rows'),
    [([1], 10), ([1, 3], 400), ([1, 9999], 20000), ([333, 1, 666], 3000), ([7, 11, 13, 2], 33 * 40), ([1, 1, 1], 300)],
)
def test_interleave_is_exact_and_even(parts, rows):
    exact = [Fraction(part, sum(parts)) for part in parts]
    order = Interleave(exact, rows)
    seen = Counter()
    for row in range(rows):
        source, index = order[row]
        assert index == seen[source]  # the rows of a source come in order, none twice, none left out
        seen[source] += 1
        for i, share in enumerate(exact):
            assert abs(seen[i] - share * (row + 1)) < len(parts)
    assert [seen[i] for i in range(len(parts))] == [share * rows for share in exact]


def test_no_source_exceeds_its_limit_by_rounding():
    mixture = parse_mixture('text:a:1,text:b:5@1,text:c:2@0.37,text:d:1.7')
    counts, rows = [1000, 211, 301, 5000], 997
    exact = water_fill(mixture, counts, rows)
    assert [share * rows for share in exact[1:3]] == [211, 111]
    seen = Counter(Interleave(exact, rows)[row][0] for row in range(rows))
    assert (seen[1], seen[2], sum(seen.values())) == (211, 111, 997)
    assert abs(seen[0] - exact[0] * rows) < 1


def test_a_limit_is_also_reached_to_the_sequence():
    exact = shares('text:a:8,text:b:7,text:c:99@1', [1, 1, 9], 21)
    assert exact == [Fraction(12 * 8, 21 * 15), Fraction(12 * 7, 21 * 15), Fraction(9, 21)]
    assert Counter(Interleave(exact, 21)[row][0] for row in range(21))[2] == 9


def test_weights_that_grain_would_round():
    exact = shares('text:a:0.3,text:b:0.7001', [1, 1], 10)
    assert exact == [Fraction(3000, 10001), Fraction(7001, 10001)]
    order = Interleave(exact, 10001)
    assert Counter(order[row][0] for row in range(10001)) == {0: 3000, 1: 7001}
    assert order[10**15 * 10001][1] == 10**15 * 3000 or order[10**15 * 10001][1] == 10**15 * 7001  # far in, no drift
