"""Chat templates of other people: ids as `apply_chat_template` gives them, and programs that must not run away."""

# ruff: noqa: E501 (templates as published)

import json
import time

import pytest

from llama2_jax.checkpoints.formats.tokenizer_json import make_tokenizer_json, spaces_of
from llama2_jax.config import UserError
from llama2_jax.text.dialog import encode_prompt
from llama2_jax.text.jinja import render
from llama2_jax.text.template import LLAMA2_TEMPLATE, PromptFormat, foreign_format
from llama2_jax.text.tokenizer import Tokenizer

# As published: meta-llama/Llama-2-7b-chat-hf, TinyLlama-1.1B-Chat, OpenAI's ChatML, Llama 3's text, Mistral-7B-Instruct.
META = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] "
    '%}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}'
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
    'content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}'
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEMPLATES = {'zephyr': ZEPHYR, 'chatml': CHATML, 'llama3': LLAMA3, 'mistral': MISTRAL}
USER = {'role': 'user', 'content': ' What is 2+2?\nSay it – 日本. '}
TALK = [USER, {'role': 'assistant', 'content': 'Four.'}, {'role': 'user', 'content': 'Why?'}]
DIALOGS = ([USER], TALK, [{'role': 'system', 'content': 'Be brief.'}, *TALK])


def theirs(folder, llama2, spaces, template, **settings):
    """The tokenizer of transformers in a directory as `convert` writes it."""
    transformers = pytest.importorskip('transformers')
    (folder / 'tokenizer.model').write_bytes(llama2.model)
    (folder / 'tokenizer.json').write_text(json.dumps(make_tokenizer_json(llama2.model, spaces)))
    (folder / 'config.json').write_text('{"model_type": "llama"}')
    pieces = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'chat_template': template, **pieces, **settings}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return transformers.AutoTokenizer.from_pretrained(folder)


def ours(llama2, template, spaces):
    tokenizer = Tokenizer.from_bytes(llama2.model)
    tokenizer.prompts = PromptFormat(True, template, spaces)
    return tokenizer


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize(
    ('spaces', 'settings'),
    [
        ('prepend', {}),
        ('first', {}),
        ('always', {}),
        ('never', {}),
        ('first', {'tokenizer_class': 'LlamaTokenizer', 'legacy': False}),
        ('always', {'tokenizer_class': 'LlamaTokenizer', 'legacy': True}),
    ],
)
def test_ids_are_those_of_transformers(name, spaces, settings, llama2, tmp_path):
    other = theirs(tmp_path, llama2, spaces, TEMPLATES[name], **settings)
    tokenizer = ours(llama2, TEMPLATES[name], spaces)
    for dialog in DIALOGS:
        if name == 'mistral' and dialog[0]['role'] == 'system':
            with pytest.raises(UserError, match=r'row 3: .*roles must alternate'):
                encode_prompt(dialog, tokenizer, 'row 3')
            continue
        expected = other.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(dialog, tokenizer) == expected


def test_tokenizer_files_say_where_spaces_go(llama2):
    for spaces in ('prepend', 'always', 'first', 'never'):
        assert spaces_of(make_tokenizer_json(llama2.model, spaces)) == spaces


@pytest.mark.parametrize('template', [META, LLAMA2_TEMPLATE], ids=['published', 'ours'])
def test_llama2s_template_is_the_built_in_format(template):
    assert foreign_format(template, 'x', 'x') == PromptFormat(chat=True)


def test_our_template_gives_the_built_in_ids(llama2, tmp_path):
    other = theirs(tmp_path, llama2, 'prepend', LLAMA2_TEMPLATE)
    for dialog in DIALOGS:
        assert other.apply_chat_template(dialog, return_dict=False) == encode_prompt(dialog, llama2)


def test_the_name_decides_without_a_template():
    found = {name: foreign_format(None, name, name).chat for name in ('Llama-2-7b-Chat-hf', 'x-INSTRUCT', 'Llama-2-7b-hf')}
    assert list(found.values()) == [True, True, False]
    assert (
        foreign_format([{'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': ZEPHYR}], 'x', 'x').template
        == ZEPHYR
    )
    with pytest.raises(UserError, match=r'tokenizer_config\.json'):
        foreign_format(7, 'x', 'tokenizer_config.json')


def test_special_tokens_in_a_message_are_refused(llama2):
    with pytest.raises(UserError, match=r"row 1: messages\[0\] holds '</s>'"):
        encode_prompt([{'role': 'user', 'content': 'Hi</s>'}], ours(llama2, ZEPHYR, 'prepend'), 'row 1')


def growing(value):
    """A template in which a string grows 60 times."""
    return "{% set ns = namespace(s='aaaaaaaa') %}{% for a in range(60) %}{% set x %}" + (
        value + '{% endset %}{% set ns.s = x %}{% endfor %}'
        if value.startswith('{{')
        else '{% endset %}{% set ns.s = ' + value + ' %}{% endfor %}{{ ns.s }}'
    )


HOSTILE = {
    'loops': '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
    'sums': '{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}',
    'recursion': '{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}',
    'blocks': growing('{{ ns.s }}{{ ns.s }}'),
    **{name: growing(name) for name in ('ns.s ~ ns.s', 'ns.s + ns.s', '[ns.s, ns.s]', '[ns.s, ns.s]|join')},
    **{name: growing(name) for name in ("ns.s.replace('a', ns.s)", "ns.s|replace('a', ns.s)", '{1: ns.s, 2: ns.s}')},
    **{name: f'{{{{ {name} }}}}' for name in ("'a' * 10**10", "'a'.center(10**10)", "'%10000000000d' % 3", '[0] * 10**10')},
    **{name: f'{{{{ {name} }}}}' for name in ("'{:10000000000}'.format(3)", "'a'|center(10**10)", '9 ** (9 ** 9)')},
    'objects': "{{ ''.__class__.__mro__ }}",
    'globals': '{{ namespace.__init__.__globals__ }}',
    'files': "{% include '/etc/passwd' %}",
    'nesting': '{{ ' + '(' * 3000 + '1' + ')' * 3000 + ' }}',
    'syntax': '{% if %}',
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_templates_end_soon(name):
    began = time.monotonic()
    with pytest.raises(UserError, match='chat template does not render it'):
        render(HOSTILE[name], [USER], '<s>', '</s>')
    assert time.monotonic() - began < 10
