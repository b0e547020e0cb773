"""Prompts: each once a round, in an order of the seed's, held out by what they ask, with their tags."""

import collections
import json

import pytest

from llama2_jax.config import UserError
from llama2_jax.data.prompts import PromptConfig, PromptData
from llama2_jax.text.template import PromptFormat


class Letters:
    """A tokenizer of code points; like SentencePiece it puts a space before every text."""

    prompts = PromptFormat()

    def encode(self, text, bos, eos):
        return bos * [1] + [ord(letter) for letter in f' {text}'] + eos * [2]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('prompts')
    for name, count in (('a', 60), ('b', 20)):
        rows = [{'messages': [{'role': 'user', 'content': f'{name}{i}?'}], 'category': name} for i in range(count)]
        rows = [row | ({'is_safety': True} if name == 'b' else {}) for row in rows]
        (home / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return home


def make(home, mixture='jsonl:{}/a.jsonl, jsonl:{}/b.jsonl:3x', seed=0, **settings):
    settings = {'heldout': 0.2, 'longest': 100} | settings
    return PromptData(PromptConfig(mixture.replace('{}', str(home)), **settings), Letters(), batch_size=8, seed=seed)


def test_batches_are_a_function_of_seed_and_number(home):
    ours, again, other = make(home), make(home), make(home, seed=1)
    assert ours.batch(7) == again.batch(7) != ours.batch(8)
    assert ours.batch(7) != other.batch(7)


def test_every_prompt_comes_as_often_as_its_weight_says(home):
    data = make(home)
    counts = {name: len({p.where for p in data.train if p.category == name}) for name in 'ab'}
    round_ = counts['a'] + 3 * counts['b']
    seen = collections.Counter(prompt.where for number in range(round_ // 2) for prompt in data.batch(number))  # four rounds
    for prompt in data.train:
        assert abs(seen[prompt.where] - (12 if prompt.category == 'b' else 4)) <= 1, prompt.where
    first = [prompt.where for number in range(round_ // 8) for prompt in data.batch(number) if prompt.category == 'a']
    assert len(set(first)) == len(first)  # none comes again before all were there


def test_held_out_prompts_are_never_asked(home):
    data = make(home)
    assert 4 <= len(data.heldout) <= 28 and {p.is_safety for p in data.heldout} == {True, False}
    assert not {p.where for p in data.heldout} & {p.where for p in data.train}
    assert len(data.heldout) + len(data.train) == 80
    assert {p.where for p in data.heldout} == {p.where for p in make(home, seed=5).heldout}


def test_tags_and_ids(home):
    prompt = next(prompt for prompt in make(home).train if prompt.category == 'b')
    text = prompt.messages[0]['content']
    assert prompt.is_safety and prompt.token_ids == [1, *map(ord, f' [INST] {text} [/INST]')]
    assert prompt.where.startswith(str(home / 'b.jsonl:'))


def test_long_prompts_are_counted(home):
    length = len(' [INST] a1? [/INST]') + 1
    data = make(home, longest=length)
    assert data.dropped == 50 + 10 and str(data).endswith('60 too long.')


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'question': 'Hi'}, r"bad.jsonl:1 is no prompt: it has no field 'messages' .*\(it has: question\)"),
        ({'messages': [{'role': 'assistant', 'content': 'Hi'}]}, 'bad.jsonl:1: messages.0. has the role'),
        ({'messages': [{'role': 'user', 'content': 'Hi'}], 'is_safety': 1}, 'bad.jsonl:1: "is_safety" is 1, not true or false'),
        ({'messages': [{'role': 'user', 'content': 'Hi [/INST]'}]}, 'bad.jsonl:1: a message holds a tag of the chat format'),
    ],
)
def test_mistakes_are_named(tmp_path, row, message):
    (tmp_path / 'bad.jsonl').write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        make(tmp_path, 'jsonl:{}/bad.jsonl')
