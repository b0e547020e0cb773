"""Published data sets, a few rows of our own in their columns: the dialogs and comparisons that become of them."""

import json

import pytest

from llama2_jax.config import UserError
from llama2_jax.data import comparisons, prompts, schemas, sources
from llama2_jax.data.dialogs import DialogConfig, DialogData, held_out
from llama2_jax.data.preferences import PreferenceConfig, PreferenceData
from llama2_jax.text.template import PromptFormat


class Letters:
    """A tokenizer of code points; like SentencePiece it puts a space before every text."""

    prompts = PromptFormat()

    def encode(self, text, bos, eos):
        return bos * [1] + [ord(letter) for letter in f' {text}'] + eos * [2]


def turns(*contents, system=''):
    found = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(contents)]
    return [{'role': 'system', 'content': system}] * bool(system) + found


@pytest.fixture
def source(tmp_path):
    def source(*rows):
        (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        return f'rows:{tmp_path}/a.jsonl'

    return source


HUMAN = '\n\nHuman: Hi\n\nAssistant: Hey\n\nHuman: What?\n\nAssistant:'
CALLED = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b', 'tool_calls': [{'id': 1}]}]
DIALOGS = {
    'prompt and completion as messages': ([{'prompt': turns('q'), 'completion': turns('', 'a')[1:]}], [turns('q', 'a')]),
    'conversations of roles': ([{'conversations': turns('q', 'a'), 'system': 's'}], [turns('q', 'a', system='s')]),
    'parts of content': (
        [{'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'q'}]}, turns('', 'a')[1]]}],
        [turns('q', 'a')],
    ),
    'Alpaca with history': (
        [{'instruction': 'q', 'input': 'x', 'output': 'a', 'system': 's', 'history': [['h', 'i']]}],
        [turns('h', 'i', 'q\n\nx', 'a', system='s')],
    ),
    'OpenOrca': ([{'id': '1', 'system_prompt': 's', 'question': 'q', 'response': 'a'}], [turns('q', 'a', system='s')]),
    'SlimOrca': (
        [{'conversations': [{'from': role, 'value': text, 'weight': weight} for role, text, weight in
          (('system', 's', None), ('human', 'q', 0.0), ('gpt', 'a', 1.0))]}],
        [turns('q', system='s') + [{'role': 'assistant', 'content': 'a', 'weight': 1.0}]],
    ),
    'Flan': ([{'inputs': 'q', 'targets': 'a', 'task': 't'}], [turns('q', 'a')]),
    'a transcript as prompt': ([{'prompt': HUMAN, 'response': ' a'}], [turns('Hi', 'Hey', 'What?', ' a')]),
    'OASST, flat': (
        [
            {'message_id': str(i), 'parent_id': parent, 'message_tree_id': tree, 'text': text, 'role': role, 'rank': rank}
            for i, parent, tree, text, role, rank in [
                (1, None, 't', 'q', 'prompter', None), (2, '1', 't', 'worse', 'assistant', 1),
                (3, '1', 't', 'best', 'assistant', 0), (4, None, 'u', 'q2', 'prompter', None),
                (5, '4', 'u', 'a2', 'assistant', None),
            ]
        ],
        [turns('q', 'best'), turns('q2', 'a2')],
    ),
    'BeaverTails': (
        [{'prompt': 'q', 'response': 'a', 'is_safe': safe, 'category': {}} for safe in (True, False)],
        [turns('q', 'a'), None],
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', DIALOGS)
def test_dialogs(source, name):
    rows, expected = DIALOGS[name]
    assert [dialog for _, dialog in schemas.read_dialogs(source(*rows))] == expected


@pytest.mark.parametrize(
    ('row', 'named'),
    [
        ({'instruction': 'q', 'input': 3, 'output': 'a'}, "'input' is 3"),
        ({'instruction': 'q', 'input': ['x'], 'output': 'a'}, "'input' is .*x"),
        ({'instruction': 'q', 'history': 'x', 'output': 'a'}, "'history' is not a list"),
        ({'messages': turns('q', 'a'), 'tools': ['search']}, "column 'tools' is not read"),
        ({'messages': CALLED}, "messages.1. has 'tool_calls'"),
        ({'messages': [{'role': 'tool', 'content': '1'}]}, "messages.0. is from 'tool'"),
        (
            {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'url': 'x'}]}]},
            'part of content that is not text',
        ),
    ],
)
def test_dialogs_with_columns_that_are_not_read_are_refused(source, row, named):
    with pytest.raises(UserError, match=f'a.jsonl:1: .*{named}'):
        list(schemas.read_dialogs(source(row)))


def got(found):
    return [
        (c.prompt, c.chosen[-1]['content'], c.rejected[-1]['content'], c.rating, c.safe) for _, (kept, _) in found for c in kept
    ]


NONE = (None, None)
COMPARISONS = {
    'Dahoas/rm-static': (
        [{'prompt': HUMAN, 'response': ' a', 'chosen': ' a', 'rejected': ' b'}],
        [(turns('Hi', 'Hey', 'What?'), ' a', ' b', None, NONE)],
    ),
    'with system': (
        [{'system': 's', 'question': 'q', 'chosen': 'a', 'rejected': 'b'}], [(turns('q', system='s'), 'a', 'b', None, NONE)]
    ),
    'the question inside the answers': (
        [{'prompt': turns(system='s'), 'chosen': turns('q', 'a'), 'rejected': turns('q', 'b')}],
        [(turns('q', system='s'), 'a', 'b', None, NONE)],
    ),
    'responses with scores': (
        [{'prompt': 'q', 'responses': ['bad', 'good', 'middle'], 'scores': [1, 9, 5]}],
        [(turns('q'), *two, None, NONE) for two in (('good', 'middle'), ('good', 'bad'), ('middle', 'bad'))],
    ),
    'responses with rank': (
        [{'prompt': 'q', 'responses': ['bad', 'good'], 'rank': [2, 1]}], [(turns('q'), 'good', 'bad', None, NONE)]
    ),
    'UltraFeedback, binarized': (
        [{'prompt': 'q', 'prompt_id': 'x', 'chosen': turns('q', 'a'), 'rejected': turns('q', 'b'), 'messages': turns('q', 'a'),
          'score_chosen': 8.5, 'score_rejected': 4.0}],
        [(turns('q'), 'a', 'b', None, NONE)],
    ),
    'UltraFeedback': (
        [{'source': 's', 'instruction': 'q', 'models': ['m', 'n'], 'completions': [
            {'model': 'm', 'response': 'b', 'overall_score': 4.0}, {'model': 'n', 'response': 'a', 'overall_score': 7.5}]}],
        [(turns('q'), 'a', 'b', None, NONE)],
    ),
    'HelpSteer2': (
        [{'prompt': 'q', 'response': text, 'helpfulness': score, 'verbosity': 2} for text, score in (('b', 1), ('a', 4))]
        + [{'prompt': 'r', 'response': 'x', 'helpfulness': 3, 'verbosity': 2}],
        [(turns('q'), 'a', 'b', None, NONE)],
    ),
    'HelpSteer2, preferences': (
        [{'prompt': 'q', 'response_1': 'a', 'response_2': 'b', 'preference_strength': strength} for strength in (-3, 1, 0)],
        [(turns('q'), 'a', 'b', 'significantly', NONE), (turns('q'), 'b', 'a', 'slightly', NONE)],
    ),
    'Nectar': (
        [{'prompt': '\n\nHuman: q\n\nAssistant: ', 'answers': [{'answer': text, 'model': 'm', 'rank': rank}
          for text, rank in (('c', 3.0), ('a', 1.0), ('b', 2.0))], 'turns': 1}],
        [(turns('q'), *two, None, NONE) for two in ('ab', 'ac', 'bc')],
    ),
    'PKU-SafeRLHF': (
        [{'prompt': 'q', 'response_0': 'x', 'response_1': 'y', 'is_response_0_safe': False, 'is_response_1_safe': True,
          'better_response_id': 0, 'safer_response_id': 1}],
        [(turns('q'), 'y', 'x', None, (True, False))],
    ),
    'BeaverTails': (
        [{'prompt': 'q', 'response': text, 'is_safe': safe, 'category': {}} for text, safe in (('x', False), ('y', True))],
        [(turns('q'), 'y', 'x', None, (True, False))],
    ),
    'SHP': (
        [{'history': 'q', 'human_ref_A': 'x', 'human_ref_B': 'y', 'labels': label, 'score_A': 1} for label in (0, 1)],
        [(turns('q'), 'y', 'x', None, NONE), (turns('q'), 'x', 'y', None, NONE)],
    ),
    'webgpt_comparisons': (
        [{'question': {'full_text': 'q', 'id': '1'}, 'answer_0': 'x', 'answer_1': 'y', 'score_0': a, 'score_1': -a,
          'quotes_0': {}, 'quotes_1': {}} for a in (-1.0, 0.0)],
        [(turns('q'), 'y', 'x', None, NONE)],
    ),
    'summarize_from_feedback': (
        [{'info': {'id': '1', 'post': 'p', 'title': 't', 'subreddit': 'r', 'article': None},
          'summaries': [{'text': 'x', 'policy': 'm'}, {'text': 'y', 'policy': 'n'}], 'choice': 1, 'worker': 'w'}],
        [(turns('SUBREDDIT: r\n\nTITLE: t\n\nPOST: p\n\nTL;DR:'), 'y', 'x', None, NONE)],
    ),
    'StackExchange preferences': (
        [{'qid': 1, 'question': 'q', 'answers': [{'text': 'x', 'pm_score': 1}, {'text': 'y', 'pm_score': 4}]}],
        [(turns('q'), 'y', 'x', None, NONE)],
    ),
    'StackExchange, paired': (
        [{'qid': 1, 'question': 'q', 'response_j': 'a', 'response_k': 'b'}], [(turns('q'), 'a', 'b', None, NONE)]),
    'hh-rlhf that ends with Human': (
        [{'chosen': '\n\nHuman: q\n\nAssistant: a\n\nHuman: thanks', 'rejected': '\n\nHuman: q\n\nAssistant: b'}],
        [(turns('q'), 'a', 'b', None, NONE)],
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', COMPARISONS)
def test_comparisons(source, name):
    rows, expected = COMPARISONS[name]
    assert got(comparisons.read_comparisons(source(*rows))) == expected


@pytest.mark.parametrize(
    ('row', 'named'),
    [
        ({'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'margin': 2.0}, "column 'margin'"),
        ({'prompt': 'q', 'responses': ['a', 'b'], 'preferences': [1, 2]}, "column 'preferences'"),
        ({'prompt': 'q', 'responses': ['a', 'b'], 'scores': [1, 2], 'rank': [1, 2]}, 'rank and scores'),
        ({'prompt': turns(system='s'), 'chosen': 'a', 'rejected': 'b'}, 'no message of the user'),
        ({'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'score_chosen': 1, 'score_rejected': 2}, 'higher score'),
    ],
)
def test_comparisons_that_are_refused(source, row, named):
    with pytest.raises(UserError, match=f'a.jsonl:1: .*{named}'):
        list(comparisons.read_comparisons(source(row)))


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ({'prompt': 'q'}, turns('q')),
        ({'prompt': HUMAN}, turns('Hi', 'Hey', 'What?')),
        ({'messages': turns('q', 'a', 'r', 'b')}, turns('q', 'a', 'r')),
        ({'instruction': 'q', 'output': 'a'}, turns('q')),
        ({'prompt': HUMAN, 'chosen': 'a', 'rejected': 'b'}, turns('Hi', 'Hey', 'What?')),
        ({'chosen': f'{HUMAN} a', 'rejected': f'{HUMAN} b'}, turns('Hi', 'Hey', 'What?')),
    ],
)
def test_rows_of_dialogs_and_comparisons_are_prompts(source, row, expected):
    [record] = sources.read_records(source(row))
    assert prompts.read_prompt(record, Letters()).messages == expected


def test_pairs_that_are_equal_as_tokens_are_dropped_and_counted(source):
    rows = [{'prompt': f'q{i}', 'chosen': 'fine', 'rejected': 'fine ' if i < 3 else 'bad'} for i in range(10)]
    data = PreferenceData(PreferenceConfig(source(*rows), heldout=0.0), Letters(), length=99, context=99, batch_size=4, seed=0)
    assert data.sources[0].tally.dropped == {'equal as tokens': 3} and len(data.sources[0].records) == 7
    assert '3 equal as tokens' in data.table()


def test_skipped_rows_are_counted_and_shown(source):
    good = [{'messages': turns(f'q{i}', 'a')} for i in range(5)]
    name = source(*good, {'messages': 3}, {'what': 1})
    data = DialogData(DialogConfig(f'{name} skip=2', heldout=0.0), Letters(), length=99, batch_size=2, seed=0)
    assert data.sources[0].dialogs == 5 and '2 bad rows' in data.table()
    assert 'a.jsonl:6' in data.table() and 'a.jsonl:7' in data.table()
    with pytest.raises(UserError, match='a.jsonl:7'):
        DialogData(DialogConfig(f'{name} skip=1', heldout=0.0), Letters(), length=99, batch_size=2, seed=0)
    pairs = [{'prompt': f'q{i}', 'chosen': 'a', 'rejected': 'b'} for i in range(5)]
    config = PreferenceConfig(f'{source(*pairs, {"x": 1})} skip=1', heldout=0.0)
    assert 'a.jsonl:6' in PreferenceData(config, Letters(), length=99, context=99, batch_size=4, seed=0).table()


def test_bytes_of_answers_with_weight_0_do_not_count(source):
    read = turns('q', 'read, not learned', 'r', 'ab')
    read[1]['weight'] = 0
    name = next(f'q{i}' for i in range(99) if held_out(turns(f'q{i}'), 0.5))
    rows = [{'messages': [turns(name)[0], *read[1:]]}] + [{'messages': turns(f'x{i}', 'abc')} for i in range(50)]
    data = DialogData(DialogConfig(source(*rows), heldout=0.5), Letters(), length=99, batch_size=2, seed=0)
    assert data.sources[0].heldout_bytes == 2 + 3 * sum(held_out(row['messages'], 0.5) for row in rows[1:])


def test_half_a_surrogate_pair_names_file_and_row(source):
    whole, half = {'prompt': 'x \U0001f600'}, {'messages': [{'role': 'user', 'content': 'x \ud83d'}]}
    with pytest.raises(UserError, match=r':2 holds a lone surrogate \(U\+D83D\)'):
        [record.fields for record in sources.read_records(source(whole, half))]
    assert [record.fields for record in sources.read_records(source(whole))] == [whole]


def test_rows_that_cannot_be_joined_are_bad_rows(tmp_path):
    """Single answers to one prompt (HelpSteer2): a score that is no number spoils its prompt's rows, not the run."""
    rows = [{'prompt': f'Q{i // 2}', 'response': f'answer {i}', 'helpfulness': i % 2 * 4} for i in range(12)]
    rows[4]['helpfulness'] = 'high'
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    settings = {'length': 200, 'context': 100, 'batch_size': 2, 'seed': 0, 'shards': 1}
    with pytest.raises(UserError, match=r"a\.jsonl:5: 'helpfulness'"):
        PreferenceData(PreferenceConfig(f'rows:{tmp_path}/a.jsonl', heldout=0.0), Letters(), **settings)
    data = PreferenceData(PreferenceConfig(f'rows:{tmp_path}/a.jsonl skip=1', heldout=0.0), Letters(), **settings)
    assert len(data.sources[0].records) == 5 and 'a.jsonl:5' in data.table()
