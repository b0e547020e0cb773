import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, full when that is written."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('mounting a small file system is not allowed here')
    yield disk
    subprocess.run(['umount', disk], check=True)
