"""Evaluation as a whole: tables, resuming, other batches and meshes, sets that are missing, and one model against another."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from evals import published

from llama2_jax import toy
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.evals.files import Files
from llama2_jax.evals.measure import spread
from llama2_jax.evals.prompter import Prompter, encode_pairs
from llama2_jax.evals.task import Decoding, Example, Task, best, votes
from llama2_jax.inference import likelihood
from llama2_jax.inference.engine import Engine
from llama2_jax.mesh import MeshConfig, decoding_mesh, make_mesh
from llama2_jax.model.llama import Llama
from llama2_jax.stages import evaluate, pairwise
from llama2_jax.stages.evaluate import EvaluateConfig
from llama2_jax.text.tokenizer import Tokenizer, train_tokenizer
from llama2_jax.toy.oracle import Oracle

CONFIG = ModelConfig(vocab_size=300, dim=32, layers=2, heads=8, kv_heads=8, head_dim=8, hidden=64, context=256)
TEXT = ['the hare and the tortoise ran a race, and the tortoise won it in the end. Answer: A B C D'] * 20


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A model directory with random weights."""
    folder = tmp_path_factory.mktemp('model')
    tokenizer = train_tokenizer(TEXT, folder / 'tokenizer.model', 300)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        save_model(folder / 'model', Llama(CONFIG, jax.random.key(0)), tokenizer, {'stage': 'pretrain', 'step': 1})
    return str(folder / 'model')


@pytest.fixture(scope='module')
def engine(model):
    """On one device."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        weights = Llama(CONFIG, jax.random.key(0))
    return Engine(weights, Tokenizer(model), mesh=decoding_mesh(CONFIG, jax.devices()[:1]), batch_size=64)


@pytest.fixture(autouse=True)
def one_device(monkeypatch, engine):
    """The stage on one device; `test_neither_batch_nor_mesh_matters` is about others."""
    for module in (evaluate, pairwise):
        monkeypatch.setattr(module, 'open_engine', lambda *_, **__: engine)


@pytest.fixture(scope='module')
def benchmarks(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp('benchmarks'))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


NAMES = ('mmlu', 'gsm8k', 'bold', 'toy')


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    return tmp_path_factory.mktemp('eval') / 'out'


@pytest.fixture
def done(model, benchmarks, output):
    """A run, finished by the first that asks for it."""
    config = EvaluateConfig(model, NAMES, benchmarks, str(output), limit=5, shots=0)
    evaluate.run(config)
    return config


def test_what_is_written(done):
    path = Path(done.output)
    records = read(path / 'mmlu.jsonl')
    assert [record['index'] for record in records] == [0, 1] and len({record['prompt_hash'] for record in records}) == 2
    for record in records:
        assert record['prediction'] == int(np.argmax(record['outputs'])) and len(record['outputs']) == 4
        assert record['correct'] == float(record['prediction'] == record['target'])
    assert read(path / 'toy.jsonl')[0]['outputs'][0].keys() == {'text', 'stop_reason'}
    summary = json.loads((path / 'summary.json').read_text())
    rows = {(row['name'], row['measure']): row for row in summary['table']}
    assert rows['mmlu', 'correct']['ours'] == np.mean([record['correct'] for record in records])
    low, high = rows['toy', 'correct']['interval']
    assert 0 <= low <= rows['toy', 'correct']['ours'] <= high <= 1
    assert rows['mmlu', 'correct']['paper'] is None and summary['size'] is None and not summary['chat']
    table = (path / 'table.md').read_text()
    assert table.startswith('| task | shots | measure | % | 95 % interval | paper | examples | seconds | tokens/s |')
    assert '| gsm8k | 0 | correct | 0.0 | < 79.3 |  | 1 |' in table  # Wilson's bound of none of one


def test_finished_tasks_are_not_run_again(done, monkeypatch):
    monkeypatch.setattr(Prompter, 'ask', None)
    evaluate.run(done)
    with pytest.raises(UserError, match=r'mmlu\.json holds results for '):
        evaluate.run(dataclasses.replace(done, limit=1))


LETTERS = ['the', 'hare', 'and', 'a', 'tortoise']


def questions(count):
    """A task of choices and one of answers, in which every question is another."""
    rng = np.random.default_rng(0)
    texts = [' '.join(rng.choice(LETTERS, size=rng.integers(1, 20))) for _ in range(count)]
    shown = 'the tortoise won it in the end. ' * 3
    choices = [Example(n % 4, choices=tuple((shown + text, f' {x}') for x in 'ABCD')) for n, text in enumerate(texts)]
    answers = [Example('x', shown + text) for text in texts]
    words = Task('words', lambda *_: answers, lambda e, o, g: votes([o[0]['text']], str.isalpha), '', decoding=Decoding(6))
    drawn = dataclasses.replace(words, name='drawn', decoding=Decoding(6, temperature=0.8, top_p=0.95, samples=2))
    return [(Task('letters', lambda *_: choices, best, ''), choices), (words, answers), (drawn, answers)]


def test_neither_batch_nor_mesh_matters(engine, monkeypatch):
    """The same predictions at batch 1, 8 and 64, and on 1 and 8 devices, of 200 examples of each kind."""
    monkeypatch.setattr(likelihood, 'LENGTH', 128)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        weights = Llama(CONFIG, jax.random.key(0))

    def asked(devices, batch_size):
        mesh = decoding_mesh(CONFIG, jax.devices()[:devices])
        other = Engine(weights, engine.tokenizer, mesh=mesh, batch_size=batch_size)
        prompter = Prompter(engine if (devices, batch_size) == (1, 64) else other, chat=False)
        found = []
        for task, examples in questions(200):
            outputs = {o.index: o.outputs for o in prompter.ask(task, dict(enumerate(examples)))}
            found.append([task.grade(example, outputs[n], {})['prediction'] for n, example in enumerate(examples)])
            found.append([outputs[n] if task.decoding else np.round(outputs[n], 3).tolist() for n in range(len(examples))])
        return found

    whole = asked(1, 64)
    for devices, batch_size in ((1, 8), (1, 1), (8, 64)):
        assert asked(devices, batch_size)[::2] == whole[::2]
    assert whole[3] != whole[5] and len({str(output) for output in whole[5]}) > 100


def test_an_interrupted_task_goes_on(model, engine, benchmarks, tmp_path):
    examples = [Example(n % 4, choices=tuple((text, f' {x}') for x in 'ABCD')) for n, text in enumerate(LETTERS)]
    task = Task('letters', lambda files, shots: examples, best, '')
    config = EvaluateConfig(model, (), benchmarks, '')
    asked = []

    class Half(Prompter):
        def ask(self, task, examples):
            asked.append(list(examples))
            for number, output in enumerate(super().ask(task, examples)):
                if len(asked) == 1 and number == 3:
                    raise KeyboardInterrupt
                yield output

    with pytest.raises(KeyboardInterrupt):
        evaluate.run_task(task, config, {}, Half(engine, False), {}, tmp_path)
    path = tmp_path / 'letters.outputs.jsonl'
    path.write_text(path.read_text() + '{"index": 4, "outp')
    result = evaluate.run_task(task, config, {}, Half(engine, False), {}, tmp_path)
    assert [len(some) for some in asked] == [5, 2] and result['examples'] == 5 and not path.exists()
    other = tmp_path / 'other'
    other.mkdir()
    fresh = evaluate.run_task(task, config, {}, Prompter(engine, False), {}, other)
    assert fresh['measures'] == result['measures']
    (tmp_path / 'letters.json').unlink()
    path.write_text('{}\n{"index"\n')
    with pytest.raises(UserError, match=r'letters\.outputs\.jsonl is damaged'):
        evaluate.run_task(task, config, {}, Prompter(engine, False), {}, tmp_path)
    path.write_text('{}\n')
    with pytest.raises(UserError, match=r'letters\.outputs\.jsonl holds results for '):
        evaluate.run_task(task, config, {}, Prompter(engine, False), {}, tmp_path)


def test_what_cannot_be_run_is_listed(model, benchmarks, tmp_path, capsys):
    config = EvaluateConfig(model, ('humaneval', 'toxigen', 'mmlu'), benchmarks, str(tmp_path / 'a'), limit=1)
    with pytest.raises(UserError, match='humaneval, toxigen could not be run, see above; the other tasks were'):
        evaluate.run(config)
    said = capsys.readouterr().out
    assert 'humaneval is left out: it runs programs that the model wrote: allow that with --run_generated_code' in said
    assert 'toxigen is left out: it needs a classifier: --toxicity=DIR' in said and '| mmlu | 5 |' in said
    config = EvaluateConfig(model, ('math', 'quac'), str(tmp_path), str(tmp_path / 'b'))
    with pytest.raises(UserError, match=r'No task could be run: math: no MATH/test.* below .*; download it from https'):
        evaluate.run(config)


def test_programs_are_run_if_allowed(model, benchmarks, tmp_path, capsys):
    evaluate.run(EvaluateConfig(model, ('humaneval',), benchmarks, str(tmp_path), run_generated_code=True, samples=None))
    assert 'Programs that the model writes are run, in a sandbox.' in capsys.readouterr().out
    [record] = read(tmp_path / 'humaneval.jsonl')
    assert record['correct'] == 0 and record['prediction'][0] not in ('passed', 'timed out')


def test_chat_models_are_asked_in_the_chat_format(engine):
    task = Task('t', None, None, '', decoding=Decoding(4, stop=('x',)))
    plain, chat = (Prompter(engine, chat)._request(task, 0, Example('', 'the hare', 'the race')) for chat in (False, True))
    assert engine.tokenizer.decode(plain.token_ids) == 'the hare' and plain.stop == ('x',) and not plain.answer
    assert engine.tokenizer.decode(chat.token_ids) == '[INST] the race [/INST]' and chat.stop == () and chat.answer
    [[context, ids]] = Prompter(engine, True)._choices([('the hare', ' A')])
    assert engine.tokenizer.decode(context) == '[INST] the hare [/INST]' and engine.tokenizer.decode(ids) == 'A'
    long = Prompter(engine, False)
    [[context, ids]] = long._choices([('the hare ' * 200, ' A')])
    assert len(context) + len(ids) == CONFIG.context and context[0] == 1 and long.cut == 1


def test_pairs_are_encoded_as_the_text_they_make(model):
    tokenizer = Tokenizer(model)
    for context, continuation in (('the hare', ' ran'), ('the hare ', 'ran'), ('Answer:', ' A'), ('the tort', 'oise')):
        [(before, after)] = encode_pairs([(context, continuation)], tokenizer)
        assert before + after == tokenizer.encode(context + continuation, bos=True, eos=False) and after


def test_limits_are_spread():
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1, 2], 5) == [1, 2] == spread([1, 2], 0)


def test_one_model_against_another(model, tmp_path):
    rows = [{'messages': [{'role': 'user', 'content': 'Where does Una live?'}]}, {'prompt': 'the hare'}]
    prompts = tmp_path / 'prompts.jsonl'
    prompts.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = pairwise.PairwiseConfig(model, model, str(prompts), f'model:{model}', str(tmp_path / 'out'), max_new_tokens=4)
    shares = pairwise.run(config)
    assert shares['tie']['share'] == 1 and shares['win']['interval'] == pytest.approx((0, 0.658), abs=1e-3)  # the same answers
    [first, _] = read(tmp_path / 'out' / 'verdicts.jsonl')
    assert first['model'] == first['versus'] and first['messages'] == rows[0]['messages']


def test_a_judge_must_not_mind_the_order():
    pairs = [([], 'long answer', 'short'), ([], 'a', 'bb'), ([], 'same', 'same')]
    assert pairwise.compare(lambda some: [len(a) - len(b) for _, a, b in some], pairs) == ['win', 'loss', 'tie']
    assert pairwise.compare(lambda some: [1.0 for _ in some], pairs) == ['tie'] * 3
    shares = pairwise.summarise(['win'] * 60 + ['tie'] * 20 + ['loss'] * 20)
    assert shares['win']['share'] == 0.6 and shares['win / (win + loss)']['share'] == 0.75
    low, high = shares['win']['interval']
    assert (low, high) == (pytest.approx(0.504, abs=0.02), pytest.approx(0.696, abs=0.02))
    for name, message in (('oracle', 'no such judge'), ('model', 'names nothing after')):
        with pytest.raises(UserError, match=message):
            pairwise.make_judge(name)


def test_the_toy_oracle_judges():
    oracle = Oracle()
    row = next(row for row in toy.RECORDS['heldout']() if row['split'] == 'phrasings')
    perfect = oracle.perfect(oracle.understand(row['messages']))
    assert pairwise.compare(pairwise.toy_judge, [(row['messages'], perfect, 'I do not know.')]) == ['win']


def test_files_are_found_wherever_they_lie(tmp_path):
    deep = tmp_path / 'a' / 'b' / 'mmlu' / 'data' / 'test'
    deep.mkdir(parents=True)
    (deep / 'x_test.csv').write_text('q,a,b,c,d,A\n')
    files = Files(str(tmp_path))
    assert files.find('test/*_test.csv') == [str(deep / 'x_test.csv')] and list(files.used) == [str(deep / 'x_test.csv')]
