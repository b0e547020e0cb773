"""Batches of comparisons: each pair once, a prompt's together, held out by question, the same on any number of hosts."""

import collections
import json
import random

import numpy as np
import pytest
from batches import equal

from llama2_jax.config import UserError
from llama2_jax.data.preferences import PreferenceConfig, PreferenceData
from llama2_jax.text.dialog import encode_dialog

LENGTH, CONTEXT, BATCH = 120, 60, 12


class Letters:
    """A tokenizer of code points; like SentencePiece it puts a space before every text."""

    def encode(self, text, bos, eos):
        return bos * [1] + [ord(letter) for letter in f' {text}'] + eos * [2]


def row(question, chosen, rejected, **more):
    return {'prompt': [{'role': 'user', 'content': question}], 'chosen': chosen, 'rejected': rejected, **more}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """a: single pairs, rated; b: ranked lists of three; c: three rows of each prompt."""
    path, rng = tmp_path_factory.mktemp('world'), random.Random(0)
    words = ['x' * rng.randint(1, 9) for _ in range(200)]
    a = [row(f'a{i}', f'good {words[i]}', f'bad {words[-i]}', rating='better', chosen_safe=True) for i in range(150)]
    b = [{'prompt': f'b{i}', 'responses': [f'{rank} {words[i]}' for rank in range(3)]} for i in range(20)]
    c = [row(f'c{i}', f'{x} {words[i]}', f'{y} {words[i]}') for i in range(20) for x, y in ('12', '13', '23')]
    for name, rows in (('a', a), ('b', b), ('c', c)):
        (path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return path


@pytest.fixture
def make(world):
    def make(
        mixture='jsonl:{}/a.jsonl,jsonl:{}/b.jsonl,jsonl:{}/c.jsonl', *, epochs=1.0, heldout=0.0, batch_size=BATCH, **kwargs
    ):
        config = PreferenceConfig(mixture.replace('{}', str(world)), epochs, heldout)
        return PreferenceData(
            config, Letters(), length=LENGTH, context=CONTEXT, **({'seed': 0, 'batch_size': batch_size} | kwargs)
        )

    return make


def pairs(batch):
    """(ids of the chosen answer, ids of the rejected one, rating, safe) of every pair of a batch."""
    for r, weights in enumerate(batch['weights']):
        for s in np.flatnonzero(weights):
            sides = []
            for last in batch['last'][r, s]:
                segment = batch['segment_ids'][r] == batch['segment_ids'][r, last]
                assert segment[last] and not segment[last + 1 :].any()  # read at the last token of its segment
                sides.append(''.join(map(chr, batch['tokens'][r][segment])))
            yield *sides, int(batch['rating'][r, s]), tuple(batch['safe'][r, s].tolist())


def text(question, answer):
    dialog = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    return ''.join(map(chr, encode_dialog(dialog, Letters())[0]))


def test_every_pair_once_and_those_of_a_prompt_in_one_batch(make, world):
    data = make()
    batches = list(data.train())
    assert len(batches) == data.steps
    found, home = collections.Counter(), {}
    for number, batch in enumerate(batches):
        assert batch['tokens'].shape == batch['segment_ids'].shape == (data.rows, LENGTH)
        assert batch['last'].shape == batch['safe'].shape == (data.rows, data.slots, 2)
        assert batch['rating'].shape == batch['weights'].shape == (data.rows, data.slots)
        assert 0 < batch['weights'].sum() <= BATCH
        assert not batch['tokens'][batch['segment_ids'] == 0].any()
        for chosen, rejected, rating, safe in pairs(batch):
            found[chosen, rejected, rating, safe] += 1
            home.setdefault(chosen.split(' [/INST]')[0], set()).add(number)
    expected = collections.Counter()
    for line in (world / 'a.jsonl').read_text().splitlines():
        r = json.loads(line)
        question = r['prompt'][0]['content']
        expected[text(question, r['chosen']), text(question, r['rejected']), 3, (1, -1)] += 1
    for line in (world / 'c.jsonl').read_text().splitlines():
        r = json.loads(line)
        question = r['prompt'][0]['content']
        expected[text(question, r['chosen']), text(question, r['rejected']), 0, (-1, -1)] += 1
    for line in (world / 'b.jsonl').read_text().splitlines():
        r = json.loads(line)
        for x, y in ((0, 1), (0, 2), (1, 2)):
            expected[text(r['prompt'], r['responses'][x]), text(r['prompt'], r['responses'][y]), 0, (-1, -1)] += 1
    assert found == expected
    assert all(len(numbers) == 1 for numbers in home.values())


def test_an_answer_is_read_once_however_often_it_is_compared(make):
    data = make('jsonl:{}/b.jsonl')
    batch = next(data.train())
    segments = sum(int(row.max()) for row in batch['segment_ids'])
    assert (batch['weights'].sum(), segments) == (12, 12)  # four prompts with three answers and three pairs each


def test_hosts_restarts_and_seeds(make):
    whole = list(make(shards=4).train())
    for count in (2, 4):
        parts = [make(shards=4, process_index=i, process_count=count).train() for i in range(count)]
        for one, *rest in zip(whole, *parts, strict=True):
            for name in one.keys() - {'record_ids'}:
                assert np.array_equal(one[name], np.concatenate([part[name] for part in rest])), name
    assert equal(list(make(shards=4).train(7)), whole[7:])
    assert not equal(list(make(seed=1, shards=4).train()), whole)
    assert make(shards=8).rows % 8 == 0


def test_held_out_by_question(make):
    data = make(heldout=0.2)
    held = [pair for source in range(3) for batch in data.heldout(source) for pair in pairs(batch)]
    trained = [pair for batch in data.train() for pair in pairs(batch)]
    questions = [{pair[0].split(' [/INST]')[0] for pair in some} for some in (held, trained)]
    assert len(held) + len(trained) == 150 + 60 + 60
    assert not questions[0] & questions[1] and 25 < len(held) < 85
    assert sum(map(len, data.sources[2].heldout)) % 3 == 0


def test_weights_are_shares(make):
    """All of a, which is what its share allows, and as much of b as makes up the rest."""
    data = make('jsonl:{}/a.jsonl:0.95, jsonl:{}/b.jsonl:0.05')
    kinds = collections.Counter(chosen[9] for batch in data.train() for chosen, *_ in pairs(batch))
    assert kinds == {'a': 150, 'b': 3 * 7}  # 157 records
    assert [source.weight for source in data.sources] == [0.95, 0.05]
    limited = make('jsonl:{}/a.jsonl:0.5@0.1, jsonl:{}/b.jsonl:0.5')
    assert collections.Counter(chosen[9] for batch in limited.train() for chosen, *_ in pairs(batch)) == {'a': 15, 'b': 45}
    assert '0.9500' in data.table() and 'left out' in data.table()


def test_long_prompts_lose_their_oldest_turns(tmp_path):
    turns = [{'role': ('user', 'assistant')[i % 2], 'content': f'{i}' * 9} for i in range(5)]
    rows = [{'prompt': turns, 'chosen': 'yes', 'rejected': 'no'}, row('q' * 60, 'yes', 'no'), row('short', 'yes', 'no')]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    config = PreferenceConfig(f'jsonl:{tmp_path}/a.jsonl', heldout=0)
    data = PreferenceData(config, Letters(), length=LENGTH, context=CONTEXT, batch_size=4, seed=0)
    [source] = data.sources
    assert (source.tally.cut, dict(source.tally.dropped)) == (1, {'too long': 1})
    found = sorted(chosen for chosen, *_ in pairs(next(data.train())))
    assert found == sorted([text('4' * 9, 'yes'), text('short', 'yes')])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'batch_size': 2, 'mixture': 'jsonl:{}/b.jsonl'},
            'b.jsonl:.* makes 3 pairs, which must stay in one batch',
        ),
        ({'heldout': 0.999, 'mixture': 'jsonl:{}/b.jsonl'}, 'has no comparisons to train on .*; 20 held out'),
        ({'mixture': 'toy:dialogs'}, 'toy:dialogs record 0 has the fields messages, which are no known format of preferences'),
        ({'epochs': 0.0}, 'epochs is 0.0'),
    ],
)
def test_mistakes(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_records_of_a_batch(make):
    data = make('jsonl:{}/b.jsonl')
    batch = next(data.train())
    assert len(data.describe(batch['record_ids'])) == 12
    assert all('b.jsonl:' in place for place in data.describe(batch['record_ids']))
