"""DPO: loss and gradients as TRL's formulas have them in torch, on any mesh; the reference computed once; runs that resume."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface import to_theirs

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import open_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.data.preferences import PreferenceConfig
from llama2_jax.mesh import MeshConfig, make_mesh
from llama2_jax.model.llama import CPU, Llama
from llama2_jax.ops.ranking import dpo_loss, ipo_loss
from llama2_jax.stages import dpo
from llama2_jax.stages.dpo import DpoConfig, DpoData
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.train.devices import to_mesh
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.metrics import read_metrics
from llama2_jax.train.optimizer import OptimizerConfig

SHAPE = ModelConfig(vocab_size=290, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=96)
KINDS = [{}, {'label_smoothing': 0.2, 'beta': 0.5}, {'loss': 'ipo', 'beta': 0.2}]
pytestmark = pytest.mark.usefixtures('mesh')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A model directory `chat` with random weights, and `pairs.jsonl`, some of which have an answer in their prompt."""
    home, rows = tmp_path_factory.mktemp('dpo'), []
    for a in range(12):
        for b in range(5):
            prompt = [{'role': 'user', 'content': f'What is {a} and {b}?'}]
            if a % 3 == 0:
                prompt = [{'role': 'user', 'content': f'Hi {b}!'}, {'role': 'assistant', 'content': 'Yes?'}, *prompt]
            rows.append({'prompt': prompt, 'chosen': f'It is {a + b}.', 'rejected': ('I do not know.', 'No.')[b % 2]})
    (home / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    texts = [text for row in rows for text in (row['prompt'][-1]['content'], row['chosen'], row['rejected'])]
    tokenizer = train_tokenizer(texts * 2, home / 'tokenizer.model', SHAPE.vocab_size)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        save_model(home / 'chat', Llama(SHAPE, jax.random.key(0)), tokenizer, {'stage': 'test', 'parent': None, 'step': 0})
    return home, tokenizer


def config(home, **changes):
    settings = {
        'init_from': str(home / 'chat'),
        'data': PreferenceConfig(mixture=f'jsonl:{home}/pairs.jsonl', heldout=0.2, epochs=4),
        'optimizer': OptimizerConfig(peak_lr=3e-3, warmup_steps=1),
        'loop': LoopConfig(log_every=1, eval_every=8, sample_every=0, checkpoint_every=8),
        'batch_size': 8,
        'length': 192,
        'prompts': (),
    }
    return DpoConfig(**(settings | changes))


def data_of(home, tokenizer, **changes):
    settings = {'length': 192, 'context': 96, 'batch_size': 8, 'seed': 0, 'answers': True}
    data = DpoData(PreferenceConfig(f'jsonl:{home}/pairs.jsonl', heldout=0), tokenizer, **(settings | changes))
    data.reference = np.random.default_rng(0).normal(-20, 3, (data.count, 2)).astype(np.float32)
    return data


def texts_of(batch):
    """Of each pair the slot, and ids and mask of both answers."""
    for slot in zip(*np.nonzero(batch['weights']), strict=True):
        row = slot[0]
        inside = [batch['segment_ids'][row] == batch['segment_ids'][row, end] for end in batch['last'][slot]]
        yield slot, [(batch['tokens'][row][here], batch['answer'][row][here]) for here in inside]


def of_trl(torch, policy, reference, lengths, some):
    """The loss of a pair, as `DPOTrainer.dpo_loss` writes it; `ipo` takes means over tokens, as its `concatenated_forward`."""
    if some.loss == 'ipo':
        policy, reference = policy / lengths, reference / lengths
    logits = (policy[0] - policy[1]) - (reference[0] - reference[1])
    if some.loss == 'ipo':
        return (logits - 1 / (2 * some.beta)) ** 2
    sigmoid = torch.nn.functional.logsigmoid
    smoothing = some.label_smoothing
    return -sigmoid(some.beta * logits) * (1 - smoothing) - sigmoid(-some.beta * logits) * smoothing


def test_answers_are_what_is_learned_from(home):
    home, tokenizer = home
    batch = next(data_of(home, tokenizer).train())
    assert not {'rating', 'safe', 'numbers'} & batch.keys() and batch['reference'].dtype == np.float32
    found = list(texts_of(batch))
    assert len(found) == 8
    for _, texts in found:
        for ids, mask in texts:
            prompt, answer = tokenizer.decode(ids[~mask].tolist()), tokenizer.decode(ids[mask].tolist())
            assert prompt.rstrip().endswith('[/INST]') and '?' in prompt and ids[-1] == tokenizer.eos_id and mask[-1]
            assert answer.strip().startswith(('It is', 'I do not know.', 'No.'))
            first = int(np.argmax(mask))
            assert mask[first:].all()  # what the assistant said in the prompt is none of it
    assert any('Yes?' in tokenizer.decode(ids[~mask].tolist()) for _, texts in found for ids, mask in texts)


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_loss_and_gradients_are_those_of_trl_in_torch(home, tmp_path, mesh, kind):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    home, tokenizer = home
    some, batch, data = config(home, **kind), None, data_of(home, tokenizer)
    batch = next(data.train())
    model = Llama(SHAPE, jax.random.key(3))
    save_model(tmp_path / 'model', model, tokenizer, {})
    convert(open_model(tmp_path / 'model'), tmp_path / 'hf', 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval()
    total, ours = 0, jax.jit(partial(dpo.answer_log_probs, CPU))(model, to_mesh(batch, mesh))
    for slot, texts in texts_of(batch):
        policy, lengths = [], []
        for ids, mask in texts:
            ids, mask = torch.tensor(ids[None].astype(np.int64)), torch.tensor(mask[None])
            logprobs = theirs(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            policy.append((logprobs * mask[:, 1:]).sum())
            lengths.append(mask.sum())
        policy, lengths = torch.stack(policy), torch.stack(lengths)
        np.testing.assert_allclose(np.asarray(ours[0])[slot], policy.detach(), rtol=0, atol=1e-4)
        assert np.asarray(ours[1])[slot].tolist() == lengths.tolist()
        total = total + of_trl(torch, policy, torch.tensor(batch['reference'][slot]), lengths, some)
    (total / 8).backward()

    def loss(model, batch):
        return (dpo.pair_losses(some, CPU, model, batch)[0] * batch['weights']).sum() / 8

    value, gradients = jax.jit(jax.value_and_grad(loss))(model, to_mesh(batch, mesh))
    assert float(value) == pytest.approx(total.item() / 8, abs=1e-5, rel=1e-5)
    named, largest = dict(theirs.named_parameters()), 0.0
    for name, gradient in to_theirs(gradients).items():
        expected = named[name].grad.numpy()
        largest = max(largest, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert largest > 1e-2


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_losses_of_numbers_are_those_of_trl(kind):
    torch = pytest.importorskip('torch')
    some, rng = DpoConfig(**kind), np.random.default_rng(1)
    policy, reference = rng.normal(-20, 8, (2, 50, 2)).astype(np.float32)
    lengths = rng.integers(1, 30, (50, 2)).astype(np.float32)

    def ours(policy):
        if some.loss == 'ipo':
            return ipo_loss(policy, jnp.array(reference), jnp.array(lengths), some.beta).sum()
        return dpo_loss(policy, jnp.array(reference), some.beta, some.label_smoothing).sum()

    value, gradient = jax.value_and_grad(ours)(jnp.array(policy))
    there = torch.tensor(policy.T, requires_grad=True)
    loss = of_trl(torch, there, torch.tensor(reference.T), torch.tensor(lengths.T), some).sum()
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, there.grad.numpy().T, rtol=1e-5, atol=1e-5)


def test_no_cut_over_devices_or_microbatches_changes_a_step(home):
    home, tokenizer = home
    batch, seen = next(data_of(home, tokenizer, shards=8).train()), []
    for mesh, accumulation in ((MeshConfig(fsdp=1), 1), (MeshConfig(fsdp=2, sequence=2, tensor=2), 2)):
        some = config(home, accumulation=accumulation)
        count = int(np.prod(dataclasses.astuple(mesh)))
        with jax.set_mesh(make_mesh(mesh, jax.devices()[:count])) as _:
            placed = to_mesh(batch, jax.sharding.get_mesh())
            _, step = dpo.build(some, SHAPE, CPU, 10)
            optimizer = dpo.make_optimizer(some.optimizer, 10)
            params = dpo.load_model(some.init_from, 'float32')[0]
            reference = np.asarray(dpo.reference_log_probs(CPU, accumulation)(params, placed))
            state, metrics = step(jax.jit(partial(dpo.init_state, optimizer=optimizer))(params), placed)
            moments = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state)]
            seen.append((float(metrics['loss']), float(metrics['grad_norm']), reference, moments))
    (loss, norm, reference, moments), other = seen
    assert other[0] == pytest.approx(loss, abs=1e-5) and other[1] == pytest.approx(norm, rel=1e-4)
    here = batch['weights'] > 0
    np.testing.assert_allclose(other[2][here], reference[here], rtol=0, atol=1e-4)
    for ours, theirs in zip(other[3], moments, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_run_learns_and_resumes_bit_for_bit(home, tmp_path, monkeypatch):
    home, _ = home
    some = config(home)
    state = dpo.run(some, tmp_path / 'run')
    lines = read_metrics(tmp_path / 'run/metrics.jsonl')
    last = lines[-1]
    assert lines[0]['loss'] == pytest.approx(np.log(2), abs=1e-4)  # the policy is the reference
    assert last['step'] == len(lines) == int(state.step) >= 20
    assert last['heldout/accuracy'] == 1.0 and last['heldout/loss'] < 0.2
    assert last['rewards/chosen'] > last['rewards/rejected'] + 1
    assert json.loads((tmp_path / 'run/model/config.json').read_text())['provenance']['stage'] == 'dpo'

    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    shutil.rmtree(tmp_path / f'again/checkpoints/{len(lines)}')
    monkeypatch.setattr(dpo, 'reference_log_probs', lambda *_: pytest.fail('computed again'))
    again = dpo.run(some, tmp_path / 'again')
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'init_from': ''}, 'init_from= names no model'),
        ({'init_from': '7b'}, 'init_from=7b is a size'),
        ({'mesh': MeshConfig(tensor=8)}, r'model\.heads=4 .* 8 devices'),
        ({'data': PreferenceConfig(mixture='toy:dialogs')}, 'no known format of preferences'),
    ],
)
def test_mistakes_are_named(home, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        dpo.run(config(home[0], **changes), tmp_path / 'run')
    assert not (tmp_path / 'run/reference.npy').exists()


def test_a_dry_run_needs_no_data(home):
    report = dpo.dry_run(DpoConfig(init_from='tiny', data=PreferenceConfig('jsonl:nowhere.jsonl'), batch_size=8, length=64), None)
    assert report.tokens == 8 * 64
