"""The notebooks, top to bottom at toy size: the settings of their cell of parameters made small, and one small model for all."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / 'notebooks'
# Colab's versions of 2026: those of the packages that this project replaces, of one that needs an old numpy, and of its kernel.
COLAB = ('numpy==2.1.3', 'jax==0.7.2', 'flax==0.11.2', 'numba==0.61.2', 'ipykernel==6.17.1', 'ipython==7.34.0')
TINY = ['batch_size=4', 'optimizer.warmup_steps=1', 'loop.eval_every=4', 'eval_batches=1']
PRETRAIN = ['data.mixture=toy:letters', 'tokens=4096', 'length=128', 'model.layers=1', 'model.dim=64', *TINY]
SFT = ['data.mixture=toy:harmless', 'data.epochs=0.05', 'grade=false', *TINY]
PARAMETERS = {
    'quickstart': {'PRETRAIN': PRETRAIN, 'SFT': SFT},
    'chat_with_llama2': {'MODEL': 'quickstart/sft/model', 'MAX_NEW_TOKENS': 16},
    'sft_lora': {'SETTINGS': ['lora.rank=2', 'data.epochs=1', 'grade=false', *TINY]},
    'export_to_pytorch': {},
    'rlhf_toy': {
        'REWARD': ['data.mixture=toy:safety_preferences', 'data.epochs=0.02', 'reference=toy:harmless', 'length=256', *TINY[:1]],
        'PPO': ['prompts.mixture=toy:safety_prompts', *TINY[:1], 'minibatch_size=4', 'iterations=1', 'eval_prompts=4', 'judge='],
    },
}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # of Jupyter's own


def execute(name, directory, kernel='python3', adapt=lambda notebook: None):
    """The notebook after it has run in the directory."""
    notebook = nbformat.read(NOTEBOOKS / f'{name}.ipynb', as_version=4)
    [cell] = [cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', [])]
    cell.source += ''.join(f'\n{key} = {value!r}' for key, value in PARAMETERS[name].items())
    adapt(notebook)
    resources = {'metadata': {'path': directory}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XLA_FLAGS', '')  # one device
        return NotebookClient(notebook, timeout=600, kernel_name=kernel, resources=resources).execute()


def output(notebook):
    """What its cells have printed."""
    texts = (out.get('text', '') for cell in notebook.cells if cell.cell_type == 'code' for out in cell.outputs)
    return ''.join(texts)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('notebooks')


@pytest.fixture(scope='module')
def quickstart(home):
    return execute('quickstart', home)


def test_quickstart(quickstart, home):
    displays = [
        data for cell in quickstart.cells if cell.cell_type == 'code' for out in cell.outputs if (data := out.get('data'))
    ]
    curves = [data['text/html'] for data in displays if 'iframe srcdoc' in data.get('text/html', '')]
    assert len(curves) == 2 and all('data-chart' in page and 'Learning rate' in page for page in curves)
    assert '> What is the pet of Mira?' in output(quickstart)
    assert (home / 'quickstart' / 'report.html').stat().st_size > 20_000


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('chat_with_llama2', r'parameters, a context of 256 tokens\n> What is .*tokens: <s> .*\n- '),
        ('sft_lora', r"before: .*after: .*\['adapter_config.json', 'adapter_model.safetensors'"),
        ('rlhf_toy', r'--- before\n> .*--- after\n> '),
        ('export_to_pytorch', r'tokens; logits differ by [\d.]+e-0\d at most\nOnce upon a time'),
    ],
)
def test_the_others(quickstart, home, name, said):
    assert re.search(said, output(execute(name, home)), re.DOTALL)


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """The Python of a kernel named 'colab', whose environment has Colab's versions."""
    found = [*sorted(Path.home().glob('.pyenv/versions/3.13*/bin/python')), shutil.which('python3.13')]
    base = next((path for path in found if path and subprocess.run([path, '-c', 'import ensurepip']).returncode == 0), None)
    if base is None:
        pytest.skip('Colab has Python 3.13, and there is no python3.13 here.')
    python = tmp_path / 'venv/bin/python'
    subprocess.run([base, '-m', 'venv', tmp_path / 'venv'], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', *COLAB], check=True)
    kernel = tmp_path / 'jupyter/kernels/colab/kernel.json'
    kernel.parent.mkdir(parents=True)
    argv = [str(python), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    kernel.write_text(json.dumps({'argv': argv, 'display_name': 'Colab', 'language': 'python'}))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    return python


def test_colab_installs_restarts_once_and_runs(colab, tmp_path):
    home = tmp_path / 'content'
    home.mkdir()

    def adapt(notebook):
        """The package comes from this checkout, and the session has begun with Colab's numpy."""
        install = notebook.cells[1]
        address = re.search(r"^SOURCE = '(.*)'$", install.source, re.M)[1]
        install.source = install.source.replace(address, f'file://{ROOT}')
        if not list(colab.parents[1].glob('lib/*/site-packages/llama2_jax')):
            notebook.cells.insert(1, nbformat.v4.new_code_cell("import numpy\nassert numpy.__version__ == '2.1.3'"))

    with pytest.raises(DeadKernelError):
        execute('quickstart', home, 'colab', adapt)
    assert not (home / 'quickstart').exists()
    assert '> What is the pet of Mira?' in output(execute('quickstart', home, 'colab', adapt))
    versions = subprocess.check_output([colab, '-m', 'pip', 'freeze'], text=True)
    assert re.search(r'^jax==0\.12\.', versions, re.M) and 'llama2_jax @ file://' in versions


def test_all_are_here():
    assert sorted(path.stem for path in NOTEBOOKS.glob('*.ipynb')) == sorted(PARAMETERS)
