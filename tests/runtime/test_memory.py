"""Programs restart once with malloc settings that keep memory; nothing else restarts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama2_jax.memory import VALUE

PROGRAM = """import os, sys
print('began', flush=True)
import llama2_jax.memory
print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"""


@pytest.mark.skipif(sys.platform != 'linux', reason="glibc's alone")
@pytest.mark.parametrize(
    'folder, given, output',
    [
        ('experiments', {}, f"began\nbegan\n{VALUE} ['--a', 'b c']\n"),
        ('experiments', {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}, "began\nglibc.malloc.hugetlb=0 ['--a', 'b c']\n"),
        ('mine', {}, "began\nNone ['--a', 'b c']\n"),
    ],
)
def test_a_program_starts_anew_once(tmp_path, folder, given, output):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'program.py').write_text(PROGRAM)
    env = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'} | given
    command = [sys.executable, 'program.py', '--a', 'b c']
    done = subprocess.run(command, cwd=tmp_path / folder, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, output), done.stderr


def test_make_asks_for_the_same():
    assert f'export GLIBC_TUNABLES ?= {VALUE}\n' in (Path(__file__).parents[2] / 'Makefile').read_text()
