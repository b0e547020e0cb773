"""The toy world's attacks: how many there are, that training has none of the held-out ones, and that a perfect model passes."""

import collections
import json

import pytest

from llama2_jax import toy
from llama2_jax.evals.measure import by_group, share_text, wilson
from llama2_jax.evals.tasks import GROUPS, TASKS
from llama2_jax.toy import attacks, safety
from llama2_jax.toy.attacks import STYLES
from llama2_jax.toy.oracle import Oracle, Request

ORACLE = Oracle()


@pytest.fixture(scope='module')
def rows():
    names = ('attacks', 'attacks_heldout', 'borderline_heldout', 'refusals', 'borderline', 'harmless')
    return {name: list(toy.RECORDS[name]()) for name in names}


def users(row):
    return tuple(message['content'] for message in row['messages'] if message['role'] == 'user')


def test_numbers(rows):
    attacked = rows['attacks_heldout']
    assert len(attacked) == 315 and len(rows['borderline_heldout']) == 210
    assert len({json.dumps(row['messages']) for row in attacked}) == 315
    cells = collections.Counter((row['category'], row['style']) for row in attacked)
    assert set(cells) == {(category, style) for category in safety.CATEGORIES for style in STYLES} and min(cells.values()) == 15
    assert {row['turns'] for row in attacked} == {1, 2, 3} and {row['language'] for row in attacked} == {'en', 'de', 'es', 'fr'}


def test_training_has_nothing_that_is_held_out(rows):
    held_out = [*rows['attacks_heldout'], *rows['borderline_heldout']]
    dialogs = {users(row) for row in held_out}
    texts = {text for row in held_out for text in users(row)}
    names = ('dialogs', 'refusals', 'borderline', 'naive', 'cautious', 'prompts', 'safety_prompts', 'attacks', 'talks')
    trained = [row['messages'] for name in names for row in toy.RECORDS[name]()]
    trained += [row['prompt'] for name in ('preferences', 'safety_preferences') for row in toy.RECORDS[name]()]
    for messages in trained:
        asked = users({'messages': messages})
        assert asked not in dialogs and not texts & set(asked), asked
    acts = {row['act'] for row in rows['attacks']}
    assert not [act for act in acts if safety.held_out_danger(act)]
    assert attacks.HELD_OUT_STYLE not in {row['style'] for row in rows['attacks']}


def test_safety_and_borderline_data_are_two_sources(rows):
    kinds = {
        name: {ORACLE.understand(row['messages'][:-1]).request.kind for row in rows[name]} for name in ('refusals', 'borderline')
    }
    assert kinds == {'refusals': {'unsafe'}, 'borderline': {'borderline'}}
    assert rows['harmless'][-len(rows['borderline']) :] == rows['borderline']


def test_every_attack_is_understood(rows):
    for row in [*rows['attacks'], *rows['attacks_heldout']]:
        asked = ORACLE.understand(row['messages'])
        assert asked.request == Request('unsafe', row['act'])
        answer = ORACLE.perfect(asked)
        assert ORACLE.safety(row['messages'], answer) == ORACLE.helpfulness(row['messages'], answer) == 1
    for row in rows['borderline_heldout']:
        asked = ORACLE.understand(row['messages'])
        assert asked.request == Request('borderline', row['question'])
        answer = ORACLE.perfect(asked)
        assert ORACLE.helpfulness(row['messages'], answer) == 1 and not ORACLE.refuses(answer)
        assert not ORACLE.violates(row['messages'], answer)
    for row in [*rows['refusals'], *rows['borderline']]:
        assert ORACLE.helpfulness(row['messages'][:-1], row['messages'][-1]['content']) == 1


def test_the_task_splits_by_category_style_and_turns():
    task = TASKS['toy_attacks']
    assert {'toy_attacks', 'toy_borderline'} <= set(GROUPS['safety']) and 'toy_attacks' not in GROUPS['paper']
    records = []
    for example in task.read(None, 0):
        danger = safety.danger(Request('unsafe', example.data['act']))
        said = danger.harm if example.data['style'] == 'semantic' else f'{safety.DECLINES[0]} {danger.reason} {danger.safe}'
        records.append({'group': list(example.group)} | task.grade(example, [{'text': said, 'stop_reason': 'eos'}], {}))
    groups = by_group(records)
    assert {name for name, means in groups.items() if means['violations'] == 1} == {'style: semantic'}
    assert groups['category: hateful']['violations'] == pytest.approx(1 / 7)
    assert groups['turns: 3']['violations'] == 0
    assert len([name for name in groups if name.startswith('style: ')]) == 7


def test_no_hits_are_an_upper_bound():
    assert wilson(0, 315)[1] == pytest.approx(1.959964**2 / (315 + 1.959964**2))  # by hand: z² / (n + z²)
    assert share_text(0, 36) == '0.0 % (< 9.6, n = 36)' and share_text(36, 36).startswith('100.0 % (90.4–100.0')
