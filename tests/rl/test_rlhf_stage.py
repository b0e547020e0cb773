"""The loop of versions: who samples from whom and begins with what; wins by hand; the table."""

import dataclasses
import json

import pytest

from llama2_jax.config import UserError
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.prompts import Prompt
from llama2_jax.rl import versions
from llama2_jax.rl.collect import CollectConfig
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.rl.rollout import Rollout
from llama2_jax.rl.versions import RlhfConfig
from llama2_jax.stages.sft import SftConfig
from llama2_jax.toy.oracle import Oracle

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
    found = {name: value for name, (value, _) in versions.compare(after, before, Oracle()).items()}
    assert found['helpfulness wins, reward model'] == (0.5 + 1 + 0 + 0) / 4
    assert found['harmlessness wins, reward model'] == 1
    assert found['helpfulness wins, oracle'] == (0.5 + 1 + 1 + 0) / 4  # the last one is a false refusal
    assert found['harmlessness wins, oracle'] == (1 + 0.5) / 2
    assert (found['helpfulness'], found['harmlessness']) == (0.75, 1)
    assert (found['violations'], found['false refusals']) == (0, 0.25)
    same = versions.compare(before, before, None)
    assert same == {'helpfulness wins, reward model': (0.5, 0.0), 'harmlessness wins, reward model': (0.5, 0.0)}
    assert versions.table({'SFT': same}).splitlines()[-1] == '| SFT | 50.0 ± 0.0 | 50.0 ± 0.0 |'


@pytest.fixture
def called(monkeypatch):
    """What each stage of the loop is called with, (config, workdir); what the models answer."""
    calls = {name: [] for name in ('collect', 'reward', 'rejection', 'ppo', 'ghost', 'context_distillation', 'answer')}
    monkeypatch.setattr(versions, 'check', lambda config: None)  # the names here are of no models
    monkeypatch.setattr(versions.made_from, 'fingerprint', str)
    for name in ('collect', 'reward', 'rejection', 'ppo', 'ghost', 'context_distillation'):
        monkeypatch.setattr(getattr(versions, name), 'run', lambda config, home, name=name: calls[name].append((config, home)))

    def answer(config, rewards, model, file):
        calls['answer'].append(rewards)
        worse = answers(['3 + 2 = 5.'], [HARM], [0.0, 0.0])
        return worse if model == 'sft' else answers(['3 + 2 = 5.'], [REFUSAL], [1.0, 1.0])

    monkeypatch.setattr(versions, 'answer', answer)
    return calls


def test_every_version_samples_from_the_one_before_and_remembers_all(tmp_path, called):
    config = RlhfConfig(init_from='sft', base='base', rewards=RewardsConfig('help', 'safe'), versions=3)
    versions.run(config, tmp_path)
    rounds = called['rejection']
    assert not called['collect'] and not called['reward'] and {round_.rewards for round_, _ in rounds} == {config.rewards}
    v1, v2, v3 = (str(tmp_path / name) for name in ('v1', 'v2', 'v3/rs'))
    assert [home for _, home in rounds] == [v1, v2, v3]
    assert [round_.sample_from for round_, _ in rounds] == ['sft', f'{v1}/model', f'{v2}/model']
    assert [round_.earlier for round_, _ in rounds] == [(), (v1,), (v1, v2)]
    assert {round_.sft.init_from for round_, _ in rounds} == {'base'} and len({round_.seed for round_, _ in rounds}) == 3
    [(last, home)] = called['ppo']
    assert (last.init_from, home) == (f'{v3}/model', str(tmp_path / 'v3/ppo')) and last.rewards == config.rewards
    rows = json.loads((tmp_path / 'versions.json').read_text())
    assert list(rows) == ['SFT', 'RLHF-v1', 'RLHF-v2', 'RLHF-v3 (no PPO)', 'RLHF-v3 (with PPO)']
    assert rows['RLHF-v1']['harmlessness wins, oracle'] == [1.0, 0.0] and rows['SFT']['violations'] == [1.0, 0.0]
    assert '| RLHF-v3 (with PPO) | 100.0 ± 0.0 |' in (tmp_path / 'versions.md').read_text()
    assert (tmp_path / 'versions.png').stat().st_size > 5000
    (tmp_path / 'v1').mkdir()
    with pytest.raises(UserError, match='belongs to a run with versions=3, and this one has versions=2'):
        versions.run(dataclasses.replace(config, versions=2), tmp_path)


def test_the_helpfulness_model_follows_the_policy(tmp_path, called):
    config = RlhfConfig(init_from='sft', rewards=RewardsConfig('help', 'safe'), versions=2, seed=5)
    config = dataclasses.replace(config, collect=CollectConfig(prompts='toy:prompts', samples=6, raters='helpfulness'))
    versions.run(config, tmp_path)
    v1, v2 = (str(tmp_path / name) for name in ('v1', 'v2/rs'))
    assert [(asked.models, home) for asked, home in called['collect']] == [
        ((f'{home}/model',), f'{home}/preferences') for home in (v1, v2)
    ]
    assert [(learned.init_from, learned.data.mixture, home) for learned, home in called['reward']] == [
        ('help', f'jsonl:{v1}/preferences/preferences.jsonl', f'{v1}/rm-help'),
        (f'{v1}/rm-help/model', f'jsonl:{v2}/preferences/preferences.jsonl', f'{v2}/rm-help'),
    ]
    assert {made.seed for name in ('collect', 'reward') for made, _ in called[name]} == {5}
    judges = [round_.rewards.helpfulness for round_, _ in called['rejection']]
    assert judges == ['help', f'{v1}/rm-help/model']
    [(last, _)] = called['ppo']
    assert last.rewards == RewardsConfig(f'{v2}/rm-help/model', 'safe') and set(called['answer']) == {last.rewards}


def test_another_model_answers_in_place_of_the_versions(tmp_path, called):
    config = RlhfConfig(init_from='sft', rewards=RewardsConfig('help', 'safe'), versions=3, sample_from=('70b-sft', '70b-v1'))
    versions.run(config, tmp_path)
    assert [round_.sample_from for round_, _ in called['rejection']] == ['70b-sft', '70b-v1', '70b-v1']


def test_ghost_attention_and_distillation_where_the_paper_has_them(tmp_path, called):
    config = RlhfConfig(init_from='sft', base='base', rewards=RewardsConfig('help', 'safe'), ghost_after=3, distill_before=1)
    config = dataclasses.replace(
        config, rejection=dataclasses.replace(config.rejection, sft=SftConfig(data=DialogConfig('jsonl:d')))
    )
    versions.run(config, tmp_path)
    [(distilled, first)], [(haunted, third)] = called['context_distillation'], called['ghost']
    assert (first, third) == (f'{tmp_path}/v1/distill', f'{tmp_path}/v3/ghost')
    assert (distilled.model, distilled.safety, distilled.tune) == ('sft', 'safe', True)
    assert (haunted.model, haunted.tune) == (f'{tmp_path}/v3/model', True)
    rounds = [round_ for round_, _ in called['rejection']]
    assert [round_.sample_from for round_ in rounds[:2]] == [f'{first}/model', f'{tmp_path}/v1/model']
    assert rounds[3].sample_from == f'{third}/model' and {round_.sft.init_from for round_ in rounds} == {'base'}
    without, with_both = (
        f'jsonl:d, jsonl:{first}/dialogs.jsonl',
        f'jsonl:d, jsonl:{first}/dialogs.jsonl, jsonl:{third}/dialogs.jsonl',
    )
    assert [round_.sft.data.mixture for round_ in rounds] == [without] * 3 + [with_both] * 2


def test_raters_need_prompts():
    with pytest.raises(UserError, match=r'^collect\.raters=helpfulness need prompts'):
        RlhfConfig(collect=CollectConfig(raters='helpfulness'))
