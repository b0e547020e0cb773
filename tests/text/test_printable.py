"""Text that is not ours, as people see it."""

import json

import pytest

from llama2_jax import runtime
from llama2_jax.config import UserError
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.text.printable import printable

OWN = '\x1b]0;own\x07'
SHOWN = r'\x1b]0;own\x07'


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        (OWN, SHOWN),
        ('a\r\nb\tc\x7f\x00', 'a\\r\nb\tc\\x7f\\x00'),
        ('\x9b31m', r'\x9b31m'),
        ('a\u202eb\u2066\u200f\ufeff\u2028\ud800', r'a\u202eb\u2066\u200f\ufeff\u2028\ud800'),
        ('naïve 日本 🙂 👨\u200d👩\u200d👧 می\u200cخواهم', 'naïve 日本 🙂 👨\u200d👩\u200d👧 می\u200cخواهم'),
    ],
)
def test_what_is_escaped(text, shown):
    assert printable(text) == shown
    assert ''.join(map(printable, text)) == shown  # so pieces of a stream may end anywhere
    assert printable(shown) == shown


def test_one_line():
    assert printable('a\n\tb', line=True) == r'a\n\tb'


def test_errors_show_a_rows_field_names_and_paths_escaped(tmp_path, capsys):
    folder = tmp_path / f'data{OWN}'
    folder.mkdir()
    (folder / 'a.jsonl').write_text(json.dumps({OWN: 1}) + '\n')
    with pytest.raises(SystemExit) as stopped, runtime.user_errors():
        list(read_dialogs(f'jsonl:{folder}/a.jsonl'))
    assert '\x1b' not in stopped.value.code and stopped.value.code.count(SHOWN) >= 2
    with pytest.raises(SystemExit) as stopped, runtime.user_errors():
        raise UserError(f'{OWN} is missing')
    assert stopped.value.code == f'Error: {SHOWN} is missing'
    runtime.log(OWN)
    assert capsys.readouterr().out == f'{SHOWN}\n'
