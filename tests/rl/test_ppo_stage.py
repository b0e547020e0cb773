"""PPO on small random models: what holds before the first step, resuming, its files, its mistakes."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from random_policy import DEVICES, make_home

from llama2_jax.checkpoints.load import load_model
from llama2_jax.config import UserError
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.mesh import MeshConfig
from llama2_jax.model.lora import LoraConfig
from llama2_jax.rl import ppo, rollout
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.rl.rollout import read_rollouts
from llama2_jax.train.metrics import read_metrics
from llama2_jax.train.optimizer import OptimizerConfig

QUESTIONS = [f'What is {a} and {b}?' for a in range(10) for b in range(6)]


pytestmark = pytest.mark.usefixtures('one_device', 'compiled_once', 'mesh')


@pytest.fixture(scope='module')
def home(tmp_path_factory, one_device):
    rows = [{'messages': [{'role': 'user', 'content': text}], 'is_safety': i % 5 == 0} for i, text in enumerate(QUESTIONS)]
    return make_home(tmp_path_factory.mktemp('ppo'), rows)


def config(home, **changes):
    rate = partial(OptimizerConfig, final_lr=1.0, warmup_steps=0)
    settings = {
        'init_from': str(home / 'policy'),
        'rewards': RewardsConfig(helpfulness=str(home / 'help'), safety=str(home / 'safe'), batch_size=16),
        'prompts': PromptConfig(mixture=f'jsonl:{home}/prompts.jsonl', heldout=0.2, longest=40),
        'optimizer': rate(peak_lr=3e-3),
        'value_optimizer': rate(peak_lr=3e-3),
        'iterations': 3,
        'batch_size': 16,
        'minibatch_size': 8,
        'max_new_tokens': 17,
        'decode_batch': 16,
        'eval_every': 2,
        'eval_prompts': 8,
        'checkpoint_every': 1,
    }
    return PPOConfig(**(settings | changes))


def timeless(lines):
    """What of metrics does not tell the time or the machine."""
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ('seconds', 'memory_gb') and not name.startswith(('seconds/', 'tokens_per'))
        }
        for line in lines
    ]


@pytest.fixture(scope='module')
def finished(home, tmp_path_factory):
    """A run of three iterations, its config and its learners."""
    path, some = tmp_path_factory.mktemp('run'), config(home)
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    counts, iterate = [], ppo.iterate

    def counting(*arguments):
        before = len(compiled)
        result = iterate(*arguments)
        counts.append(len(compiled) - before)
        return result

    ppo.iterate = counting
    try:
        learners = ppo.run(some, path)
    finally:
        ppo.iterate = iterate
    return path, some, learners, counts


def test_before_the_first_step_nothing_has_moved(finished):
    path, *_ = finished
    first = read_metrics(path / 'metrics.jsonl')[1]
    assert first['first_ratio_error'] <= 1e-5 and first['first_clipped'] == 0
    assert abs(first['kl']) <= 1e-6 and abs(first['k3']) <= 1e-6  # nats an answer
    assert first['engine_gap'] <= 1e-5
    assert first['value'] == 0  # the value model's head begins at 0


def test_the_first_iteration_compiles_everything(finished):
    assert finished[3][0] > 0 and finished[3][1:] == [0, 0]


def test_files(finished):
    path, some, _, _ = finished
    lines = read_metrics(path / 'metrics.jsonl')
    assert [line['step'] for line in lines] == [0, 1, 2, 3]
    assert [line['step'] for line in lines if 'heldout/score' in line] == [0, 2, 3]
    assert {'score', 'helpfulness', 'safety', 'gated', 'kl', 'k3', 'entropy', 'length', 'eos', 'explained_variance'} <= lines[
        1
    ].keys()
    assert {'policy/ratio', 'policy/clipped', 'value/loss', 'memory_gb'} <= lines[1].keys()
    assert {f'tokens_per_second/{phase}' for phase in ('reshard', 'generate', 'score', 'prepare', 'update')} <= lines[1].keys()
    rollouts = read_rollouts(path / 'rollouts/000001.jsonl')
    assert len(rollouts) == 16
    for one in rollouts:
        safer = one.prompt.is_safety or one.safety < np.log(0.15 / 0.85)
        assert one.gated == safer
        penalty = 0 if one.stop_reason == 'eos' else 1
        assert one.score == pytest.approx((one.safety if safer else one.helpfulness) - penalty, abs=1e-6)
    assert (path / 'samples.md').read_text().count('## Step ') == 3
    assert (path / 'reward_kl.png').stat().st_size > 5000
    best = max((line for line in lines if 'heldout/score' in line), key=lambda line: line['heldout/score'])
    assert json.loads((path / 'model/config.json').read_text())['provenance']['step'] == best['step']


def test_killed_at_any_place_it_goes_on_bit_for_bit(finished, tmp_path, monkeypatch):
    """After the second iteration's answers, before its updates; then once more with a checkpoint missing."""
    path, some, learners, _ = finished
    expected = timeless(read_metrics(path / 'metrics.jsonl'))
    answers = [(path / f'rollouts/{number:06}.jsonl').read_bytes() for number in (1, 2, 3)]

    write, written = rollout.write_rollouts, []

    def die(where, rollouts):
        write(where, rollouts)
        written.append(where)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(rollout, 'write_rollouts', die)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(some, tmp_path / 'run')
    monkeypatch.setattr(rollout, 'write_rollouts', write)
    drawn = []
    draw = ppo.sample_and_score
    monkeypatch.setattr(ppo, 'sample_and_score', lambda *given: drawn.append(given[3]) or draw(*given))
    again = ppo.run(some, tmp_path / 'run')
    assert drawn == ['0 heldout', '0 3', '0 heldout']  # the second answers were there
    shutil.rmtree(tmp_path / 'run/checkpoints/3')
    (tmp_path / 'run/rollouts/000003.jsonl').unlink()
    once_more = ppo.run(some, tmp_path / 'run')
    for ours, theirs, those in zip(*map(jax.tree.leaves, (learners, again, once_more)), strict=True):
        assert np.array_equal(ours, theirs) and np.array_equal(ours, those)
    assert timeless(read_metrics(tmp_path / 'run/metrics.jsonl')) == expected
    assert [(tmp_path / f'run/rollouts/{number:06}.jsonl').read_bytes() for number in (1, 2, 3)] == answers
    model, _ = load_model(tmp_path / 'run/model')
    best, _ = load_model(path / 'model')
    assert np.array_equal(model.head_DV[...], best.head_DV[...])


def prepared(home, some, rollouts, change=lambda batch: batch):
    """The minibatches and figures of one batch, under the run's first learners."""
    stage = ppo.open_stage(some, home / 'prepared')
    batch = change(rollout.pad_rollouts(rollouts, some.length))
    given = stage.reference, np.float32(some.beta), ppo.to_mesh(batch, stage.mesh)
    return jax.device_get(stage.programs.prepare(ppo.initial_learners(stage), given))


def test_padding_is_known_by_length(home, finished):
    """What lies behind an answer changes nothing, EOS or anything else."""
    rollouts = read_rollouts(finished[0] / 'rollouts/000001.jsonl')

    def spoil(batch):
        row, column = np.indices(batch['tokens'].shape)
        ends = np.array([len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts])
        return batch | {'tokens': np.where(column < ends[:, None], batch['tokens'], 2).astype(np.int32)}

    plain, spoilt = prepared(home, finished[1], rollouts), prepared(home, finished[1], rollouts, spoil)
    for ours, theirs in zip(plain[0], spoilt[0], strict=True):
        for name in ('advantage', 'return', 'mask'):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
        for name in ('logprob', 'old'):
            np.testing.assert_allclose(ours[name] * ours['mask'], theirs[name] * ours['mask'], atol=1e-6)


def test_minibatches_hold_every_answer_once_in_its_place(home, finished):
    rollouts = read_rollouts(finished[0] / 'rollouts/000002.jsonl')
    minibatches, seen = prepared(home, finished[1], rollouts)
    found = set()
    for minibatch in minibatches:
        assert minibatch['targets'].shape == (8, 57)
        for targets, mask in zip(minibatch['targets'], minibatch['mask'], strict=True):
            found.add(tuple(targets[mask > 0].tolist()))
    assert found == {tuple(rollout.token_ids) for rollout in rollouts}
    advantage = np.concatenate([m['advantage'][m['mask'] > 0] for m in minibatches])
    assert advantage.mean() == pytest.approx(0, abs=1e-5) and advantage.std() == pytest.approx(1, abs=1e-4)


def test_adapters_as_the_policy(home, tmp_path, monkeypatch):
    """The reference is the policy without them; eight devices; beta is adapted."""
    monkeypatch.setattr(jax, 'devices', DEVICES)
    some = config(home, lora=LoraConfig(rank=2), iterations=2, mesh=MeshConfig(fsdp=1), kl_target=1e-3, checkpoint_every=2)
    with pytest.raises(UserError, match='mesh .* does not fit 8 devices'):
        ppo.run(some, tmp_path / 'run')
    learners = ppo.run(dataclasses.replace(some, mesh=MeshConfig(fsdp=4, tensor=2)), tmp_path / 'run')
    lines = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert lines[1]['first_ratio_error'] <= 1e-5 and abs(lines[1]['kl']) <= 1e-6 and lines[2]['k3'] > 0
    assert lines[1]['beta'] == 0.01 and lines[2]['beta'] == pytest.approx(0.01 * (1 - 0.2 * 16 / 10_000))
    assert learners.policy.params.b_q_AHK[...].shape == (1, 2, 4, 8)


@pytest.mark.parametrize('advantages', ['rloo', 'grpo'])
def test_answers_beside_each_other_need_no_value_model(home, tmp_path, monkeypatch, advantages):
    """RLOO on one device, GRPO on eight."""
    mesh = MeshConfig()
    if advantages == 'grpo':
        monkeypatch.setattr(jax, 'devices', DEVICES)
        mesh = MeshConfig(fsdp=4, tensor=2)
    some = config(home, advantages=advantages, samples=4, beta=0.5, iterations=1, checkpoint_every=1, mesh=mesh)
    ppo.run(some, tmp_path / 'run')
    [_, first] = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert first['first_ratio_error'] <= 1e-5 and 'explained_variance' not in first
    learners = ppo.run(dataclasses.replace(some, iterations=2), tmp_path / 'run')  # from a checkpoint
    assert learners.value is None and read_metrics(tmp_path / 'run/metrics.jsonl')[2]['k3'] > 0

    rollouts = read_rollouts(tmp_path / 'run/rollouts/000001.jsonl')
    asked = [json.dumps(rollout.prompt.messages) for rollout in rollouts]
    assert len(set(asked)) == 4 and asked == [prompt for prompt in asked[::4] for _ in range(4)]
    minibatches, _ = prepared(home / advantages, some, rollouts)
    score = np.array([rollout.score for rollout in rollouts])
    groups = ((score - score.mean()) / score.std()).reshape(4, 4)  # no KL before the first step
    if advantages == 'grpo':
        expected = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    else:
        expected = groups - (groups.sum(1, keepdims=True) - groups) / 3
    of = {tuple(rollout.token_ids): value for rollout, value in zip(rollouts, expected.ravel(), strict=True)}
    assert len(of) == 16
    for minibatch in minibatches:
        for targets, mask, advantage in zip(*(minibatch[name] for name in ('targets', 'mask', 'advantage')), strict=True):
            np.testing.assert_allclose(advantage, mask * of[tuple(targets[mask > 0].tolist())], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'init_from': ''}, 'init_from= names no model: give a model directory'),
        ({'batch_size': 30}, 'batch_size=30 is not a multiple of minibatch_size=8'),
        ({'samples': 3}, 'batch_size=16 is not a multiple of samples=3'),
        ({'advantages': 'grpo'}, 'advantages=grpo compares answers to a prompt: samples must be at least 2'),
        ({'max_new_tokens': 40}, r'prompts.longest=40 and max_new_tokens=40 are more than the context of init_from, 64'),
        ({'init_from': 'help'}, r'init_from=.*help: this is a reward model; give a language model'),
        (
            {'prompts': PromptConfig(mixture='toy:letters', longest=40)},
            'toy:letters holds documents, not records',
        ),
    ],
)
def test_mistakes_are_named(home, tmp_path, changes, message):
    if changes.get('init_from'):
        changes = {'init_from': str(home / changes['init_from'])}
    with pytest.raises(UserError, match=message):
        ppo.run(config(home, **changes), tmp_path / 'run')
