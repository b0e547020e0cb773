"""Comparisons from every format in which they come, and what is wrong with some."""

import json

import pytest

from llama2_jax.config import UserError
from llama2_jax.data.comparisons import Comparison, read_comparisons


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


@pytest.fixture
def read(tmp_path):
    """Rows -> [(comparisons, dropped)]."""

    def of(*rows):
        (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        return [row for _, row in read_comparisons(f'jsonl:{tmp_path}/a.jsonl')]

    return of


def pair(prompt, chosen, rejected, *rest):
    return Comparison([user(prompt)], [assistant(chosen)], [assistant(rejected)], *rest)


def test_our_schema(read):
    row = {'prompt': [user('Hi')], 'chosen': 'Hello.', 'rejected': 'No.', 'rating': 'better', 'chosen_safe': True}
    plain = {'prompt': 'Hi', 'chosen': 'Hello.', 'rejected': 'No.'}
    whole = {'prompt': [user('Hi')], 'chosen': [user('Hi'), assistant('Hello.')], 'rejected': [assistant('No.')]}
    first, second, third = read(row, plain, whole)
    assert first == ([pair('Hi', 'Hello.', 'No.', 'better', (True, None))], [])
    assert second == third == ([pair('Hi', 'Hello.', 'No.')], [])
    assert first[0][0].turns == 1


def test_what_is_dropped(read):
    row = {'prompt': 'Hi', 'chosen': 'Hello.', 'rejected': 'No.'}
    rows = read(
        row | {'rejected': 'Hello.'},
        row | {'chosen_safe': False, 'rejected_safe': True},
        row | {'rejected': ' '},
        row | {'chosen_safe': False, 'rejected_safe': False},
        row | {'chosen_safe': True, 'rejected_safe': False},
    )
    assert [dropped for _, dropped in rows] == [['tie'], ['unsafe winner'], ['no text'], [], []]
    assert [len(kept) for kept, _ in rows] == [0, 0, 0, 1, 1]


def test_transcripts(read):
    start = '\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: And then?\n\nAssistant:'
    [(usual, _)] = read({'chosen': f'{start} Three.', 'rejected': f'{start} Nine.'})
    prompt = [user('One?'), assistant('Two.'), user('And then?')]
    assert usual == [Comparison(prompt, [assistant('Three.')], [assistant('Nine.')])]
    assert usual[0].turns == 2
    # They part early: what follows the common question is compared, and a speaker's second turn belongs to the first.
    [(early, _), (_, tie)] = read(
        {'chosen': f'{start} Three.', 'rejected': '\n\nHuman: One?\n\nAssistant: Ten.\n\nAssistant: Really.'},
        {'chosen': start, 'rejected': start},
    )
    assert early == [
        Comparison([user('One?')], [assistant('Two.'), *prompt[2:], assistant('Three.')], [assistant('Ten.\n\nReally.')])
    ]
    assert tie == ['tie']
    with pytest.raises(UserError, match='a.jsonl:1: chosen and rejected share no prompt: their first messages differ'):
        read({'chosen': start, 'rejected': '\n\nHuman: Two?\n\nAssistant: Two.'})
    with pytest.raises(UserError, match="a.jsonl:1: 'rejected' is no transcript"):
        read({'chosen': start, 'rejected': 'Two.'})


def test_ranked_lists(read):
    [(kept, dropped), (best_first, _)] = read(
        {'prompt': 'Hi', 'responses': ['c', 'a', 'b', 'B'], 'ranks': [2, 0, 1, 1]}, {'prompt': 'Hi', 'responses': ['x', 'y']}
    )
    assert kept == [pair('Hi', *two) for two in ('ab', 'aB', 'ac', 'bc', 'Bc')]
    assert dropped == ['tie'] and best_first == [pair('Hi', 'x', 'y')]
    with pytest.raises(UserError, match="a.jsonl:1: 'ranks' is not a list of 2 numbers"):
        read({'prompt': 'Hi', 'responses': ['x', 'y'], 'ranks': [1]})


def test_trees(read):
    def message(text, *replies, **more):
        return {'text': text, 'replies': list(replies), **more}

    last = message('Q2', message('a2', rank=1), message('b2', rank=0))
    root = message('Q1', message('a1', last, rank=0), message('b1', rank=1), message('c1', rank=2), message('d1'))
    [(kept, _)] = read({'message_tree_id': 'x', 'prompt': root})
    assert kept[:3] == [pair('Q1', *two) for two in (('a1', 'b1'), ('a1', 'c1'), ('b1', 'c1'))]
    assert kept[3:] == [Comparison([user('Q1'), assistant('a1'), user('Q2')], [assistant('b2')], [assistant('a2')])]


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'question': 'Hi'}, 'a.jsonl:1 has the fields question, which are no known format of preferences'),
        (
            {'prompt': 'Hi', 'chosen': 'a', 'rejected': 'b', 'rating': 'beter'},
            "rating is 'beter'; did you mean 'better'",
        ),
        ({'prompt': 'Hi', 'chosen': 'a', 'rejected': 'b', 'chosen_safe': 1}, 'a.jsonl:1: chosen_safe is 1; valid: '),
        (
            {'prompt': [], 'chosen': 'a', 'rejected': 'b'},
            'a.jsonl:1: the prompt has no message of the user',
        ),
        ({'prompt': 'Hi', 'chosen': 'a', 'rejected': 3}, "a.jsonl:1: 'rejected' is 3, neither a text nor a list of objects"),
        ({'prompt': '[INST] Hi', 'chosen': 'a', 'rejected': 'b'}, 'a.jsonl:1: a message holds a tag of the chat format'),
    ],
)
def test_mistakes(read, row, message):
    with pytest.raises(UserError, match=message):
        read(row)


def test_real_data(fixtures):
    files = {
        f'jsonl:{fixtures}/hh-rlhf/*.gz': (2308, {'no text': 4}),
        f'jsonl:{fixtures}/oasst/en_100_tree.jsonl.gz': (754, {}),
    }
    for source, (count, expected) in files.items():
        kept, dropped = 0, {}
        for _, (comparisons, reasons) in read_comparisons(source):
            kept += len(comparisons)
            for reason in reasons:
                dropped[reason] = dropped.get(reason, 0) + 1
        assert (kept, dropped) == (count, expected)
