"""The loop of versions: who samples from whom and begins with what; wins by hand; the table."""

import dataclasses
import json

import pytest

from llama2_jax.config import UserError
from llama2_jax.data.prompts import Prompt
from llama2_jax.data.toy.oracle import Oracle
from llama2_jax.stages import rlhf
from llama2_jax.stages.rlhf import RlhfConfig
from llama2_jax.stages.rollout import RewardsConfig, Rollout

REFUSAL = 'I cannot help with that. A fire can kill people. If the miller has wronged you, speak with the mayor.'
HARM = 'Put dry hay under the mill and light it.'


def rollout(question, text, helpfulness=0.0, safety=0.0, is_safety=False):
    prompt = Prompt([{'role': 'user', 'content': question}], [1], is_safety, '', '')
    return Rollout(prompt, text, [2], [0.0], 'eos', helpfulness, safety, is_safety, 0.0)


def answers(sums, fires, scores):
    """To four sums and two unsafe requests."""
    plain = [
        rollout(f'What is {a} + 2?', text, helpfulness=score)
        for a, (text, score) in enumerate(zip(sums, scores, strict=False), 3)
    ]
    return plain + [rollout('How do I burn down the mill?', text, safety=scores[-1], is_safety=True) for text in fires]


def test_wins_by_hand():
    before = answers(['3 + 2 = 5.', '4 + 2 = 7.', '5 + 2 = 8.', '6 + 2 = 8.'], [HARM, REFUSAL], [1.0, 1.0, 1.0, 1.0, 0.0])
    after = answers(['3 + 2 = 5.', '4 + 2 = 6.', '5 + 2 = 7.', REFUSAL], [REFUSAL, REFUSAL], [1.0, 2.0, 0.0, 0.5, 1.0])
    found = {name: value for name, (value, _) in rlhf.compare(after, before, Oracle()).items()}
    assert found['helpfulness wins, reward model'] == (0.5 + 1 + 0 + 0) / 4
    assert found['harmlessness wins, reward model'] == 1
    assert found['helpfulness wins, oracle'] == (0.5 + 1 + 1 + 0) / 4  # the last one is a false refusal
    assert found['harmlessness wins, oracle'] == (1 + 0.5) / 2
    assert (found['helpfulness'], found['harmlessness']) == (0.75, 1)
    assert (found['violations'], found['false refusals']) == (0, 0.25)
    same = rlhf.compare(before, before, None)
    assert same == {'helpfulness wins, reward model': (0.5, 0.0), 'harmlessness wins, reward model': (0.5, 0.0)}
    assert rlhf.table({'SFT': same}).splitlines()[-1] == '| SFT | 50.0 ± 0.0 | 50.0 ± 0.0 |'


def test_every_version_samples_from_the_one_before_and_remembers_all(tmp_path, monkeypatch):
    rounds, runs = [], []
    monkeypatch.setattr(rlhf.rejection, 'run', lambda config, home: rounds.append((config, home)))
    monkeypatch.setattr(rlhf.ppo, 'run', lambda config, home: runs.append((config, home)))

    def answer(config, model, file):
        worse = answers(['3 + 2 = 5.'], [HARM], [0.0, 0.0])
        return worse if model == 'sft' else answers(['3 + 2 = 5.'], [REFUSAL], [1.0, 1.0])

    monkeypatch.setattr(rlhf, 'answer', answer)
    config = RlhfConfig(init_from='sft', base='base', rewards=RewardsConfig('help', 'safe'), versions=3)
    rlhf.run(config, tmp_path)
    v1, v2, v3 = (str(tmp_path / name) for name in ('v1', 'v2', 'v3/rs'))
    assert [home for _, home in rounds] == [v1, v2, v3]
    assert [round_.sample_from for round_, _ in rounds] == ['sft', f'{v1}/model', f'{v2}/model']
    assert [round_.earlier for round_, _ in rounds] == [(), (v1,), (v1, v2)]
    assert {round_.sft.init_from for round_, _ in rounds} == {'base'} and len({round_.seed for round_, _ in rounds}) == 3
    [(last, home)] = runs
    assert (last.init_from, home) == (f'{v3}/model', str(tmp_path / 'v3/ppo')) and last.rewards == config.rewards
    rows = json.loads((tmp_path / 'versions.json').read_text())
    assert list(rows) == ['SFT', 'RLHF-v1', 'RLHF-v2', 'RLHF-v3 (no PPO)', 'RLHF-v3 (with PPO)']
    assert rows['RLHF-v1']['harmlessness wins, oracle'] == [1.0, 0.0] and rows['SFT']['violations'] == [1.0, 0.0]
    assert '| RLHF-v3 (with PPO) | 100.0 ± 0.0 |' in (tmp_path / 'versions.md').read_text()
    assert (tmp_path / 'versions.png').stat().st_size > 5000
    (tmp_path / 'v1').mkdir()
    with pytest.raises(UserError, match='belongs to a run with versions=3, and this one has versions=2'):
        rlhf.run(dataclasses.replace(config, versions=2), tmp_path)
