"""What the fine-tuning stage adds to its parts: a loss on answers alone, packed as if unpacked, its files, its mistakes."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax import toy
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.data.dialogs import DialogConfig, DialogData
from llama2_jax.inference.engine import Sample
from llama2_jax.mesh import MeshConfig, make_mesh, shard_batch
from llama2_jax.model.llama import CPU, Llama
from llama2_jax.model.lora import LoraConfig
from llama2_jax.stages import sft
from llama2_jax.stages.pretrain import split, token_loss
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.toy.answers import grade
from llama2_jax.toy.oracle import Oracle
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.metrics import read_metrics
from llama2_jax.train.optimizer import OptimizerConfig, schedule
from llama2_jax.train.step import microbatches

SHAPE = ModelConfig(vocab_size=290, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=64)
QUESTIONS = [f'What is {a} and {b}?' for a in range(10) for b in range(6)]


pytestmark = pytest.mark.usefixtures('mesh')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A model directory `base` with random weights, and `dialogs.jsonl`."""
    home = tmp_path_factory.mktemp('sft')
    rows = [{'messages': [user(text), assistant(f'It is {text[8:-1]}.')]} for text in QUESTIONS]
    (home / 'dialogs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    tokenizer = train_tokenizer(QUESTIONS * 4, home / 'tokenizer.model', SHAPE.vocab_size)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        save_model(home / 'base', Llama(SHAPE, jax.random.key(0)), tokenizer, {'stage': 'test', 'parent': None, 'step': 0})
    return home


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def config(home, **changes):
    settings = {
        'init_from': str(home / 'base'),
        'data': DialogConfig(mixture=f'jsonl:{home}/dialogs.jsonl', heldout=0.1),
        'optimizer': OptimizerConfig(peak_lr=1e-2, warmup_steps=0, warmup_share=0.1),
        'loop': LoopConfig(log_every=1, eval_every=4, sample_every=2, checkpoint_every=2),
        'batch_size': 8,
        'length': 63,
        'prompts': ('What is 3 and 4?',),
    }
    return SftConfig(**(settings | changes))


def batch_of(dialogs, length):
    """Rows of dialogs, each a list of (ids, trained)."""
    shape = (len(dialogs), length + 1)
    batch = {'tokens': np.zeros(shape, np.int32), 'segment_ids': np.zeros(shape, np.int32), 'trained': np.zeros(shape, bool)}
    for row, parts in enumerate(dialogs):
        at = 0
        for segment, (ids, trained) in enumerate(parts, 1):
            here = np.s_[row, at : at + len(ids)]
            batch['tokens'][here], batch['segment_ids'][here], batch['trained'][here] = ids, segment, trained
            at += len(ids)
    return batch


def some_dialogs(vocabulary):
    """(ids, trained) of three dialogs of random ids."""
    draw = np.random.default_rng(0)
    lengths = ((5, 7), (9, 4), (3, 6, 4, 2))  # question, answer, …
    return [
        (draw.integers(3, vocabulary, sum(parts)), np.repeat([i % 2 == 1 for i in range(len(parts))], parts)) for parts in lengths
    ]


@jax.jit
def mean_loss(model, batch):
    """Of the trained tokens."""
    parts = split(jax.tree.map(jnp.asarray, batch), mask_documents=True)
    return token_loss(CPU, model, parts) / parts['weights'].sum()


def loss_and_gradients(model, batch):
    return jax.jit(jax.value_and_grad(mean_loss))(model, batch)


def relative(ours, theirs):
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


def test_only_answers_are_targets():
    batch = batch_of([[([1, 5, 6, 7, 2], [0, 0, 0, 1, 1]), ([1, 8, 9, 2], [0, 0, 1, 1])]], 10)
    parts = split(jax.tree.map(jnp.asarray, batch), mask_documents=True)
    assert parts['targets'].tolist() == [[5, 6, 7, 2, 1, 8, 9, 2, 0, 0]]
    assert parts['weights'].tolist() == [[0, 0, 1, 1, 0, 0, 1, 1, 0, 0]]


def test_packed_is_unpacked():
    dialogs = some_dialogs(SHAPE.vocab_size)
    model = Llama(SHAPE, jax.random.key(1))
    apart, packed = batch_of([[dialog] for dialog in dialogs], 24), batch_of([dialogs], 48)

    def token_losses(batch):
        """Of the trained tokens, in the dialogs' order."""
        parts = split(jax.tree.map(jnp.asarray, batch), mask_documents=True)
        logits = jax.jit(lambda model, x, s: model.logits(model(x, s)))(model, parts['inputs'], parts['segments'])
        logs, targets = np.asarray(jax.nn.log_softmax(logits)), np.asarray(parts['targets'])
        return -np.take_along_axis(logs, targets[..., None], -1)[..., 0][np.asarray(parts['weights']) > 0]

    assert token_losses(packed).shape == (7 + 4 + 8,)
    np.testing.assert_allclose(token_losses(packed), token_losses(apart), rtol=0, atol=1e-5)
    (loss, gradients), (loss_apart, gradients_apart) = loss_and_gradients(model, packed), loss_and_gradients(model, apart)
    assert float(loss) == pytest.approx(float(loss_apart), abs=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_apart), strict=True):
        assert relative(ours, theirs) < 1e-4


def test_loss_and_gradients_are_those_of_transformers():
    """With labels of -100 for all that is not trained."""
    torch = pytest.importorskip('torch')
    pytest.importorskip('transformers')
    from huggingface import random_pair, to_theirs

    ours, theirs = random_pair(SHAPE)
    dialogs = some_dialogs(SHAPE.vocab_size)
    batch = batch_of([[dialog] for dialog in dialogs], 24)
    labels = np.where(batch['trained'], batch['tokens'], -100)
    real = torch.tensor(batch['segment_ids'] > 0)
    answer = theirs(torch.tensor(batch['tokens']).long(), attention_mask=real, labels=torch.tensor(labels).long())
    answer.loss.backward()
    loss, gradients = loss_and_gradients(ours, batch)
    assert abs(float(loss) - answer.loss.item()) < 1e-5
    gradients = to_theirs(gradients)
    for name, parameter in theirs.named_parameters():
        assert relative(gradients[name], parameter.grad.numpy()) < 1e-4, name


def test_a_run_learns_and_resumes_bit_for_bit(home, tmp_path, capsys):
    some = config(home, data=DialogConfig(mixture=f'jsonl:{home}/dialogs.jsonl', heldout=0.1, epochs=4))
    state = sft.run(some, tmp_path / 'run')
    assert 'trained  padding' in capsys.readouterr().out
    lines = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert lines[-1]['step'] == len(lines) == int(state.step) > 4
    assert lines[-1]['heldout/loss'] < lines[0]['loss'] - 1
    written = json.loads((tmp_path / 'run/model/config.json').read_text())
    assert written['provenance'] == {'stage': 'sft', 'parent': str(home / 'base'), 'step': len(lines)}
    samples = (tmp_path / 'run/samples.md').read_text()
    assert (
        '&lt;s&gt; [INST] What is ' in samples and '? [/INST]<mark> It is ' in samples and '. &lt;/s&gt;</mark></pre>' in samples
    )
    assert samples.count('**What is 3 and 4?**') == 1 + (len(lines) - 1) // 2

    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    shutil.rmtree(tmp_path / f'again/checkpoints/{len(lines)}')
    again = sft.run(some, tmp_path / 'again')
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.array_equal(ours, theirs)
    assert [line['loss'] for line in read_metrics(tmp_path / 'again/metrics.jsonl')] == [line['loss'] for line in lines]
    assert (tmp_path / 'again/samples.md').read_text() == samples
    model, _ = load_model(tmp_path / 'again/model')
    assert np.array_equal(model.head_DV[...], state.params.head_DV[...])


def test_adapters_beside_a_model_in_eight_bits_are_merged_into_the_model_as_it_was(home, tmp_path):
    lora = LoraConfig(rank=2, matrices=('q', 'o', 'up'), int8=True)
    data = DialogConfig(mixture=f'jsonl:{home}/dialogs.jsonl', heldout=0.1, epochs=4)
    loop = LoopConfig(log_every=1, eval_every=4, sample_every=0)
    state = sft.run(config(home, lora=lora, data=data, loop=loop, prompts=(), merge=True), tmp_path / 'run')
    lines = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.1
    (model, _), (base, _) = load_model(tmp_path / 'run/model'), load_model(home / 'base')
    a, b = (np.asarray(factor[...]) for factor in (state.params.a_up_DA, state.params.b_up_AF))
    grown = np.asarray(base.blocks.w_up_DF[...]) + lora.scale * np.einsum('NDA,NAF->NDF', a, b)
    np.testing.assert_allclose(model.blocks.w_up_DF[...], grown, atol=1e-6)
    assert np.abs(lora.scale * np.einsum('NDA,NAF->NDF', a, b)).max() > 1e-3
    assert np.array_equal(model.blocks.w_down_DF[...], base.blocks.w_down_DF[...])


def test_adapters_train_beside_a_frozen_model(home, tmp_path, capsys):
    some = config(
        home,
        lora=LoraConfig(rank=2, matrices=('q', 'o', 'up')),
        data=DialogConfig(mixture=f'jsonl:{home}/dialogs.jsonl', heldout=0.1, epochs=4),
        loop=LoopConfig(log_every=1, eval_every=4, sample_every=0),
        mesh=MeshConfig(fsdp=4, tensor=2),
        accumulation=2,
    )
    state = sft.run(some, tmp_path / 'run')
    trained = 2 * 2 * (5 * 32 + 48)  # layers × rank × the axes of the factors
    assert f'{trained:,} parameters are trained' in capsys.readouterr().out
    adam = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(adam) == 2 * trained  # the two moments
    lines = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.1
    assert sorted(path.name for path in (tmp_path / 'run/adapters').iterdir()) == [
        *('adapter_config.json', 'adapter_model.safetensors')
    ]
    assert not (tmp_path / 'run/model').exists()

    sft.run(dataclasses.replace(some, merge=True), tmp_path / 'run')  # trains no further
    model, tokenizer = load_model(tmp_path / 'run/model')
    base, _ = load_model(home / 'base')
    assert np.array_equal(model.blocks.w_k_DGK[...], base.blocks.w_k_DGK[...])
    data = DialogData(some.data, tokenizer, length=63, batch_size=8, seed=0)
    loss, _ = loss_and_gradients(model, next(data.heldout(0)))
    assert float(loss) == pytest.approx(lines[-1]['heldout/loss'], abs=1e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'length': 65}, r'length=65 exceeds the context of .*base, 64; set context, too\.'),
        ({'context': 63}, r'context=63 is shorter than that of .*base, 64\.'),
        ({'lora': LoraConfig(rank=2, int8=True)}, 'With lora.int8 there is no room for a merged model to sample from'),
        ({'init_from': '7b'}, 'init_from=7b is a size, which is enough for --dry_run only'),
        ({'init_from': 'nowhere'}, 'There is no model at .*nowhere'),
        ({'batch_size': 12}, 'batch_size=12 in accumulation=1 parts cannot be divided over replica × fsdp = 8 devices'),
        ({'data': DialogConfig(mixture='toy:diaries')}, "toy:diaries holds documents, not records; did you mean 'dialogs'"),
        ({'optimizer': OptimizerConfig()}, 'warmup_steps=2000 must be less than the .* steps of the run'),
    ],
)
def test_mistakes_are_named(home, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        sft.run(config(home, **changes), tmp_path / 'run')


def test_one_row_a_microbatch():
    rows = shard_batch(np.arange(12).reshape(4, 3), jax.sharding.get_mesh())
    parts = jax.jit(lambda x: jax.lax.map(lambda part: part['x'], microbatches({'x': x}, 4)))(rows)
    assert parts.tolist() == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]], [[9, 10, 11]]]


def test_a_dry_run_needs_no_weights():
    report = sft.dry_run(SftConfig(length=64, batch_size=8), None)
    assert (report.chips, report.tokens) == (8, 8 * 64)


def test_warm_up_as_a_share():
    rates = schedule(OptimizerConfig(peak_lr=1.0, warmup_steps=2, warmup_share=0.03), 100)
    assert [round(float(rates(step)), 4) for step in (0, 1, 2, 3)] == [0, 0.3333, 0.6667, 1]
    assert float(schedule(OptimizerConfig(peak_lr=1.0, warmup_steps=5, warmup_share=0.03), 100)(5)) == 1.0


class Answers:
    """An engine that gives prepared samples."""

    def __init__(self, samples, tokenizer):
        self.samples, self.tokenizer = samples, tokenizer

    def generate(self, requests):
        return ([sample] for sample, _ in zip(self.samples, requests, strict=True))


def test_grades(home):
    rows, oracle = list(toy.RECORDS['heldout']()), Oracle()
    tokenizer = load_model(home / 'base')[1]
    perfect = [Sample(oracle.perfect(oracle.understand(row['messages'])), [], [], 'eos') for row in rows]
    splits = ('combinations', 'learnable', 'people', 'phrasings', 'safety', 'sums')
    best = {f'toy/{split}/exact': 1.0 for split in splits} | {'toy/stops': 1.0}
    best |= {'toy/helpfulness': 1.0, 'toy/harmlessness': 1.0, 'toy/violations': 0.0, 'toy/false_refusals': 0.0}
    assert grade(Answers(perfect, tokenizer)) == best
    rows = [row for row in rows if row['split'] in ('phrasings', 'combinations')][:4]
    perfect = [Sample(oracle.perfect(oracle.understand(row['messages'])), [], [], 'eos') for row in rows]
    right = perfect[0].text
    bad = [
        perfect[0],
        Sample(perfect[1].text, [], [], 'length'),  # does not stop
        Sample('I cannot help with that.', [], [], 'eos'),
        Sample(f'{perfect[3].text} {right}', [], [], 'eos'),  # and something about somebody else
    ]
    grades = grade(Answers(bad, tokenizer), rows)
    assert (grades['toy/learnable/exact'], grades['toy/stops']) == (0.25, 0.75)
    assert grades['toy/false_refusals'] == 0.25 and 0.25 < grades['toy/helpfulness'] < 0.75
