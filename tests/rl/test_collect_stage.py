"""Collected answers are those of the models in turn, and simulated raters compare what differs; the models here are functions."""

import collections
import dataclasses
import json

import pytest

from llama2_jax import made_from
from llama2_jax.config import UserError
from llama2_jax.data.comparisons import read_comparisons
from llama2_jax.inference.engine import Sample
from llama2_jax.rl import collect
from llama2_jax.rl.collect import CollectConfig
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.toy.oracle import Oracle


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return train_tokenizer(['Where does Mira live? I do not know.'] * 20, tmp_path_factory.mktemp('t') / 'tokenizer.model', 300)


@dataclasses.dataclass
class Fake:
    """`good` knows the oracle's answers, `bad` declines, and `endless` is always cut off."""

    name: str
    tokenizer: object
    asked: collections.Counter

    def generate(self, requests):
        oracle = Oracle()
        for request in requests:
            self.asked[self.name] += 1
            question = self.tokenizer.decode(list(request.token_ids)).split('[INST] ')[-1].split(' [/INST]')[0]
            answer = oracle.perfect(oracle.understand([{'role': 'user', 'content': question}]))
            text = {'good': answer, 'bad': f'I do not know at {request.temperature}.', 'endless': answer}[self.name]
            yield [Sample(f' {text}', [], [], 'length' if self.name == 'endless' else 'eos')]


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch, any_name):
    def start(**changes):
        asked = collections.Counter()
        monkeypatch.setattr(made_from, 'fingerprint', str)  # of models that are only names here
        monkeypatch.setattr(collect, 'open_engine', lambda name, *_, **__: Fake(name, tokenizer, asked))
        monkeypatch.setattr(collect, 'BLOCK', 8)
        given = {'models': ('good', 'bad'), 'prompts': 'toy:prompts', 'count': 20, 'raters': 'helpfulness'}
        collect.run(CollectConfig(**{**given, **changes}), str(tmp_path / 'out'))
        files = ('answers.jsonl', 'preferences.jsonl')
        return [(tmp_path / 'out' / file).read_text() if (tmp_path / 'out' / file).exists() else None for file in files], asked

    return start


def test_models_and_temperatures_take_turns(run, tmp_path):
    (answers, preferences), asked = run(temperatures=(0.5, 1.0))
    rows = [json.loads(line) for line in answers.splitlines()]
    assert asked == {'good': 40, 'bad': 40} and len({json.dumps(row['messages']) for row in rows}) == 20
    for row in rows:  # `good` says the same at both temperatures, which counts once
        assert [(a['model'], a['temperature']) for a in row['answers']] == [('good', 0.5), ('bad', 0.5), ('bad', 1.0)]
    pairs = [pair for _, (kept, _) in read_comparisons(f'jsonl:{tmp_path}/out/preferences.jsonl') for pair in kept]
    assert len(pairs) == len(preferences.splitlines()) == 20 * 3
    of_two_kinds = [pair for pair in pairs if any('know' not in side[0]['content'] for side in (pair.chosen, pair.rejected))]
    right = [pair for pair in of_two_kinds if 'know' in pair.rejected[0]['content']]
    assert len(of_two_kinds) == 40 and len(right) >= 36  # some raters are careless
    assert sum(pair.rating == 'significantly' for pair in right) >= 36
    assert {pair.rating for pair in pairs} - {'significantly'}  # two that say nothing hardly differ


def test_interrupted_run_goes_on(run, tmp_path):
    whole, _ = run()
    file = tmp_path / 'out' / 'answers.jsonl'
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(''.join(lines[:8]) + lines[8][:20])
    (tmp_path / 'out' / 'preferences.jsonl').unlink()
    again, asked = run()
    assert again == whole and asked == {'good': 24, 'bad': 24}


def test_people_get_answers_only(run):
    (answers, preferences), _ = run(raters='people', models=('endless', 'bad'))
    assert preferences is None
    assert {answer['model'] for line in answers.splitlines() for answer in json.loads(line)['answers']} == {'bad'}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'models': ()}, 'models= names no model'),
        ({'prompts': ''}, 'prompts is missing'),
        ({'samples': 1}, 'samples is 1'),
        ({'temperatures': ()}, 'temperatures is empty'),
        ({'prompts': 'jsonl:p.jsonl'}, 'raters=helpfulness knows the toy world only'),
    ],
)
def test_mistakes(run, changes, message):
    with pytest.raises(UserError, match=message):
        run(**changes)
