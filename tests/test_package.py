"""What is installed: one set of versions from one lock, the wheel with its programs, and where notebooks fetch it."""

import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
PYTHONS = ('3.11', '3.12', '3.13', '3.14')
EXTRAS = ((), ('tpu',), ('tpu', 'test'), ('cuda12',), ('cuda13',), ('aot', 'test'), ('gcs', 'gguf', 'torch'))


def locked(*extras):
    """The requirements that uv.lock gives to a set of extras."""
    flags = ('--quiet', '--frozen', '--offline', '--no-hashes', '--no-emit-project', '--no-annotate', '--no-header')
    chosen = [word for extra in extras for word in ('--extra', extra)]
    command = [sys.executable, '-m', 'uv', 'export', *flags, *chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in result.stdout.splitlines() if line and not line.startswith('#')]


def version_of(name, lines, python):
    """The one version that a Python on Linux takes; None without one."""
    environment = {'python_version': python, 'python_full_version': f'{python}.1', 'sys_platform': 'linux'}
    found = [r for r in map(Requirement, lines) if r.name == name and (r.marker is None or r.marker.evaluate(environment))]
    assert len(found) <= 1
    return str(found[0].specifier).removeprefix('==') if found else None


def test_requirements_are_those_of_the_lock():
    assert (ROOT / 'requirements.txt').read_text().splitlines()[1:] == locked()


def test_lock_is_of_todays_project():
    """The lock repeats what the project asks for; another answer means that `make lock` was forgotten."""
    lock = tomllib.loads((ROOT / 'uv.lock').read_text())
    [ours] = [package for package in lock['package'] if package['name'] == 'llama2-jax']
    asked = [Requirement(text) for text in PROJECT['dependencies']]
    assert sorted(r.name.lower().replace('_', '-') for r in asked) == sorted(
        entry['name'] for entry in ours['metadata']['requires-dist'] if 'extra ==' not in entry.get('marker', '')
    )
    assert set(ours['metadata']['provides-extras']) == set(PROJECT['optional-dependencies'])


@pytest.mark.parametrize('extras', EXTRAS, ids='+'.join)
def test_one_libtpu_whatever_is_installed_with_it(extras):
    """Extras resolve together, and libtpu is that of the `tpu` extra on every Python."""
    lines, of_the_pods = locked(*extras), locked('tpu')
    for python in PYTHONS:
        assert version_of('jax', lines, python) == ('0.10.2' if python == '3.11' else '0.12.0.1')
        assert version_of('libtpu', lines, python) in (None, version_of('libtpu', of_the_pods, python))
    assert (version_of('libtpu', lines, '3.13') is not None) == bool({'tpu', 'aot', 'test'} & set(extras))


def test_libtpu_here_is_what_jax_asks_for_on_pods():
    asked = [Requirement(text) for text in importlib.metadata.requires('jax')]
    [libtpu] = [r for r in asked if r.name == 'libtpu' and r.marker.evaluate({'extra': 'tpu'})]
    assert importlib.metadata.version('libtpu') in libtpu.specifier


def test_notebooks_fetch_the_project_from_its_address():
    address = PROJECT['urls']['Repository']
    for path in sorted((ROOT / 'notebooks').glob('*.ipynb')):
        first, install = (''.join(cell['source']) for cell in json.loads(path.read_text())['cells'][:2])
        assert f'{address.replace("github.com", "colab.research.google.com/github")}/blob/main/notebooks/{path.name}' in first
        assert f"SOURCE = 'git+{address}'" in install and 'input(' not in install and 'torch' not in install


def test_versions_of_package_citation_and_changelog_agree():
    assert re.search(r'^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.M)[1] == PROJECT['version']
    assert f'## {PROJECT["version"]}' in (ROOT / 'CHANGELOG.md').read_text()


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder that holds what the wheel installs, and nothing of the clone."""
    home = tmp_path_factory.mktemp('wheel')
    build = [sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', home]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = home.glob('*.whl')
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', '--target', home / 'site', wheel]
    subprocess.run(install, check=True, capture_output=True)
    return home / 'site'


def llama2(installed, cwd, *arguments, **options):
    """Runs the console command of the installed wheel elsewhere."""
    environment = os.environ | {'PYTHONPATH': str(installed), 'XLA_FLAGS': ''}
    command = [sys.executable, '-P', installed / 'bin' / 'llama2', *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **options)


def test_wheel_lists_its_commands(installed, tmp_path):
    shown = llama2(installed, tmp_path, '--help')
    programs = {path.stem.replace('_', '-') for path in (ROOT / 'experiments').glob('*.py')} - {'common'}
    assert {line.split()[0] for line in shown.stdout.splitlines()[2:]} == programs and not shown.stderr
    assert llama2(installed, tmp_path, '--version').stdout == f'llama2_jax {PROJECT["version"]}\n'
    wrong = llama2(installed, tmp_path, 'pretrian')
    assert wrong.returncode == 1 and "did you mean 'pretrain'?" in wrong.stderr


@pytest.mark.slow
def test_wheel_trains_and_chats_in_another_folder(installed, tmp_path):
    fields = ('tokens=4096', 'batch_size=4', 'length=64', 'eval_batches=1', 'optimizer.warmup_steps=1', 'model.layers=1')
    settings = itertools.chain.from_iterable(('--set', field) for field in fields)
    trained = llama2(installed, tmp_path, 'pretrain', *settings, '--workdir=run')
    assert trained.returncode == 0, trained.stderr
    chat = llama2(installed, tmp_path, 'chat', '--model=run/model', '--max_new_tokens=4', input='Hello\n')
    assert chat.returncode == 0, chat.stderr
    loaded = llama2(installed, tmp_path, 'report', '--workdir=run')
    assert loaded.returncode == 0 and (tmp_path / 'run' / 'report.html').exists()
