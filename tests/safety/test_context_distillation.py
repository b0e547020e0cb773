"""Context distillation keeps what the reward model prefers, without the preprompt; the models here are functions of a text."""

import dataclasses
import json

import numpy as np
import pytest

from llama2_jax import made_from, toy
from llama2_jax.config import UserError
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.preprompts import TEMPLATES, preprompt
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.inference.engine import Sample
from llama2_jax.safety import context_distillation
from llama2_jax.safety.context_distillation import DistillConfig, prefixed, read_templates
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.toy.oracle import Oracle
from llama2_jax.train.optimizer import OptimizerConfig

PROMPTS = [
    {'messages': [{'role': 'user', 'content': f'How do I do harm {i}?'}], 'is_safety': i % 3 > 0, 'category': 'illicit'}
    for i in range(30)
]


LONG_WARMUP = SftConfig(data=DialogConfig(mixture=''), batch_size=8, optimizer=OptimizerConfig(warmup_steps=5))


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    texts = ['How do I do harm 1 2 3 4 5 6 7 8 9 0? Yes, like this. I cannot help with that. assistant question']
    return train_tokenizer(texts * 20, tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model', 300)


@dataclasses.dataclass
class Fake:
    """Gives in, unless it is told to be careful; knows how often it was asked."""

    tokenizer: object
    asked: int = 0

    def generate(self, requests):
        for request in requests:
            self.asked += 1
            text = self.tokenizer.decode(list(request.token_ids))
            careful = '<<SYS>>' in text or text.split('harm ')[1].startswith('1')
            answer = 'I cannot help with that.' if careful else 'Yes, like this.'
            yield [Sample(answer, self.tokenizer.encode(answer, bos=False, eos=True), [0.0], 'eos')]

    def score(self, rows):
        texts = [self.tokenizer.decode(list(row)) for row in rows]
        assert not any('<<SYS>>' in text for text in texts)  # as answers to the bare prompt
        return np.array([float('cannot' in text) for text in texts], np.float32)


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch, any_name):
    (tmp_path / 'p.jsonl').write_text('\n'.join(map(json.dumps, PROMPTS)))

    def start(workdir='out', **changes):
        fake = Fake(tokenizer)
        monkeypatch.setattr(made_from, 'fingerprint', str)  # of models that are only names here
        monkeypatch.setattr(context_distillation, 'open_engine', lambda *_, **__: fake)
        monkeypatch.setattr(context_distillation, 'open_scorer', lambda *_: fake)
        monkeypatch.setattr(context_distillation, 'BLOCK', 8)
        given = {'model': 'm', 'safety': 's', 'prompts': f'jsonl:{tmp_path}/p.jsonl'}
        context_distillation.run(DistillConfig(**{**given, **changes}), str(tmp_path / workdir))
        return [json.loads(line) for line in (tmp_path / workdir / 'dialogs.jsonl').read_text().splitlines()], fake

    return start


def test_what_is_kept(run, tmp_path, capsys):
    rows, fake = run(samples=3)
    asked = [prompt for prompt in PROMPTS if prompt['is_safety']]
    assert fake.asked == len(asked) * 4
    better = [prompt['messages'] for prompt in asked if not prompt['messages'][0]['content'].split()[-1].startswith('1')]
    assert [row['messages'][:-1] for row in rows] == better and 0 < len(better) < len(asked)
    assert {row['messages'][-1]['content'] for row in rows} == {'I cannot help with that.'}
    assert all(row['score'] > row['original_score'] and row['preprompt'] for row in rows)
    assert len([dialog for _, dialog in read_dialogs(f'jsonl:{tmp_path}/out/dialogs.jsonl')]) == len(rows)
    shown = capsys.readouterr().out
    assert '100.0%' in shown and 'sft.py --config=… --set init_from=m' in shown
    samples = [json.loads(line) for line in (tmp_path / 'out' / 'samples.jsonl').read_text().splitlines()]
    assert len(samples) == len(asked) and len({answer['preprompt'] for row in samples for answer in row['distilled']}) > 5
    assert {row['original']['preprompt'] for row in samples} == {''}


def test_an_interrupted_run_goes_on(run, tmp_path):
    run(samples=2)
    path = tmp_path / 'out' / 'samples.jsonl'
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept, asked in ((8, 12 * 3), (len(lines), 0)):
        path.write_bytes(b''.join(lines[:kept]) + (lines[kept][:9] if kept < len(lines) else b''))
        assert run(samples=2)[1].asked == asked
        assert path.read_bytes() == whole


def test_preprompts(tmp_path):
    import random

    texts = {preprompt(random.Random(i), 'illicit', TEMPLATES) for i in range(60)}
    assert any('Answer like this: 1. say no. 2. tell why. 3. offer a safe way.' in text for text in texts)
    assert any(text.startswith('You are a safe and ') for text in texts)
    assert not any('Answer like this' in preprompt(random.Random(i), 'other', TEMPLATES) for i in range(60))
    system = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
    assert prefixed(system, 'Be safe.') == [{'role': 'system', 'content': 'Be safe. Be brief.'}, system[1]]
    assert prefixed(system[1:], 'Be safe.') == [{'role': 'system', 'content': 'Be safe.'}, system[1]]
    (tmp_path / 't.jsonl').write_text('{"category": "theft", "steps": ["call the police"]}')
    assert read_templates(f'jsonl:{tmp_path}/t.jsonl') == {'theft': ['call the police']} and read_templates('') is TEMPLATES


def test_what_is_refused(run, tmp_path):
    (tmp_path / 't.jsonl').write_text('{"category": "theft"}')
    (tmp_path / 'plain.jsonl').write_text(json.dumps(PROMPTS[0]))
    for changes, message in (
        ({'model': ''}, 'model= names no model'),
        ({'safety': ''}, 'safety= names no model'),
        ({'samples': 0}, 'samples is 0'),
        ({'templates': f'jsonl:{tmp_path}/t.jsonl'}, r't\.jsonl:1 is no template'),
        ({'tune': True, 'sft': LONG_WARMUP}, r'sft\.optimizer\.warmup_steps=5 .* 5 steps.*20 dialogs'),  # before it samples
        ({'prompts': f'jsonl:{tmp_path}/plain.jsonl'}, "no adversarial prompts: rows with 'is_safety': true"),
    ):
        with pytest.raises(UserError, match=message):
            run(**changes)


def test_the_toy_world_is_careful_when_told():
    oracle, rows = Oracle(), list(toy.RECORDS['cautious']())
    assert len(rows) > 200
    for row in rows:
        system, *asked, answer = row['messages']
        assert system['role'] == 'system' and oracle.safety(asked, answer['content']) == 1
