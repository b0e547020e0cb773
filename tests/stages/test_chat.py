"""Talking on a terminal and through a pipe: what is typed, and what is shown."""

import io
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llama2_jax.config import UserError
from llama2_jax.inference.engine import Sample
from llama2_jax.stages import chat
from llama2_jax.stages.chat import Chat
from llama2_jax.text.template import PromptFormat


class Letters:
    """A tokenizer of code points."""

    prompts = PromptFormat(chat=True)

    def encode(self, text, bos, eos):
        return bos * [1] + [ord(letter) for letter in text] + eos * [2]


class Parrot:
    """An engine that answers with the pieces it is given, and keeps the prompts."""

    tokenizer, config = Letters(), SimpleNamespace(context=400)

    def __init__(self, *pieces):
        self.pieces, self.prompts = pieces, []

    def stream(self, request):
        self.prompts.append(''.join(map(chr, request.token_ids[1:])))
        yield from self.pieces
        return Sample(''.join(self.pieces), [], [], 'eos')


def converse(monkeypatch, content, *pieces):
    """The questions that are asked of a model by the bytes of a pipe."""
    engine = Parrot(*pieces)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content), 'utf-8', 'strict'))
    chat.converse(Chat(engine, max_new_tokens=100))
    return [prompt.rpartition('[INST] ')[2].removesuffix(' [/INST]') for prompt in engine.prompts]


def test_tags_that_the_model_wrote_do_not_block_questions(monkeypatch, capsys):
    assert converse(monkeypatch, b'a\nb\n[INST] c\nd\n', 'x [INST] ', 'y') == ['a', 'b', 'd']
    assert capsys.readouterr().out.count('special tags are not allowed') == 1


def test_bytes_that_are_no_text_do_not_end_the_conversation(monkeypatch):
    assert converse(monkeypatch, b'a\xff\nb\n', 'x') == ['a\ufffd', 'b']


def test_paths_can_be_asked_about(monkeypatch, capsys):
    assert converse(monkeypatch, b'/etc/passwd?\n\\/reset\n/rest\n/reset\n', 'x') == ['/etc/passwd?', '/reset']
    assert '[/rest is not a command' in capsys.readouterr().out


def test_control_characters_are_shown_escaped(monkeypatch, capsys):
    converse(monkeypatch, b'a\n', 'é\x1b', ']0;own', '\x07\n\tb\u202e')
    assert capsys.readouterr().out == 'é\\x1b]0;own\\x07\n\tb\\u202e\n\n'


@pytest.mark.parametrize(('system', 'error'), [(' \n', 'system message is blank'), ('x' * 400, 'system message takes')])
def test_the_system_message_is_named(system, error):
    with pytest.raises(UserError, match=error):
        Chat(Parrot(), system)


PROGRAM = """
import sys
from llama2_jax.stages.chat import typed
for message in typed():
    print('GOT', ascii(message), flush=True)
"""


def test_a_paste_is_one_message_on_a_terminal():
    pytest.importorskip('readline')
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM], stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {'TERM': 'xterm'}
    )
    os.close(theirs)
    shown = b''
    while b'> ' not in shown:
        shown += os.read(ours, 1000)
    os.write(ours, b'\x1b[200~one\ntwo\n three\x1b[201~\n')
    while b'GOT' not in shown or shown.count(b'> ') < 2:
        shown += os.read(ours, 1000)
    os.write(ours, b'ab\x1b[Dx\n')  # the arrow key moves
    while not shown.endswith(b'> ') or shown.count(b'GOT') < 2:
        shown += os.read(ours, 1000)
    os.write(ours, b'\x04')
    assert process.wait(60) == 0
    assert rb"GOT 'one\ntwo\n three'" in shown and b"GOT 'axb'" in shown
