import dataclasses
import errno
import json
import socket
import subprocess
import sys

import pytest

from llama2_jax.config import UserError
from llama2_jax.runtime.workdir import open_run, open_workdir, report_disk_full


@dataclasses.dataclass(frozen=True)
class Data:
    mixture: str = 'toy:documents'
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10
    rates: tuple[float, ...] = (0.1, 0.2)
    data: Data = Data()


def test_same_config_continues(tmp_path):
    workdir = open_workdir(tmp_path / 'run', Config())
    assert workdir == tmp_path / 'run'
    assert json.loads((workdir / 'config.json').read_text()) == {
        'steps': 10, 'rates': [0.1, 0.2], 'data': {'mixture': 'toy:documents', 'workers': 0},
    }  # fmt: skip
    before = (workdir / 'config.json').read_text()
    open_workdir(tmp_path / 'run', Config())
    assert (workdir / 'config.json').read_text() == before
    assert sorted(path.name for path in workdir.iterdir()) == ['.lock', 'config.json']


def test_two_runs_in_one_workdir(tmp_path):
    """The second of two processes is refused as long as the first lives; the first may open it as often as it likes."""
    program = (
        f'from llama2_jax.runtime.workdir import _lock; from pathlib import Path; _lock(Path({str(tmp_path)!r})); print("mine")'
    )
    other = subprocess.Popen(
        [sys.executable, '-c', f'{program}; input()'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == 'mine\n'
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, Config())
    owner = f'process {other.pid} on {socket.gethostname()}'
    assert str(error.value) == f'{tmp_path} is locked by another run ({owner}): wait until it ends, or use another --workdir.'
    other.kill()
    other.communicate()
    open_workdir(tmp_path, Config())
    open_workdir(tmp_path, Config())


@pytest.mark.parametrize(
    ('config', 'field', 'theirs', 'ours'),
    [
        (Config(steps=20, data=Data('toy:verse')), 'steps', '10', '20'),
        (Config(rates=(0.1,)), 'rates', '[0.1, 0.2]', '[0.1]'),
        (Config(data=Data('toy:verse', 4)), 'data.mixture', '"toy:documents"', '"toy:verse"'),
        (Config(data=Data(workers=4)), 'data.workers', '0', '4'),
        (Data(), 'mixture', 'nothing', '"toy:documents"'),
    ],
)
def test_first_differing_field_is_named(tmp_path, config, field, theirs, ours):
    open_workdir(tmp_path, Config())
    before = (tmp_path / 'config.json').read_text()
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, config)
    assert str(error.value) == (
        f'{tmp_path} belongs to a run with {field}={theirs}, and this one has {field}={ours}: '
        'use the same settings to continue it, or another --workdir.'
    )
    assert (tmp_path / 'config.json').read_text() == before


def test_some_fields_may_change(tmp_path):
    open_workdir(tmp_path, Config(), may_change=('data.workers',))
    open_workdir(tmp_path, Config(data=Data(workers=4)), may_change=('data.workers',))
    assert json.loads((tmp_path / 'config.json').read_text())['data']['workers'] == 4
    open_workdir(tmp_path, Config(data=Data('toy:verse', 2)), may_change=('data',))
    with pytest.raises(UserError, match='data.mixture='):
        open_workdir(tmp_path, Config(), may_change=('dat', 'data.work', 'data.workers'))


def test_until_there_are_results_all_may_change(tmp_path):
    workdir = tmp_path / 'run {1} %'  # which is no pattern
    assert open_run(workdir, Config())[1] is False
    assert open_run(workdir, Config(steps=20))[1] is False
    (workdir / 'checkpoints' / '4').mkdir(parents=True)
    with pytest.raises(UserError, match='belongs to a run with steps=20, and this one has steps=10'):
        open_run(workdir, Config())
    assert open_run(workdir, Config(steps=20))[1] is True


def test_damaged_config_and_unwritable_directory(tmp_path):
    (tmp_path / 'config.json').write_text('{"steps": 1')
    with pytest.raises(UserError, match=r'config.json is damaged'):
        open_workdir(tmp_path, Config())
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file/run cannot be written'):
        open_workdir(tmp_path / 'file' / 'run', Config())


def test_no_space_is_found_in_any_guise(tmp_path):
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(UserError, match=f'No space left while writing to {tmp_path}'), report_disk_full(tmp_path):
            raise OSError(code, 'x')
    with pytest.raises(UserError, match='No space left'), report_disk_full(tmp_path):
        raise ValueError('RESOURCE_EXHAUSTED: writing "d/1": [OS error 28: No space left on device]')
    with pytest.raises(UserError, match='No space left'), report_disk_full(tmp_path):
        try:
            raise OSError(errno.ENOSPC, 'x')
        except OSError as error:
            raise RuntimeError('a thread failed') from error
    with pytest.raises(PermissionError), report_disk_full(tmp_path):
        raise PermissionError(errno.EACCES, 'x')
