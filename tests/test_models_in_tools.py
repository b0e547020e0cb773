"""Tools and the models that they are given: each model's own prompts, in every format; and another model at the same path."""

import dataclasses
import json

import pytest
from random_policy import make_home
from stages.test_pretrain_stage import config as pretraining
from test_made_from import replace_model
from text.test_template import CHATML

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.fingerprint import identity
from llama2_jax.checkpoints.load import open_model
from llama2_jax.config import UserError
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.evals.prompter import Prompter
from llama2_jax.evals.task import Decoding, Example, Task, best
from llama2_jax.inference.open import open_engine
from llama2_jax.stages import evaluate, generate, pairwise, pretrain
from llama2_jax.stages.evaluate import EvaluateConfig
from llama2_jax.stages.pairwise import PairwiseConfig
from llama2_jax.text import template
from llama2_jax.text.dialog import encode_prompt
from llama2_jax.text.template import PromptFormat

pytestmark = pytest.mark.usefixtures('mesh', 'one_device', 'compiled_once')

QUESTION = 'What is 1 and 2?'
DIALOG = [{'role': 'user', 'content': QUESTION}]
SETTINGS = {'max_new_tokens': 2, 'num_samples': 1, 'temperature': 0.0, 'top_p': 0.9, 'top_k': 0, 'seed': 0, 'stop': []}
FORMATS = {'text': PromptFormat(), 'llama2': PromptFormat(True), 'own template': PromptFormat(True, CHATML, 'prepend')}


@pytest.fixture
def home(tmp_path):
    """policy/, help/, safe/ and prompts.jsonl."""
    return make_home(tmp_path, [{'messages': [{'role': 'user', 'content': f'What is {i} and {i}?'}]} for i in range(32)])


def expected(prompts, tokenizer):
    """The ids of the question by each format's own rule."""
    if not prompts.chat:
        return tokenizer.encode(QUESTION, bos=True, eos=False)
    tokenizer.prompts = prompts
    return template.encode(DIALOG, tokenizer, 'dialog') if prompts.template else encode_prompt(DIALOG, tokenizer)


@pytest.mark.parametrize('prompts', FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize('form', ['orbax', 'hf', 'gguf', 'meta'])
def test_each_tool_asks_in_the_models_own_format(form, prompts, home, tmp_path, monkeypatch):
    if form == 'meta' and prompts.template:
        pytest.skip("Meta's format holds no template")
    source = dataclasses.replace(open_model(home / 'policy'), prompts=prompts)
    path = tmp_path / f'out-{"chat" if prompts.chat else "base"}{".gguf" if form == "gguf" else ""}'
    convert(source, path, form)
    engine, asked = open_engine(path), []
    ids = list(expected(prompts, open_engine(path).tokenizer))
    assert len(ids) > 1 and engine.tokenizer.prompts == prompts

    def listen(requests):
        for request in requests:
            asked.append(list(request.token_ids))
            yield from answers([request])

    answers = engine.generate
    monkeypatch.setattr(engine, 'generate', listen)
    monkeypatch.setattr(pairwise, 'open_engine', lambda *_: engine)
    rows = tmp_path / 'rows.jsonl'
    rows.write_text(json.dumps({'prompt': QUESTION}))
    generate.run(engine, str(rows), tmp_path / 'a.jsonl', SETTINGS, {})
    given = PairwiseConfig(str(path), '', str(rows), 'toy', str(tmp_path), max_new_tokens=2)
    pairwise.answer(given, str(path), rows, tmp_path / 'b')
    assert asked == [ids, ids]
    request = Prompter(engine, engine.tokenizer.prompts.chat)._request(
        Task('t', None, None, '', decoding=Decoding(2)), 0, Example('', QUESTION)
    )
    assert list(request.token_ids) == ids


def test_generation_is_not_continued_by_another_model(home, tmp_path):
    rows, output = f'jsonl:{home}/prompts.jsonl', tmp_path / 'out.jsonl'
    generate.run(open_engine(home / 'policy'), rows, output, SETTINGS, identity(home / 'policy'))
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(''.join(lines[:3]))
    replace_model(home / 'policy', seed=7)
    with pytest.raises(UserError, match=r'out\.jsonl holds results for content of the model='):
        generate.run(open_engine(home / 'policy'), rows, output, SETTINGS, identity(home / 'policy'))
    assert output.read_text() == ''.join(lines[:3])


@pytest.mark.parametrize('finished', [True, False])
def test_an_evaluation_is_not_continued_by_another_model(finished, home, tmp_path):
    examples = [Example(n % 2, choices=tuple((f'What is {n}?', f' {x}') for x in 'AB')) for n in range(4)]
    task = Task('letters', lambda files, shots: examples, best, '')
    config = EvaluateConfig(str(home / 'policy'), (), str(tmp_path), '')

    class Stopped(Prompter):
        def ask(self, task, examples):
            for number, output in enumerate(super().ask(task, examples)):
                if number == 2 and not finished:
                    raise KeyboardInterrupt
                yield output

    def run():
        prompter = Stopped(open_engine(home / 'policy'), False)
        evaluate.run_task(task, config, identity(config.model), prompter, {}, tmp_path)

    if finished:
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
    replace_model(home / 'policy', seed=7)
    with pytest.raises(UserError, match=r'letters.*json.* holds results for content of the model='):
        run()


def test_pretraining_notices_another_text_and_a_missing_tokenizer(tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text('\n\n'.join(f'The hare number {i} and the tortoise ran a race, which {i} of them won.' for i in range(400)))
    data = DataConfig(mixture=f'text:{text}', cache_dir=str(tmp_path / 'cache'), heldout=0.05)
    shape = dataclasses.replace(pretraining(tmp_path).model, vocab_size=300)
    config = pretraining(tmp_path, model=shape, data=data, tokens=6 * 8 * 32, prompts=())
    pretrain.run(config, tmp_path / 'run')
    before = text.read_text()
    text.write_text(before + '\n\nAnd one more.')
    with pytest.raises(UserError, match=r'data\.mixture=text:.*text\.txt .*has changed'):
        pretrain.run(config, tmp_path / 'run')
    text.write_text(before)
    tokenizer = tmp_path / 'run/tokenizer.model'
    tokenizer.rename(tmp_path / 'kept')
    with pytest.raises(UserError, match=r'tokenizer\.model is missing'):
        pretrain.run(config, tmp_path / 'run')
    assert not tokenizer.exists()
