"""Rewards: one model alone, functions of one's own, and the verifiable ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from random_policy import make_home

import llama2_jax.toy as toy
from llama2_jax.config import UserError
from llama2_jax.data.dialogs import DialogConfig
from llama2_jax.data.prompts import PromptConfig, PromptData, read_prompt
from llama2_jax.data.sources import read_records
from llama2_jax.evals import sandbox
from llama2_jax.inference.engine import Sample
from llama2_jax.rl import ppo, rejection, rewards
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.rl.rejection import RejectionConfig
from llama2_jax.rl.rewards import RewardsConfig, open_rewards
from llama2_jax.rl.rollout import read_rollouts
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.metrics import read_metrics
from llama2_jax.train.optimizer import OptimizerConfig

FUNCTIONS = """
import time

def fives(prompts, answers, rows):
    assert [len(prompts), len(answers)] == [len(rows)] * 2 and all(prompt[-1]['role'] == 'user' for prompt in prompts)
    return [row['wanted'] + len(answer) / 10 for answer, row in zip(answers, rows)]

def few(prompts, answers, rows):
    return [1.0]

def table(prompts, answers, rows):
    return [[1.0]] * len(rows)

def missing(prompts, answers, rows):
    return [None] * len(rows)

def words(prompts, answers, rows):
    return ['good'] * len(rows)

def fails(prompts, answers, rows):
    return [row['absent'] for row in rows]

def leaves(prompts, answers, rows):
    raise SystemExit(3)

def sleeps(prompts, answers, rows):
    time.sleep(60)

number = 3
"""
pytestmark = pytest.mark.usefixtures('one_device', 'compiled_once', 'mesh')


@pytest.fixture(scope='module')
def home(tmp_path_factory, one_device):
    questions = [f'What is {a} and {b}?' for a in range(8) for b in range(4)]
    rows = [
        {'messages': [{'role': 'user', 'content': text}], 'is_safety': i % 5 == 0, 'wanted': i}
        for i, text in enumerate(questions)
    ]
    home = make_home(tmp_path_factory.mktemp('rewards'), rows)
    (home / 'mine.py').write_text(FUNCTIONS)
    return home


def policy_config(home, **changes):
    settings = {
        'init_from': str(home / 'policy'),
        'prompts': PromptConfig(mixture=f'jsonl:{home}/prompts.jsonl', heldout=0.2, longest=40),
        'optimizer': OptimizerConfig(peak_lr=1e-3, warmup_steps=0),
        'value_optimizer': OptimizerConfig(peak_lr=1e-3, warmup_steps=0),
        'iterations': 1,
        'batch_size': 8,
        'minibatch_size': 4,
        'max_new_tokens': 8,
        'decode_batch': 8,
        'eval_prompts': 4,
    }
    return PPOConfig(**(settings | changes))


def scored(home, config, answers=('Seven.', 'No.')):
    """Rollouts of an answer to each of the first prompts."""
    tokenizer = Tokenizer(home / 'tokenizer.model')
    data = PromptData(PromptConfig(f'jsonl:{home}/prompts.jsonl', heldout=0.2), tokenizer, batch_size=len(answers), seed=0)
    samples = [Sample(text, [5, 2], [-0.1, -0.2], 'eos') for text in answers]
    return open_rewards(config, tokenizer)(zip(data.batch(0), samples, strict=True))


def test_one_model_is_the_score_and_a_function_is_added_to_it(home):
    both = scored(home, RewardsConfig(str(home / 'help'), str(home / 'safe')))
    for name, config in (
        ('helpfulness', RewardsConfig(helpfulness=str(home / 'help'))),
        ('safety', RewardsConfig(safety=str(home / 'safe'))),
    ):
        alone = scored(home, config)
        assert [one.score for one in alone] == [getattr(one, name) for one in both]
        assert {one.gated for one in alone} == {name == 'safety'}
        assert {one.function for one in alone} == {None}
    function = scored(home, RewardsConfig(function=f'{home}/mine.py:fives', batch_size=1))
    assert [one.score for one in function] == pytest.approx(
        [one.prompt.row['wanted'] + len(text) / 10 for one, text in zip(function, ('Seven.', 'No.'), strict=True)]
    )
    beside = scored(home, RewardsConfig(str(home / 'help'), function=f'{home}/mine.py:fives'))
    sums = [one.score + other.helpfulness for one, other in zip(function, both, strict=True)]
    assert [one.score for one in beside] == pytest.approx(sums)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('few', r'mine\.py:few .*\(1,\) for 2'),
        ('table', r'mine\.py:table .*\(2, 1\) for 2'),
        ('missing', r'nan .*prompts\.jsonl:\d+.*Seven'),
        ('words', r'mine\.py:words .*good'),
        ('fails', r"KeyError at mine\.py:\d+: 'absent'"),
        ('leaves', r'SystemExit at mine\.py'),
        ('sleeps', r'mine\.py:sleeps .*0\.2 s for 2'),
    ],
)
def test_what_a_function_returns_is_checked(home, name, message):
    with pytest.raises(UserError, match=message):
        scored(home, RewardsConfig(function=f'{home}/mine.py:{name}', function_seconds=0.2))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({}, r'rewards\.helpfulness .*rewards\.function'),
        ({'function': 'nowhere.py:f'}, r'no file nowhere\.py'),
        ({'function': 'HOME/mine.py:fivse'}, r"no function 'fivse'.*fives"),
        ({'function': 'HOME/mine.py:number'}, r"no function 'number'"),
        ({'function': 'HOME/prompts.jsonl:f'}, r'prompts\.jsonl .*\.py'),
        ({'function': 'HOME/broken.py:f'}, r'broken\.py .*SyntaxError'),
        ({'function': 'gsm'}, 'gsm8k'),
        ({'function': 'humaneval'}, 'run_generated_code'),
    ],
)
def test_what_is_named_is_checked_before_the_run(home, tmp_path, given, message):
    (home / 'broken.py').write_text('def f(:')
    config = RewardsConfig(**{name: value.replace('HOME', str(home)) for name, value in given.items()})
    for run, stage in ((ppo.run, policy_config(home, rewards=config)), (rejection.run, round_of(home, config))):
        with pytest.raises(UserError, match=message):
            run(stage, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def round_of(home, config):
    return RejectionConfig(
        sample_from=str(home / 'policy'),
        rewards=config,
        prompts=PromptConfig(mixture=f'jsonl:{home}/prompts.jsonl', heldout=0.2, longest=40),
        count=12,
        samples=2,
        temperatures=(1.0,),
        max_new_tokens=8,
        decode_batch=8,
        sft=SftConfig(
            init_from=str(home / 'policy'),
            data=DialogConfig(mixture='', heldout=0.0),
            optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=0),
            loop=LoopConfig(eval_every=0, sample_every=0),
            batch_size=8,
            length=63,
        ),
    )


def test_rejection_sampling_with_one_reward_model(home, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection.sft, 'run_within', lambda *_: None)
    rejection.run(round_of(home, RewardsConfig(helpfulness=str(home / 'help'), missing_eos_penalty=0.0)), tmp_path / 'rs')
    rollouts = read_rollouts(tmp_path / 'rs/samples/00000.jsonl')
    assert len(rollouts) == 24 and all(one.score == one.helpfulness and one.safety is None for one in rollouts)
    for rollout, _ in rejection.read_choices(tmp_path / 'rs/choices.jsonl'):
        mine = [one for one in rollouts if one.prompt == rollout.prompt and one.ended]
        assert rollout.score == max(one.score for one in mine)


@pytest.mark.parametrize('advantages', ['gae', 'grpo'])
def test_ppo_with_a_function_alone(home, tmp_path, advantages):
    config = RewardsConfig(function=f'{home}/mine.py:fives', missing_eos_penalty=0.5)
    ppo.run(policy_config(home, rewards=config, advantages=advantages, samples=4), tmp_path / 'ppo')
    rollouts = read_rollouts(tmp_path / 'ppo/rollouts/000001.jsonl')
    for one in rollouts:
        assert one.helpfulness is None and one.safety is None
        assert one.function == pytest.approx(one.prompt.row['wanted'] + len(one.text.strip()) / 10)
        assert one.score == pytest.approx(one.function - 0.5 * (not one.ended))
    line = read_metrics(tmp_path / 'ppo/metrics.jsonl')[1]
    assert line['function'] == pytest.approx(np.mean([one.function for one in rollouts]))
    assert 'helpfulness' not in line and ('value' in line) == (advantages == 'gae')
    if advantages == 'gae':
        assert line['value'] == 0  # the policy's trunk under a head of zeros
    (home / 'mine.py').write_text(FUNCTIONS + '\n')
    with pytest.raises(UserError, match=r'rewards\.function=.*mine\.py:fives'):  # another file than the run began with
        ppo.run(policy_config(home, rewards=config, advantages=advantages, samples=4, iterations=2), tmp_path / 'ppo')
    (home / 'mine.py').write_text(FUNCTIONS)


def test_gsm8k_reads_the_numbers_of_its_rows(home, tmp_path):
    rows = [{'question': f'How much is {n} times 4?', 'answer': f'{n} * 4 = {4 * n}\n#### {4 * n:,}'} for n in (2, 300, 7)]
    (tmp_path / 'gsm8k.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    tokenizer = Tokenizer(home / 'tokenizer.model')
    prompts = [read_prompt(record, tokenizer) for record in read_records(f'jsonl:{tmp_path}/gsm8k.jsonl')]
    assert [prompt.messages[-1]['content'] for prompt in prompts] == [row['question'] for row in rows]
    found = [prompt.row for prompt in prompts]
    answers = ['So it is 8.', 'The answer is 1200.', 'The answer is 27.']
    assert rewards.gsm8k([], answers, found) == [1, 1, 0]
    with pytest.raises(UserError, match="'answer'"):
        rewards.gsm8k([], ['8'], [{'wanted': 3}])


@pytest.mark.skipif(bool(sandbox.weaknesses()), reason='no whole sandbox here')
def test_humaneval_runs_the_tests_of_its_rows(home):
    head = 'def double(x):\n    """Twice x."""\n'
    row = {'prompt': head, 'entry_point': 'double', 'test': 'def check(f):\n    assert f(3) == 6\n'}
    answers = ['    return 2 * x\n', '    return x\n', f'```python\n{head}    return x + x\n```']
    function = rewards.open_function(RewardsConfig(function='humaneval', run_generated_code=True))
    assert function([[]] * 3, answers, [row] * 3) == [1, 0, 1]


def test_the_toy_oracle_prefers_its_own_answers():
    rows = [row for row, _ in zip(toy.RECORDS['dialogs'](), range(20), strict=False)]
    prompts, answers = [row['messages'][:-1] for row in rows], [row['messages'][-1]['content'] for row in rows]
    right, wrong = (np.mean(rewards.toy(prompts, some, [{}] * 20)) for some in (answers, ['I like hats.'] * 20))
    assert right > 0.9 and wrong < 0.5


def test_no_toy_model_is_trained_where_a_reward_is_given(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / 'experiments'))
    import rejection_sampling

    monkeypatch.setattr(rejection_sampling.reward_model, 'run', lambda *_: pytest.fail('trained'))
    for given in (RewardsConfig(helpfulness='rm'), RewardsConfig(safety='rm'), RewardsConfig(function='toy')):
        for mixture in ('toy:prompts', 'jsonl:mine.jsonl', 'toy:prompts, jsonl:mine.jsonl'):
            found = rejection_sampling.train_missing_models('sft', given, PromptConfig(mixture), Path('home'))
            assert found == ('sft', given)
    nothing = RewardsConfig()
    found = rejection_sampling.train_missing_models('', nothing, PromptConfig('toy:prompts, jsonl:mine.jsonl'), Path('home'))
    assert found == ('', nothing)


def test_the_function_of_the_docs_runs(tmp_path):
    page = (Path(__file__).parents[2] / 'docs/rewards_and_dpo.md').read_text()
    (tmp_path / 'my_rewards.py').write_text(page.split('```py\n')[1].split('```')[0])
    function = rewards.open_function(RewardsConfig(function=f'{tmp_path}/my_rewards.py:short_and_polite'))
    assert function([[], []], ['Please sit.', 'Sit!'], [{}, {}]) == pytest.approx([0.989, -0.004])
