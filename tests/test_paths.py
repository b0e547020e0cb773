"""Paths: what can be written, and which addresses are known."""

import pytest

from llama2_jax.config import UserError
from llama2_jax.files import check_writable, locate


@pytest.fixture
def home(tmp_path):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'directory').mkdir()
    (tmp_path / 'dangling').symlink_to('nothing')
    return tmp_path


@pytest.mark.parametrize(
    ('path', 'directory'),
    [
        ('file/below', False), ('file/below', True), ('file', True), ('directory', False), ('dangling', False),
        ('dangling/below', True), ('x' * 300, False), ('/proc/x', False), ('/proc/x', True),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_found_first(home, path, directory):
    with pytest.raises(UserError, match='^--output=.*cannot be written'):
        check_writable('--output', str(home / path), directory)


@pytest.mark.parametrize(('path', 'directory'), [('file', False), ('directory', True), ('new', True), ('new/deep/file', False)])
def test_checking_writes_nothing(home, path, directory):
    before = sorted(home.rglob('*'))
    check_writable('--output', home / path, directory)
    assert sorted(home.rglob('*')) == before


@pytest.mark.parametrize('address', ['http://example.org/x', 'ftp://x', 'file:///tmp/x', '://', 'gs:/bucket/x://y'])
def test_unknown_addresses_are_refused(address):
    with pytest.raises(UserError, match='address'):
        locate(address)
