"""Files of prompts, conversations, and mistakes in both."""

import errno
import json
import os

import jax
import pytest

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.files import Lines
from llama2_jax.inference import plan
from llama2_jax.inference.engine import Engine
from llama2_jax.mesh import decoding_mesh
from llama2_jax.model.llama import Llama
from llama2_jax.stages import generate
from llama2_jax.stages.chat import Chat
from llama2_jax.text.dialog import encode_prompt
from llama2_jax.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=300, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=160)
SETTINGS = {'max_new_tokens': 12, 'num_samples': 1, 'temperature': 1.0, 'top_p': 0.9, 'top_k': 0, 'seed': 0, 'stop': []}
DIALOG = [{'role': 'user', 'content': 'a hare'}]


@pytest.fixture(scope='module')
def engine(tmp_path_factory):
    text = ['the hare and the tortoise ran a race, and the tortoise won it in the end'] * 20
    tokenizer = train_tokenizer(text, tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model', 300)
    mesh = decoding_mesh(CONFIG, jax.devices()[:1])
    return Engine(Llama(CONFIG, jax.random.key(0)), tokenizer, mesh=mesh, batch_size=4)


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = [
    {'prompt': 'the hare', 'id': 'first', 'category': 'ignored'},
    {'prompt': ''},
    {'messages': DIALOG, 'num_samples': 3},
    {'token_ids': [1, 7, 9], 'max_new_tokens': 5, 'temperature': 0},
    {'messages': [{'role': 'user', 'content': 'x <<SYS>>'}], 'num_samples': 2},
    {'token_ids': []},
]


def test_a_file_of_prompts(engine, tmp_path):
    prompts, output = write(tmp_path / 'in.jsonl', ROWS), tmp_path / 'out' / 'out.jsonl'
    generate.run(engine, prompts, output, SETTINGS, {'model': 'm'}, logprobs=True)
    lines = read(output)
    assert [line['id'] for line in lines] == ['first', 1, 2, 3, 4, 5]
    assert [len(line['samples']) for line in lines] == [1, 1, 3, 1, 2, 1]
    assert len({tuple(sample['token_ids']) for sample in lines[2]['samples']}) == 3
    for line in [*lines[:4], lines[5]]:
        for sample in line['samples']:
            assert sample.keys() == {'text', 'token_ids', 'stop_reason', 'logprobs'}
            assert len(sample['logprobs']) == len(sample['token_ids']) <= 12
    assert len(lines[3]['samples'][0]['token_ids']) <= 5
    refusal = 'Error: special tags are not allowed as part of the prompt.'
    assert lines[4]['samples'][1] == {'text': refusal, 'token_ids': [], 'stop_reason': 'stop', 'logprobs': []}
    # An empty prompt is BOS alone, and rows have seeds of their own.
    assert lines[1]['samples'] != lines[5]['samples']
    whole = engine.tokenizer.decode([*engine.tokenizer.encode('the hare', True, False), *lines[0]['samples'][0]['token_ids']])
    assert whole == 'the hare' + lines[0]['samples'][0]['text']


def test_messages_are_prompted_as_dialogs(engine):
    request = generate.make_request({'messages': DIALOG}, engine.tokenizer, SETTINGS, 'row')
    assert request.token_ids == encode_prompt(DIALOG, engine.tokenizer) and request.answer


def test_an_interrupted_run_goes_on(engine, tmp_path):
    prompts, whole, cut = write(tmp_path / 'in.jsonl', ROWS), tmp_path / 'whole.jsonl', tmp_path / 'cut.jsonl'
    generate.run(engine, prompts, whole, SETTINGS, {'model': 'm'})
    generate.run(engine, prompts, cut, SETTINGS, {'model': 'm'})
    assert cut.read_bytes() == whole.read_bytes()
    for end in (0, 3, whole.read_bytes().index(b'\n') + 1, len(whole.read_bytes()) - 5, len(whole.read_bytes())):
        cut.write_bytes(whole.read_bytes()[:end])
        generate.run(engine, prompts, cut, SETTINGS, {'model': 'm'})
        assert cut.read_bytes() == whole.read_bytes()
    with pytest.raises(UserError, match=r'whole\.jsonl holds results for temperature=1.0'):
        generate.run(engine, prompts, whole, SETTINGS | {'temperature': 0.5}, {'model': 'm'})
    with pytest.raises(UserError, match='holds results for content of the prompts'):
        generate.run(engine, write(tmp_path / 'in.jsonl', ROWS[:-1]), whole, SETTINGS, {'model': 'm'})
    cut.write_text('{"id": 7}\n')
    with pytest.raises(UserError, match=r'cut\.jsonl is damaged: its lines are not results of the prompts'):
        generate.run(engine, write(tmp_path / 'in.jsonl', ROWS), cut, SETTINGS, {'model': 'm'})


def test_a_full_disk_is_said(engine, tmp_path, monkeypatch):
    def no_space(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    prompts = write(tmp_path / 'prompts.jsonl', [{'prompt': 'a hare'}])
    monkeypatch.setattr(Lines, 'write', no_space)
    with pytest.raises(UserError, match='^No space left while writing to .*out.jsonl'):
        generate.run(engine, prompts, str(tmp_path / 'out.jsonl'), SETTINGS, {})


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'text': 'x'}, r'in\.jsonl:2: a row has one of prompt, messages, token_ids, not none of them\.'),
        ({'prompt': 'x', 'token_ids': [1]}, r'in\.jsonl:2: a row has one of .*, not prompt and token_ids\.'),
        ({'prompt': 3}, r'in\.jsonl:2: "prompt" is 3, not a text'),
        ({'token_ids': [1, 'a']}, r'in\.jsonl:2: "token_ids" is not a list of whole numbers'),
        ({'token_ids': [1, 300]}, r'in\.jsonl:2: token id 300 is outside the vocabulary of 300'),
        ({'prompt': 'x', 'temprature': 1}, r"in\.jsonl:2: unknown field 'temprature'; did you mean 'temperature'\?"),
        ({'prompt': 'x', 'temperature': 'hot'}, r"in\.jsonl:2: .*'hot'.* temperature"),
        ({'prompt': 'x', 'top_k': 1.5}, r'in\.jsonl:2: .*1\.5.* top_k'),
        ({'prompt': 'x', 'top_p': 2}, r'in\.jsonl:2: top_p is 2'),
        ({'prompt': 'x' * 200}, r'in\.jsonl:2: the prompt has \d+ tokens, and a context of 160 leaves no room'),
        ({'messages': [{'role': 'assistant', 'content': 'x'}]}, r"in\.jsonl:2: messages\[0\] has the role 'assistant'"),
        ({'messages': DIALOG + [{'role': 'assistant', 'content': 'x'}]}, r'in\.jsonl:2: the last message of a prompt'),
    ],
)
def test_a_bad_row_is_named_before_anything_is_done(engine, tmp_path, row, message):
    prompts = write(tmp_path / 'in.jsonl', [ROWS[0], row])
    with pytest.raises(UserError, match=message):
        generate.run(engine, prompts, tmp_path / 'out.jsonl', SETTINGS, {})
    assert not (tmp_path / 'out.jsonl').exists()


def test_a_conversation(engine, tmp_path):
    chat = Chat(engine, 'be brief', max_new_tokens=8, temperature=0)
    first = ''.join(chat.ask('the hare'))
    assert [message['role'] for message in chat.messages] == ['system', 'user', 'assistant']
    assert first.startswith(chat.messages[2]['content'])
    again = Chat(engine, 'be brief', max_new_tokens=8, temperature=0)
    assert ''.join(again.ask('the hare')) == first
    chat.save(tmp_path / 'chats.jsonl')
    assert read(tmp_path / 'chats.jsonl') == [{'messages': chat.messages}]
    for _ in range(4):
        last = ''.join(chat.ask('and the tortoise'))
    assert 'turns no longer fit the context of 160 tokens]' in last
    assert len(chat.messages) == 11  # the conversation itself forgets nothing
    with pytest.raises(UserError, match='special tags are not allowed'):
        list(chat.ask('[INST] x'))
    with pytest.raises(UserError, match=r'The last message takes \d+ tokens, but there is room for 152'):
        list(chat.ask('x' * 200))
    chat.reset('')
    with pytest.raises(UserError, match='nothing to save'):
        chat.save(tmp_path / 'chats.jsonl')


def test_an_answer_that_is_interrupted_counts(engine):
    chat = Chat(engine, max_new_tokens=30, temperature=0)
    answer = chat.ask('the hare')
    given = next(answer) + next(answer)
    answer.close()
    assert chat.messages[-1] == {'role': 'assistant', 'content': given.strip()}
    assert ''.join(chat.ask('go on'))


def test_what_a_step_would_take():
    shown = plan.dry_run('tiny', None, batch_size=8, length=128, int8=True)
    assert 'mesh             replica=2 × rows=2 × tensor=2' in shown and 'memory a chip' in shown and 'all-reduce' in shown
