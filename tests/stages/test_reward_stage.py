"""The reward-model stage: scores and losses as transformers and torch have them, packed as if alone, on any mesh; mistakes."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_with_score, open_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.data.preferences import PreferenceConfig, PreferenceData
from llama2_jax.inference.open import open_scorer
from llama2_jax.mesh import MeshConfig, make_mesh, reshard
from llama2_jax.model.llama import CPU, Llama
from llama2_jax.model.reward import ScoreModel
from llama2_jax.stages import reward
from llama2_jax.stages.reward import RewardConfig
from llama2_jax.text.dialog import encode_dialog
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.train.devices import to_mesh
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.metrics import read_metrics
from llama2_jax.train.optimizer import OptimizerConfig

SHAPE = ModelConfig(vocab_size=290, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=64)
RATINGS = ('negligibly', 'slightly', 'better', 'significantly', None)


pytestmark = pytest.mark.usefixtures('mesh')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A model directory `chat` with random weights, and `pairs.jsonl`: a sum is better than a refusal, a threat is not safe."""
    home, rows = tmp_path_factory.mktemp('reward'), []
    for a in range(12):
        for b in range(5):
            question, right = f'What is {a} and {b}?', f'It is {a + b}.'
            rejected = ('I do not know.', 'Ask me no more or else!')[(a + b) % 2]
            rating = RATINGS[(a + 2 * b) % 5]
            rows.append(
                {'prompt': [{'role': 'user', 'content': question}], 'chosen': right, 'rejected': rejected, 'rating': rating}
                | {'chosen_safe': True, 'rejected_safe': 'else' not in rejected}
            )
    (home / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    texts = [text for row in rows for text in (row['prompt'][0]['content'], row['chosen'], row['rejected'])]
    tokenizer = train_tokenizer(texts * 2, home / 'tokenizer.model', SHAPE.vocab_size)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        save_model(home / 'chat', Llama(SHAPE, jax.random.key(0)), tokenizer, {'stage': 'test', 'parent': None, 'step': 0})
    return home, tokenizer


def config(home, **changes):
    settings = {
        'init_from': str(home / 'chat'),
        'data': PreferenceConfig(mixture=f'jsonl:{home}/pairs.jsonl', heldout=0.2, epochs=4),
        'optimizer': OptimizerConfig(peak_lr=3e-3, warmup_steps=1),
        'loop': LoopConfig(log_every=1, eval_every=8, checkpoint_every=8),
        'batch_size': 8,
        'length': 128,
    }
    return RewardConfig(**(settings | changes))


def data_of(home, tokenizer, **changes):
    settings = {'length': 128, 'context': 64, 'batch_size': 8, 'seed': 0}
    return PreferenceData(PreferenceConfig(f'jsonl:{home}/pairs.jsonl', heldout=0), tokenizer, **(settings | changes))


def model_of(seed=1):
    """Random norms too, and a large head, so that scores differ much."""
    rng = np.random.default_rng(seed)
    model = ScoreModel(SHAPE, jax.random.key(seed))
    return jax.tree.map(lambda x: x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32), model)


def texts_of(batch):
    """Ids of both answers of each pair, with its slot."""
    for slot in zip(*np.nonzero(batch['weights']), strict=True):
        row = slot[0]
        yield (
            slot,
            [batch['tokens'][row][batch['segment_ids'][row] == batch['segment_ids'][row, end]] for end in batch['last'][slot]],
        )


def test_scores_and_loss_are_those_of_transformers(home, tmp_path, mesh):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    home, tokenizer = home
    model, batch = model_of(), next(data_of(home, tokenizer).train())
    save_model(tmp_path / 'rm', model, tokenizer, {})
    convert(open_model(tmp_path / 'rm'), tmp_path / 'hf', 'hf')
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'hf').eval()
    placed = to_mesh(batch, mesh)
    scores = np.asarray(jax.jit(partial(reward.pair_scores, CPU))(model, placed))
    losses, margins = [], (0, 0, 1 / 3, 2 / 3, 1)
    for slot, texts in texts_of(batch):
        there = torch.stack([theirs(torch.tensor(ids[None].astype(np.int64))).logits[0, 0] for ids in texts])
        np.testing.assert_allclose(scores[slot], there.detach(), rtol=0, atol=1e-4)
        losses.append(-torch.nn.functional.logsigmoid(there[0] - there[1] - margins[batch['rating'][slot]]))
        safe = torch.tensor(batch['safe'][slot]).float()
        losses.append(0.5 * torch.nn.functional.binary_cross_entropy_with_logits(there, safe))
    assert len(losses) == 16
    loss = jax.jit(partial(reward.comparison_loss, CPU, 'small', 0.5))(model, placed)
    assert float(loss) / 8 == pytest.approx(sum(losses).item() / 8, abs=1e-5)


def test_packed_is_alone_and_the_side_of_padding_is_nothing(home, mesh):
    home, tokenizer = home
    model, batch = model_of(), next(data_of(home, tokenizer).train())
    score = jax.jit(lambda tokens, segments: model(reshard(tokens, 'BL'), reshard(segments, 'BL')))
    packed = np.asarray(jax.jit(partial(reward.pair_scores, CPU))(model, to_mesh(batch, mesh)))
    for slot, texts in list(texts_of(batch))[:3]:
        for side, ids in enumerate(texts):
            for left in (0, 64 - len(ids)):  # padded on the right, and on the left
                here = slice(left, left + len(ids))
                tokens, segments = np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32)
                tokens[0, here], segments[0, here] = ids, 1
                assert float(score(tokens, segments)[0, here.stop - 1]) == pytest.approx(float(packed[slot][side]), abs=1e-5)


def test_no_cut_over_devices_or_microbatches_changes_a_step(home):
    home, tokenizer = home
    data = data_of(home, tokenizer, shards=8)
    batch, seen = next(data.train()), []
    for mesh, accumulation in ((MeshConfig(fsdp=1), 1), (MeshConfig(fsdp=2, sequence=2, tensor=2), 2)):
        some = config(home, safety_weight=0.5, accumulation=accumulation)
        count = int(np.prod(dataclasses.astuple(mesh)))
        with jax.set_mesh(make_mesh(mesh, jax.devices()[:count])):
            _, step = reward.build(some, SHAPE, CPU, 10)
            optimizer = reward.make_optimizer(some.optimizer, 10)
            params = load_with_score(some.init_from, some.seed)
            state, metrics = step(
                jax.jit(partial(reward.init_state, optimizer=optimizer))(params), to_mesh(batch, jax.sharding.get_mesh())
            )
            moments = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state)]
            seen.append((float(metrics['loss']), float(metrics['grad_norm']), int(metrics['pairs']), moments))
    (loss, norm, pairs, moments), other = seen
    assert pairs == other[2] == 8
    assert other[0] == pytest.approx(loss, abs=1e-5) and other[1] == pytest.approx(norm, rel=1e-4)
    for ours, theirs in zip(other[3], moments, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_run_learns_resumes_and_centers(home, tmp_path):
    home, tokenizer = home
    some = config(home, safety_weight=0.5)
    state = reward.run(some, tmp_path / 'run')
    lines = read_metrics(tmp_path / 'run/metrics.jsonl')
    last = lines[-1]
    assert last['step'] == len(lines) == int(state.step) >= 20
    assert last['heldout/accuracy'] == 1.0 and last['heldout/accuracy/significantly'] == 1.0
    assert last['heldout/loss'] < lines[0]['loss'] - 0.5 and last['pairs'] <= 8 < last['tokens']
    assert 'before' in (tmp_path / 'run/samples.md').read_text()
    provenance = json.loads((tmp_path / 'run/model/config.json').read_text())['provenance']
    scores = provenance['scores']
    assert provenance['stage'] == 'reward_model' and scores['shift'] == -scores['mean'] and scores['std'] > 0
    data = PreferenceData(some.data, tokenizer, length=128, context=64, batch_size=8, seed=0)
    chosen = [pair.ids[0] for record in data.sources[0].records for pair in record]
    with_shift = open_scorer(tmp_path / 'run/model').score(chosen)
    assert with_shift.mean() == pytest.approx(0, abs=1e-4) and with_shift.std() == pytest.approx(scores['std'], abs=1e-4)

    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    shutil.rmtree(tmp_path / f'again/checkpoints/{len(lines)}')
    again = reward.run(some, tmp_path / 'again')
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.array_equal(ours, theirs)

    (tmp_path / 'dialogs.jsonl').write_text(json.dumps({'prompt': 'What is 3 and 4?', 'completion': 'I do not know.'}))
    further = config(home, init_from=str(tmp_path / 'run/model'), reference=f'jsonl:{tmp_path}/dialogs.jsonl', center=False)
    further = dataclasses.replace(further, data=dataclasses.replace(further.data, epochs=0.5))
    reward.run(further, tmp_path / 'further')  # goes on with the reward model's own head
    first = read_metrics(tmp_path / 'further/metrics.jsonl')[0]
    assert first['loss'] < lines[0]['loss'] - 0.3
    after = open_model(tmp_path / 'further/model').provenance['scores']
    messages = [{'role': 'user', 'content': 'What is 3 and 4?'}, {'role': 'assistant', 'content': 'I do not know.'}]
    [score] = open_scorer(tmp_path / 'further/model').score([encode_dialog(messages, tokenizer)[0]])
    assert after['shift'] == 0 and after['std'] == 0 and after['mean'] == pytest.approx(float(score), abs=1e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'init_from': '7b'}, 'init_from=7b is a size, which is enough for --dry_run only'),
        ({'mesh': MeshConfig(tensor=8)}, 'model.heads=4 cannot be divided over the 8 devices'),
        ({'data': PreferenceConfig(mixture='toy:dialogs')}, 'no known format of preferences'),
        ({'optimizer': OptimizerConfig()}, 'warmup_steps=2000 must be less than the .* steps of the run'),
    ],
)
def test_mistakes_are_named(home, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        reward.run(config(home[0], **changes), tmp_path / 'run')


def test_an_auxiliary_loss_needs_labels(home, tmp_path):
    rows = [json.loads(line) for line in (home[0] / 'pairs.jsonl').read_text().splitlines()]
    bare = [{key: value for key, value in row.items() if 'safe' not in key} for row in rows]
    (tmp_path / 'bare.jsonl').write_text('\n'.join(map(json.dumps, bare)))
    data = PreferenceConfig(mixture=f'jsonl:{tmp_path}/bare.jsonl')
    with pytest.raises(UserError, match=r'safety_weight=1\.0 .*bare\.jsonl has chosen_safe'):
        reward.run(config(home[0], data=data, safety_weight=1.0), tmp_path / 'run')


def test_settings_out_of_range():
    with pytest.raises(UserError, match='safety_weight is -1'):
        RewardConfig(safety_weight=-1)
    with pytest.raises(UserError, match='length is 0'):
        RewardConfig(length=0)


def test_a_dry_run_needs_no_weights():
    report = reward.dry_run(RewardConfig(length=64, batch_size=10), None)
    assert (report.chips, report.tokens) == (8, 16 * 64)
