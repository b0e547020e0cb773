from collections import Counter
from fractions import Fraction

import pytest

from llama2_jax.config import UserError
from llama2_jax.data.mixing import Component, Interleave, amounts, as_shares, parse_mixture, water_fill


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
        ('text:a:0', "Mixture entry 'text:a:0': amount and epochs must be positive"),
        ('text:a:-1', "Mixture entry 'text:a:-1': amount and epochs must be positive"),
        ('text:a@0', "Mixture entry 'text:a@0': amount and epochs must be positive"),
        ('text:a,text:a:2', "Mixture names the source 'text:a' twice"),
    ],
)
def test_bad_mixtures(mixture, sentence):
    with pytest.raises(UserError, match=f'^{sentence}'):
        parse_mixture(mixture)


def shares(mixture, counts, rows):
    return water_fill(as_shares(parse_mixture(mixture), counts), counts, rows)


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
    mixture = as_shares(parse_mixture('text:a:1,text:b:5@1,text:c:2@0.37,text:d:1.7'), [1] * 4)
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


def taken(mixture, counts, epochs=1):
    return [float(amount) for amount in amounts(parse_mixture(mixture), counts, None if epochs is None else Fraction(epochs))]


@pytest.mark.parametrize('mixture', ['a:1, b:1', 'a:2, b:2', 'a:0.5, b:0.5'])
def test_only_the_ratio_of_shares_counts(mixture):
    assert taken(mixture, [1000, 200]) == [200, 200]
    assert taken(mixture, [1000, 200], epochs=2) == [400, 400]
    assert taken(mixture, [1000, 200], epochs=None) == [0.5, 0.5]


@pytest.mark.parametrize(
    ('mixture', 'counts', 'expected'),
    [
        ('a, b', [1000, 200], [1000, 200]),
        ('a:1x, b:3x', [1000, 200], [1000, 600]),
        ('a:0.05x', [1000], [50]),
        ('a:3x@2, b', [1000, 200], [2000, 200]),
        ('a, b:0.5', [1000, 5000], [1000, 1000]),  # all of a, and as much of b
        ('a, b:0.5', [1000, 200], [1000, 200]),  # b has no more
        ('a, b:0.5@5', [1000, 200], [1000, 1000]),  # unless it may come more often
        ('a, b:0.25, c:0.25', [1000, 100, 5000], [1000, 100, 1100 / 3]),
        ('a + b:0.9, c + d:0.1', [600, 300, 4000, 1000], [600, 300, 80, 20]),
        ('a + b, c:0.1', [600, 300, 4000], [600, 300, 100]),
    ],
)
def test_what_an_amount_takes(mixture, counts, expected):
    assert taken(mixture, counts) == pytest.approx(expected)


def test_the_papers_mixtures_of_comparisons():
    """P12: all helpfulness data with as much of the rest; 90 % safety with 10 % from both helpfulness sources."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))
    import reward_model

    assert taken(reward_model.HELPFULNESS, [1000, 300, 100, 1600]) == pytest.approx([1000, 150, 50, 800])
    assert taken(reward_model.SAFETY, [600, 300, 1500, 500]) == pytest.approx([600, 300, 75, 25])


def test_shares_beside_whole_sources_leave_room_for_these():
    with pytest.raises(UserError, match='less than 1, not 2.*2x'):
        taken('a, b:2', [1, 1])


def test_entries_of_several_sources_and_skips():
    a, b, c = parse_mixture('jsonl:a/*.jsonl skip=3 + text:c+d:0.5@2 skip=10, rows:e skip=1')
    assert (a.source, a.weight, a.epochs, a.skip) == ('jsonl:a/*.jsonl', Fraction(1, 2), 2, 3)
    assert (b.source, b.weight, b.epochs, b.skip, b.entry) == ('text:c+d', Fraction(1, 2), 2, 10, a.entry)
    assert (c.source, c.weight, c.skip, c.entry) == ('rows:e', None, 1, ())


def test_pretraining_takes_shares_alone():
    assert [c.weight for c in as_shares(parse_mixture('a + b:3, c'), [10, 20, 5])] == [1, 2, 1]
    with pytest.raises(UserError, match='^b: in pretraining'):
        as_shares(parse_mixture('a, b:2x'), [1, 1])
    with pytest.raises(UserError, match='^b: .*skip=3'):
        as_shares(parse_mixture('a, b skip=3'), [1, 1])
