"""Whether a model chats, and with which template: kept from format to format."""

import dataclasses
import json

import pytest
from small_models import MHA, random_model
from text.test_template import CHATML, ZEPHYR

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import open_model
from llama2_jax.config import UserError
from llama2_jax.text.template import PromptFormat


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(chat) -> a model directory."""

    def make(chat):
        save_model(tmp_path / f'ours-{chat}', random_model(MHA), tokenizer, {'stage': 'sft'}, chat=chat)
        return tmp_path / f'ours-{chat}'

    return make


@pytest.mark.parametrize('chat', [True, False])
@pytest.mark.parametrize('form', ['hf', 'gguf', 'orbax'])
def test_conversions_keep_whether_a_model_chats(form, chat, saved, tmp_path):
    there = tmp_path / ('there.gguf' if form == 'gguf' else 'there')
    convert(open_model(saved(chat)), there, form)
    assert open_model(there).prompts == PromptFormat(chat)
    convert(open_model(there), tmp_path / 'back', 'orbax')
    assert open_model(tmp_path / 'back').prompts == PromptFormat(chat)


@pytest.mark.parametrize(('name', 'chat'), [('llama-2-7b-chat', True), ('Llama-2-7b-Instruct', True), ('llama-2-7b', False)])
def test_metas_directories_say_it_by_name(name, chat, saved, tmp_path):
    convert(open_model(saved(False)), tmp_path / name, 'meta')
    assert open_model(tmp_path / name).prompts == PromptFormat(chat)
    convert(open_model(tmp_path / name), tmp_path / 'x', 'orbax')  # where the name is lost
    assert open_model(tmp_path / 'x').prompts.chat == chat


def test_older_model_directories_say_it_by_stage(saved):
    path = saved(False)
    content = json.loads((path / 'config.json').read_text())
    del content['prompts']
    for provenance, chat in (
        ({'stage': 'sft'}, True),
        ({'stage': 'pretrain'}, False),
        ({'stage': 'convert', 'parent': '/models/Llama-2-7b-chat-hf'}, True),
    ):
        (path / 'config.json').write_text(json.dumps(content | {'provenance': provenance}))
        assert open_model(path).prompts.chat == chat


@pytest.mark.parametrize('change', [{'chat': 'yes'}, {'spaces': 'left'}, {'templates': ''}])
def test_damaged_sections_are_refused(change, saved):
    path = saved(True)
    content = json.loads((path / 'config.json').read_text())
    content['prompts'] |= change
    (path / 'config.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf'config\.json: prompts.*{[*change][0]}'):
        open_model(path)


@pytest.mark.parametrize('place', ['tokenizer_config.json', 'chat_template.jinja'])
def test_a_foreign_template_comes_back(place, saved, tmp_path):
    convert(open_model(saved(True)), tmp_path / 'hf', 'hf')
    settings = json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())
    if place.endswith('.jinja'):  # which counts, whatever else there is
        (tmp_path / 'hf' / place).write_text(ZEPHYR)
    settings['chat_template'] = CHATML if place.endswith('.jinja') else ZEPHYR
    (tmp_path / 'hf' / 'tokenizer_config.json').write_text(json.dumps(settings))
    source = open_model(tmp_path / 'hf')
    assert source.prompts == PromptFormat(True, ZEPHYR, 'prepend')
    convert(source, tmp_path / 'ours', 'orbax')
    for form, path in (('hf', tmp_path / 'again'), ('gguf', tmp_path / 'again.gguf')):
        convert(open_model(tmp_path / 'ours'), path, form)
        assert open_model(path).prompts == source.prompts


@pytest.mark.parametrize('spaces', ['first', 'always', 'never'])
def test_where_spaces_go_comes_back(spaces, saved, tmp_path):
    source = open_model(saved(True))
    source = dataclasses.replace(source, prompts=PromptFormat(True, ZEPHYR, spaces))
    convert(source, tmp_path / 'hf', 'hf')
    assert open_model(tmp_path / 'hf').prompts == source.prompts
