"""Rejection sampling on small random models: files, choices, resuming; alarms and the toy world's figures beside it."""

import dataclasses
import json

import numpy as np
import pytest
from random_policy import make_home

from llama2_jax.config import UserError
from llama2_jax.data.dialogs import DialogConfig, DialogData
from llama2_jax.data.prompts import Prompt, PromptConfig
from llama2_jax.evals.multi_turn import usable
from llama2_jax.rl import rejection
from llama2_jax.rl.monitors import alarms
from llama2_jax.rl.rejection import RejectionConfig, RewardsByN, read_choices
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.rl.rollout import Rollout, read_rollouts, write_rollouts
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

QUESTIONS = [f'What is {a} and {b}?' for a in range(5) for b in range(4)]


pytestmark = pytest.mark.usefixtures('one_device', 'compiled_once', 'mesh')


@pytest.fixture(scope='module')
def home(tmp_path_factory, one_device):
    rows = [{'messages': [{'role': 'user', 'content': text}]} for text in QUESTIONS * 2]
    return make_home(tmp_path_factory.mktemp('rs'), rows, eos=6.0)


def config(home, **changes):
    settings = {
        'sample_from': str(home / 'policy'),
        'rewards': RewardsConfig(helpfulness=str(home / 'help'), safety=str(home / 'safe'), batch_size=16),
        'prompts': PromptConfig(mixture=f'jsonl:{home}/prompts.jsonl', heldout=0.3, longest=40),
        'samples': 4,
        'temperatures': (0.5, 1.0),
        'tune_prompts': 2,
        'max_new_tokens': 16,
        'decode_batch': 16,
        'sft': SftConfig(
            init_from=str(home / 'policy'),
            data=DialogConfig(mixture='', heldout=0.0),
            optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0),
            loop=LoopConfig(eval_every=0, sample_every=0),
            batch_size=8,
            length=63,
        ),
    }
    return RejectionConfig(**(settings | changes))


def test_a_round_and_another_that_remembers_it(home, tmp_path, monkeypatch):
    first, some = tmp_path / 'v1', config(home)
    draws = []
    draw = rejection.draw
    monkeypatch.setattr(rejection, 'draw', lambda *given: draws.append(given[-1]) or draw(*given))
    monkeypatch.setattr(rejection, 'FILE_PROMPTS', 5)
    rejection.run(some, first)
    grid = json.loads((first / 'temperature.json').read_text())
    assert grid['mean_best_score'].keys() == {'0.5', '1.0'} and str(grid['chosen']) in grid['mean_best_score']
    assert draws[:2] == ['0 tune'] * 2 and len(draws) > 4

    files = sorted((first / 'samples').glob('*.jsonl'))
    rollouts = [rollout for file in files for rollout in read_rollouts(file)]
    by_prompt: dict = {}
    for rollout in rollouts:
        by_prompt.setdefault(json.dumps(rollout.prompt.messages), []).append(rollout)
    assert len(by_prompt) < len(QUESTIONS) and all(len(group) == 4 for group in by_prompt.values())  # each different one once
    choices = list(read_choices(first / 'choices.jsonl'))
    for rollout, source in choices:
        group = [one for one in by_prompt[json.dumps(rollout.prompt.messages)] if usable(one)]
        assert rollout.score == max(one.score for one in group) and source == 'this round'
    # What was drawn is trained on, also where the same text would be encoded otherwise; what is no text is not chosen.
    tokenizer = Tokenizer(home / 'tokenizer.model')
    data = DialogData(DialogConfig(f'jsonl:{first}/choices.jsonl', heldout=0.0), tokenizer, length=63, batch_size=1, seed=0)
    trained = [
        batch['tokens'][0][batch['trained'][0] & (batch['segment_ids'][0] == segment)].tolist()
        for batch in data.train()
        for segment in range(1, batch['segment_ids'].max() + 1)
    ]
    assert sorted(trained) == sorted([rollout.token_ids for rollout, _ in choices] * 2)
    again = [tokenizer.encode(f'{rollout.text.strip()} ', bos=False, eos=True) for rollout, _ in choices]
    assert any(ids != rollout.token_ids for ids, (rollout, _) in zip(again, choices, strict=True))
    assert any('\ufffd' in rollout.text for rollout in rollouts) and not any('\ufffd' in one.text for one, _ in choices)

    table = json.loads((first / 'rewards_by_n.json').read_text())
    scores = np.array([[one.score for one in group] for group in by_prompt.values()])
    assert [row['n'] for row in table] == [1, 2, 3, 4]
    assert table[3]['max'] == pytest.approx(scores.max(1).mean()) and table[2]['median'] == pytest.approx(
        np.median(scores[:, :3], 1).mean()
    )
    assert (first / 'rewards_by_n.png').exists() and (first / 'model/params').is_dir()
    dialog = json.loads((first / 'choices.jsonl').read_text().splitlines()[0])['messages']
    assert [message['role'] for message in dialog] == ['user', 'assistant']

    # What is sampled is not sampled again; a file that is missing is, and comes out the same.
    kept = read_rollouts(files[-1])
    for file in (files[-1], first / 'choices.jsonl'):
        file.unlink()
    draws.clear()
    rejection.run(some, first)
    assert len(draws) == 1
    for ours, theirs in zip(read_rollouts(files[-1]), kept, strict=True):  # but for rounding: the cache held other prompts
        assert ours.token_ids == theirs.token_ids and ours.score == pytest.approx(theirs.score, abs=1e-5)
    assert [one.token_ids for one, _ in read_choices(first / 'choices.jsonl')] == [one.token_ids for one, _ in choices]

    rejection.run(dataclasses.replace(some, earlier=(str(first),), temperatures=(0.5,), count=3, seed=1), tmp_path / 'v2')
    second = list(read_choices(tmp_path / 'v2/choices.jsonl'))
    assert 'an earlier round' in {source for _, source in second}
    before = {json.dumps(rollout.prompt.messages): rollout.score for rollout, _ in choices}
    assert len(second) >= len(before)
    for rollout, _ in second:  # never worse than before
        assert rollout.score >= before.get(json.dumps(rollout.prompt.messages), -np.inf) - 1e-6


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'sample_from': '70b'}, 'sample_from=70b is a size, which is enough for --dry_run only: give a model directory'),
        ({'earlier': ('nowhere',)}, 'earlier=nowhere: there is no choices.jsonl'),
        ({'sft': OptimizerConfig(warmup_steps=1)}, r'sft\.optimizer\.warmup_steps=1 .* 1 steps.* 2 dialogs'),
        ({'rewards': RewardsConfig(helpfulness='policy', safety='safe')}, r'rewards\.helpfulness=.*language model'),
    ],
)
def test_mistakes_are_named(home, tmp_path, changes, message):
    if 'rewards' in changes:
        changes = {'rewards': RewardsConfig(helpfulness=str(home / 'policy'), safety=str(home / 'safe'))}
    if 'sft' in changes:
        changes = {'sft': dataclasses.replace(config(home).sft, optimizer=changes['sft'])}
    with pytest.raises(UserError, match=message):
        rejection.run(config(home, count=2, **changes), tmp_path / 'run')
    assert not (tmp_path / 'run/samples').exists() and not (tmp_path / 'run/temperature.json').exists()


def rollout(score, text='It is.', number=0):
    prompt = Prompt([{'role': 'user', 'content': f'Q{number}\u2028?'}], [1, 5], True, 'x', 'a.jsonl:1')
    return Rollout(prompt, text, [7, 2], [-0.1, np.float32(-1 / 3).item()], 'eos', 0.1, 0.2, True, score)


def test_a_file_of_rollouts_is_read_exactly(tmp_path):
    rollouts = [rollout(np.float32(1 / 3).item(), text='one\u2028line | "two"\nthree', number=i) for i in range(3)]
    write_rollouts(tmp_path / 'x' / 'a.jsonl', rollouts)
    assert read_rollouts(tmp_path / 'x' / 'a.jsonl') == rollouts
    (tmp_path / 'bad.jsonl').write_text('{"prompt": 3}\n')
    with pytest.raises(UserError, match=r'bad.jsonl is damaged .*: remove it'):
        read_rollouts(tmp_path / 'bad.jsonl')


def test_rewards_by_n_by_hand():
    curve = RewardsByN(3)
    curve.add([1, 3, 2])
    curve.add([4, 0, 8])
    assert curve.rows() == [
        {'n': 1, 'max': 2.5, 'median': 2.5},
        {'n': 2, 'max': 3.5, 'median': 2.0},
        {'n': 3, 'max': 5.5, 'median': 3.0},
    ]


def test_alarms():
    fine = {'step': 1, 'kl': 0.5, 'kl_error': 0.1, 'first_ratio_error': 1e-6, 'entropy': 2.0, 'length': 10.0, 'eos': 1.0}
    assert alarms([fine], 'float32') == [] == alarms([fine, fine | {'kl': -0.2}], 'float32')
    assert 'KL is -0.400' in alarms([fine, fine | {'kl': -0.4}], 'float32')[0]
    assert 'off by 0.01' in alarms([fine | {'first_ratio_error': 0.01}], 'float32')[0]
    assert alarms([fine | {'first_ratio_error': 0.01}], 'bfloat16') == []
    for name, what in (('entropy', 'entropy'), ('length', 'length'), ('eos', 'share of answers that end')):
        assert what in alarms([fine, fine | {name: fine[name] / 6}], 'float32')[0]
    held = {'heldout/score': 0.0, 'heldout/score_error': 0.1, 'heldout/judge': 0.6, 'heldout/judge_error': 0.02}
    start, risen = {'step': 0} | held, {'heldout/score': 1.0, 'heldout/judge': 0.5}
    assert alarms([start, fine | held | {'heldout/score': 1.0}], 'float32') == []
    found = alarms([start, fine | held | risen], 'float32')
    assert 'reward hacking: since iteration 0 the held-out score rose from 0.000 to 1.000' in found[0]
    assert alarms([start, fine | held | {'heldout/judge': 0.5}], 'float32') == []  # both have fallen: no hacking
