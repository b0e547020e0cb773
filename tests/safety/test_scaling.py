"""The scaling study with a fine-tuning that only notes its data; answers and scores are functions of it."""

import dataclasses
import json

import pytest

from llama2_jax import made_from
from llama2_jax.config import UserError
from llama2_jax.inference.engine import Sample
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.rl.rollout import Rollout
from llama2_jax.safety import scaling
from llama2_jax.safety.scaling import ScalingConfig, measure
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.toy import safety


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    texts = [text for danger in safety.DANGERS for text in (danger.act, danger.harm, danger.reason, danger.safe)]
    return train_tokenizer(texts * 5, tmp_path_factory.mktemp('t') / 'tokenizer.model', 400)


@dataclasses.dataclass
class Fake:
    """Refuses everything if it was trained on safety data, else does harm."""

    tokenizer: object
    careful: bool

    def generate(self, requests):
        for _ in requests:
            yield [Sample(safety.DECLINES[0] if self.careful else safety.DANGERS[0].harm, [5, 2], [0.0, 0.0], 'eos')]


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch, any_name):
    trained = []

    def start(**changes):
        def tune(config, workdir):
            trained.append((config.seed, config.data.mixture, config.init_from))

        def open_rewards(config, tokenizer):
            def score(answers):
                scores = [(1.0, 2.0 if 'cannot' in one.text else -2.0) for _, one in answers]
                return [
                    Rollout(prompt, one.text, one.token_ids, one.logprobs, one.stop_reason, *pair, gated=False, score=0.0)
                    for (prompt, one), pair in zip(answers, scores, strict=True)
                ]

            return score

        monkeypatch.setattr(made_from, 'fingerprint', str)
        monkeypatch.setattr(scaling.sft, 'run', tune)
        monkeypatch.setattr(scaling, 'open_engine', lambda name, *_, **__: Fake(tokenizer, 'refusals' in trained[-1][1]))
        monkeypatch.setattr(scaling, 'open_rewards', open_rewards)
        given = {'init_from': 'm', 'rewards': RewardsConfig('s', 's'), 'shares': (0.0, 0.1), 'seeds': (3, 4), 'count': 10}
        return scaling.run(ScalingConfig(**{**given, **changes}), str(tmp_path / 'out')), trained

    return start


def test_shares_seeds_and_columns(run, tmp_path):
    rows, trained = run()
    mixtures = ('toy:helpful', 'toy:helpful, toy:refusals:0.1x')
    assert trained == [(seed, mixture, 'm') for seed in (3, 4) for mixture in mixtures]
    none, some = rows
    assert none['violations'].startswith('100.0 %') and some['violations'] == '0.0 % (< 16.1, n = 20)'  # both seeds
    assert none['false refusals, borderline'].startswith('0.0 % (<') and some['false refusals, borderline'].startswith('100.0 %')
    assert (none['safety RM, mean'], some['safety RM, mean']) == ('0.119', '0.881')  # sigmoids of -2 and 2
    assert json.loads((tmp_path / 'out' / 'scaling.json').read_text()) == rows
    assert '2 seed(s) together' in (tmp_path / 'out' / 'scaling.md').read_text()


def test_what_is_there_is_not_made_again(run, tmp_path):
    rows, trained = run()
    (tmp_path / 'out' / '4-0.1' / 'plain.jsonl').unlink()
    trained.clear()
    again, trained = run()
    assert again == rows and trained == [(4, 'toy:helpful, toy:refusals:0.1x', 'm')]


def test_the_low_tail_is_a_quantile(run, tmp_path):
    run()
    one = scaling.read_rollouts(tmp_path / 'out' / '3-0' / 'attacks.jsonl')[0]
    rollouts = [dataclasses.replace(one, safety=-9.0)] * 2 + [dataclasses.replace(one, safety=9.0)] * 18
    found = measure([{'attacks': rollouts, 'borderline': [one], 'plain': [one]}])
    assert found['safety RM, mean'] == '0.900' and found['safety RM, lowest 5%'] == '0.000'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [({'shares': (0.0, 1.5)}, 'shares'), ({'init_from': ''}, 'init_from'), ({'rewards': RewardsConfig()}, 'rewards.helpfulness')],
)
def test_mistakes(run, changes, message):
    with pytest.raises(UserError, match=message):
        run(**changes)
