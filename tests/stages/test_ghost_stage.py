"""Ghost Attention's data set, recall, and the lists of instructions; the models here are functions of a prompt's text."""

import dataclasses
import json
import random

import jax
import pytest

from llama2_jax import made_from, toy
from llama2_jax.config import UserError
from llama2_jax.data.constraints import parse_list, read_constraints
from llama2_jax.data.dialogs import DialogConfig, DialogData
from llama2_jax.data.instructions import Instruction
from llama2_jax.evals.ghost import Talk, find_grader, obeyed, recall
from llama2_jax.evals.multi_turn import multi_turn_rollout
from llama2_jax.inference.engine import Sample
from llama2_jax.stages import ghost
from llama2_jax.stages.ghost import GhostConfig, cut, ghost_dialog, plan
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.toy.instructions import KINDS, dress, obeys, parse
from llama2_jax.train.optimizer import OptimizerConfig

LONG_WARMUP = SftConfig(data=DialogConfig(mixture=''), batch_size=8, optimizer=OptimizerConfig(warmup_steps=16))
TALKS = [tuple(f'Question {i} {turn}?' for turn in range(20)) for i in range(40)]
ANSWER = 'It is so.'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    texts = [ANSWER, 'Question 1 2 3 4 5 6 7 8 9 0?', *(text for kind in KINDS.values() for text in kind.ways)]
    return train_tokenizer(texts * 20, tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model', 320)


@dataclasses.dataclass
class Fake:
    """An engine whose answers are a function of the dialog's user messages; it counts its requests."""

    tokenizer: object
    answer: object
    context: int = 4096
    asked: int = 0

    @property
    def config(self):
        return self

    def generate(self, requests):
        for request in requests:
            self.asked += 1
            text = self.tokenizer.decode(list(request.token_ids))
            turns = [turn.partition('[/INST]')[0].strip() for turn in text.split('[INST]')[1:]]
            text, reason = self.answer(turns, request.seed)
            yield [Sample(' ' + text, self.drawn(text), [0.0], reason)]

    def drawn(self, text):
        """Ids of a text that encoding it would not give: byte by byte."""
        return [3 + byte for byte in text.encode()] + [2]


def told(turn):
    """The instructions in a user's turn, in a system message or before the question."""
    return parse(turn.replace('<<SYS>>', '').replace('<</SYS>>', ' '))[0]


def forgetful(turns, seed):
    """Obeys what its last question says."""
    return dress(told(turns[-1]), ANSWER), 'eos'


def moody(turns, seed):
    """Does so for one seed of two."""
    return dress(told(turns[-1]), ANSWER) if random.Random(seed).random() < 0.5 else ANSWER, 'eos'


def haunted(turns, seed):
    """Obeys what the first turn says."""
    return dress(told(turns[0]), ANSWER), 'eos'


def test_recall_tells_them_apart(tokenizer):
    talks = [plan(GhostConfig(most=2, terse_share=0.5), KINDS, text, i, turns=20).talk for i, text in enumerate(TALKS)]
    assert len({len(talk.instructions) for talk in talks}) == 2
    figures = recall(obeyed(Fake(tokenizer, forgetful, 100_000), talks, obeys, 8))
    assert figures[1] == 1 and {figures[turn] for turn in (2, 4, 6, 20)} == {0}
    figures = recall(obeyed(Fake(tokenizer, haunted, 100_000), talks, obeys, 8))
    assert set(figures.values()) == {1} and set(figures) == set(range(1, 21))
    short = [talk._replace(questions=talk.questions[:3]) for talk in talks[:10]]
    assert set(recall(obeyed(Fake(tokenizer, haunted, 100_000), [*short, *talks[10:]], obeys, 8))) == set(range(1, 21))


def test_a_dialog_ends_where_nothing_can_follow(tokenizer):
    for bad in (('', 'eos'), ('cut off', 'length'), ('a [INST] b', 'eos'), ('half a \ufffd', 'eos')):
        engine = Fake(tokenizer, lambda turns, _, bad=bad: bad if len(turns) == 3 else (ANSWER, 'eos'))
        answer = {'role': 'assistant', 'content': ANSWER, 'token_ids': engine.drawn(ANSWER)}
        assert multi_turn_rollout(engine, [TALKS[0], TALKS[1][:2]], max_new_tokens=8) == [[answer] * 2, [answer] * 2]
        assert engine.asked == 5
    talk = Talk('End: Sea.', (Instruction('word', 'Sea'),), TALKS[0][:4])
    engine = Fake(tokenizer, lambda turns, _: ('Sea!' if len(turns) < 3 else '', 'eos'))
    assert obeyed(engine, [talk], obeys, 8) == [[True, True, False, False]]


def test_old_turns_go_where_the_context_is_full(tokenizer):
    seen = []
    engine = Fake(tokenizer, lambda turns, _: (seen.append(turns), (ANSWER, 'eos'))[1], context=200)
    multi_turn_rollout(engine, [TALKS[0]], ['End: Sea.'], max_new_tokens=16)
    assert 2 < max(map(len, seen)) < 20
    assert all('End: Sea.' in turns[0] and not any('Sea' in turn for turn in turns[1:]) for turns in seen)
    assert [turns[-1].split()[-1] for turns in seen] == [f'{turn}?' for turn in range(20)]


def test_plans():
    config = GhostConfig(most=2, turns=12)
    plans = [plan(config, KINDS, text, i) for i, text in enumerate(TALKS * 25)]
    turns = [len(each.talk.questions) for each in plans]
    assert min(turns) == 2 and max(turns) == 12 and 0.35 < sum(turn < 5 for turn in turns) / 1000 < 0.6
    terse = [each.talk.system != each.said for each in plans]
    assert 0.45 < sum(terse) / 1000 < 0.55
    for each in plans:
        assert parse(each.said) == parse(each.talk.system) == (each.talk.instructions, '')
    assert plan(config, KINDS, TALKS[3], 3) == plans[3] != plan(dataclasses.replace(config, seed=1), KINDS, TALKS[3], 3)


def test_only_the_last_answer_is_learned(tokenizer):
    talk = Talk('End: Sea.', (), ('Hi', 'Bye', 'Well?'))
    answers = [{'role': 'assistant', 'content': text, 'token_ids': [i]} for i, text in enumerate(('Sea!', 'Farewell. Sea!'))]
    assert cut(ghost_dialog(talk, answers), 2) == [
        {'role': 'system', 'content': 'End: Sea.'},
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': 'Sea!', 'weight': 0},
        {'role': 'user', 'content': 'Bye'},
        {'role': 'assistant', 'content': 'Farewell. Sea!', 'token_ids': [1]},
    ]


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch, any_name):
    """Runs the stage with a fake engine; returns the rows that it wrote and the engine."""
    dialog = [{'role': role, 'content': text} for text in TALKS[0] for role, text in (('user', text), ('assistant', 'x'))]
    lines = [
        json.dumps({'messages': [dict(m, content=m['content'].replace(' 0 ', f' {i} ')) for m in dialog]}) for i in range(40)
    ]
    (tmp_path / 'd.jsonl').write_text('\n'.join(lines))

    def start(answer=moody, workdir='gatt', **changes):
        engine = Fake(tokenizer, answer)
        monkeypatch.setattr(made_from, 'fingerprint', str)  # of models that are only names here
        monkeypatch.setattr(ghost, 'open_engine', lambda *_, **__: engine)
        given = {'model': 'm', 'dialogs': f'jsonl:{tmp_path}/d.jsonl', 'constraints': 'toy', 'grader': 'toy', 'most': 2}
        ghost.run(
            GhostConfig(**{**given, 'batch_size': 16, 'max_new_tokens': 32, 'samples': 8, **changes}), str(tmp_path / workdir)
        )
        return [json.loads(line) for line in (tmp_path / workdir / 'dialogs.jsonl').read_text().splitlines()], engine

    return start


def test_the_data_set(run, tokenizer, tmp_path, capsys):
    rows, _ = run(moody, samples=20, count=30)
    assert 'sft.py --config=… --set init_from=m --set data.mixture=' in capsys.readouterr().out
    assert [row['id'] for row in rows] == list(range(30))
    for row in rows:
        system, *turns = row['messages']
        given = tuple(Instruction(**instruction) for instruction in row['instructions'])
        assert parse(system['content']) == (given, '')
        assert all(told(turn['content']) == () for turn in turns[::2])
        assert [turn.get('weight', 1) for turn in turns[1::2]] == [0] * (len(turns) // 2 - 1) + [1]
        assert all(obeys(instruction, turn['content']) for instruction in given for turn in turns[1::2])
    source = f'jsonl:{tmp_path}/gatt/dialogs.jsonl'
    data = DialogData(DialogConfig(source, heldout=0), tokenizer, length=2400, batch_size=2, seed=0)
    assert (data.sources[0].dialogs, data.sources[0].dropped) == (30, 0)
    assert data.sources[0].trained_share < 0.25
    drawn = [[3 + byte for byte in row['messages'][-1]['content'].encode()] + [2] for row in rows]
    trained = [
        tokens[learned & (segments == segment)].tolist()
        for batch in data.train()
        for tokens, learned, segments in zip(batch['tokens'], batch['trained'], batch['segment_ids'], strict=True)
        for segment in range(1, segments.max() + 1)
    ]
    assert sorted(trained) == sorted(drawn * 2)  # epochs; the ids that were drawn, not those of their text


def test_cuts_of_the_same_dialogs(run):
    whole, _ = run()
    rows, engine = run(cuts=3)
    assert engine.asked == 0 and [row for row in rows if row in whole] == whole
    for row in whole:
        turns = len(row['messages']) // 2
        own = [other['messages'] for other in rows if other['id'] == row['id']]
        assert len(own) == min(3, turns) == len({len(messages) for messages in own})
        for messages in own:
            assert [message['content'] for message in messages] == [m['content'] for m in row['messages']][: len(messages)]
            assert [message.get('weight', 1) for message in messages[2::2]] == [0] * (len(messages) // 2 - 1) + [1]


def test_an_interrupted_data_set_goes_on(run, tmp_path):
    run()
    path = tmp_path / 'gatt' / 'samples.jsonl'
    whole = path.read_bytes()
    for end in (0, whole.index(b'\n') + 1, len(whole) - 9, len(whole)):
        path.write_bytes(whole[:end])
        _, engine = run()
        assert path.read_bytes() == whole
    assert engine.asked == 0
    path.write_text('no row\n')
    with pytest.raises(UserError, match=r'samples\.jsonl is damaged'):
        run()


def test_where_no_answer_obeys_a_dialog_ends(run):
    rows, _ = run(moody, samples=2)
    assert len(rows) < 40 and min(len(row['messages']) for row in rows) == 5
    rows, _ = run(moody, samples=1, workdir='as it is')
    assert len(rows) == 40
    asked = [obeys(Instruction(**given), row['messages'][-1]['content']) for row in rows for given in row['instructions']]
    assert 0.2 < sum(asked) / len(asked) < 0.8


def test_what_is_refused(run):
    for changes, message in (
        ({'model': ''}, 'model= names no model'),
        ({'dialogs': ''}, 'dialogs is missing'),
        ({'turns': 1}, 'turns is 1'),
        ({'terse_share': 2.0}, 'terse_share is 2.0'),
        ({'grader': 'toys'}, 'grader=toys is not toy, mentions or module:function'),
        ({'grader': 'json:none'}, 'grader=json:none is not toy'),
        ({'tune': True, 'judged': 40}, r'40 dialogs of two turns or more; 40 are kept to judge by'),
        ({'tune': True, 'judged': 8, 'cuts': 2, 'sft': LONG_WARMUP}, 'optimizer.warmup_steps=16 .*64 dialogs'),
        ({'constraints': ''}, 'answers .* with no list: give --set constraints=jsonl:FILE'),
    ):
        with pytest.raises(UserError, match=message):
            run(workdir=message[:5], **changes)


def test_lists_that_the_model_makes(run, tmp_path):
    def answer(turns, seed):
        if 'list of' in turns[-1]:
            return f'Here are some {turns[-1].split()[5]}:\n1. Alpha\n2. Beta Gamma.\n3) Alpha', 'eos'
        return 'Well, Alpha and Beta Gamma.', 'eos'

    rows, _ = run(answer, constraints='', grader='mentions')
    kinds = read_constraints(f'jsonl:{tmp_path}/gatt/constraints.jsonl')
    assert list(kinds) == ['hobby', 'language', 'figure'] and {kind.values for kind in kinds.values()} == {
        ('Alpha', 'Beta Gamma')
    }
    run(answer, constraints='', grader='mentions')  # again
    with (tmp_path / 'gatt/constraints.jsonl').open('a') as file:
        file.write('{"kind": "hobby", "values": ["Chess", "Go"]}\n')
    with pytest.raises(UserError, match=r'constraints\.jsonl .*has changed'):
        run(answer, constraints='', grader='mentions')
    texts = [row['messages'][0]['content'] for row in rows]
    assert any('Figure: Beta Gamma.' in text for text in texts) and any('You enjoy Alpha.' in text for text in texts)
    assert find_grader('mentions')(Instruction('figure', 'Napoleon'), 'As napoleon, I say no.')
    assert not find_grader('mentions')(Instruction('figure', 'Napoleon'), 'As Napoleons do.')
    assert parse_list('Sure!\n\n* a, b\n') == ['Sure!', 'a, b']


def test_given_lists_that_change(run, tmp_path):
    rows = tmp_path / 'c.jsonl'
    rows.write_text('{"kind": "hobby", "values": ["Chess", "Go"]}\n')
    settings = {'constraints': f'jsonl:{rows}', 'grader': 'mentions', 'samples': 1, 'most': 1}
    run(**settings)
    rows.write_text('{"kind": "hobby", "values": ["Chess", "Skat"]}\n')
    with pytest.raises(UserError, match=r'constraints=jsonl:.*c\.jsonl .*has changed'):
        run(**settings)


def test_given_lists(tmp_path):
    path = tmp_path / 'c.jsonl'

    def read(*rows):
        path.write_text('\n'.join(map(json.dumps, rows)))
        return read_constraints(f'jsonl:{path}')

    kinds = read(
        {'kind': 'hobby', 'values': ['chess']}, {'kind': 'mood', 'values': ['sad'], 'ways': ['Be {v}.'], 'terse': 'Mood: {v}.'}
    )
    assert kinds['mood'] == (('sad',), ('Be {v}.',), 'Mood: {v}.') and kinds['hobby'].terse == 'Hobby: {v}.'
    for row, message in (
        ({'values': ['a']}, r"c\.jsonl:1 has no 'kind'"),
        ({'kind': 'hobbies', 'values': ['a']}, r"kind 'hobbies' needs 'ways'"),
        ({'kind': 'hobby', 'values': 'chess'}, "'values' is not a list of texts"),
        ({'kind': 'mood', 'values': ['sad'], 'ways': ['Be!'], 'terse': '{v}'}, r"'Be!' in 'ways' has no \{v\}"),
    ):
        with pytest.raises(UserError, match=message):
            read(row)


def test_the_toy_world_has_long_talks():
    rows = [row['messages'] for row, _ in zip(toy.RECORDS['talks'](), range(50), strict=False)]
    assert {len(messages) for messages in rows} == {80}
    assert len({messages[0]['content'] for messages in rows}) > 30
    rng, obedient = random.Random(0), list(toy.RECORDS['obedient']())
    for row in rng.sample(obedient, 50):
        *before, last = row['messages']
        given = [instruction for message in before for instruction in parse(message['content'])[0]]
        assert given and all(obeys(instruction, last['content']) for instruction in given)


def teardown_module():
    jax.clear_caches()
