"""The notebooks, top to bottom at toy size: the settings of their cell of parameters made small, and one small model for all."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / 'notebooks'
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


def execute(name, directory):
    """The notebook after it has run in the directory."""
    notebook = nbformat.read(NOTEBOOKS / f'{name}.ipynb', as_version=4)
    [cell] = [cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', [])]
    cell.source += ''.join(f'\n{key} = {value!r}' for key, value in PARAMETERS[name].items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XLA_FLAGS', '')  # one device
        return NotebookClient(notebook, timeout=600, resources={'metadata': {'path': directory}}).execute()


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


def test_all_are_here():
    assert sorted(path.stem for path in NOTEBOOKS.glob('*.ipynb')) == sorted(PARAMETERS)
