"""Who imports whom, and the command lines."""

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path for path in (ROOT / 'experiments').glob('*.py') if path.stem != 'common')

# What each part of the package may import of the others; never its own users.
BASE = {'config', 'files', 'text'}
MACHINE = BASE | {'mesh', 'runtime'}
DATA = MACHINE | {'data', 'toy'}
TRAIN = MACHINE | {'ops', 'train', 'planning'}
MODEL = TRAIN | {'model', 'checkpoints', 'inference'}
STAGES = MODEL | DATA | {'evals', 'inputs', 'made_from', 'stages'}
ALLOWED = {
    '': {'checkpoints', 'inference'},
    'config': set(),
    'cli': {'config'},
    'files': {'config'},
    'text': {'config', 'files'},
    'mesh': BASE | {'runtime'},
    'runtime': BASE,
    'ops': MACHINE,
    'planning': MACHINE,
    'train': MACHINE | {'ops'},
    'model': MACHINE | {'ops'},
    'checkpoints': TRAIN | {'model'},
    'inference': MODEL,
    'data': BASE | {'runtime', 'toy'},
    'toy': {'data', 'evals', 'inference', 'text'},
    'evals': MODEL | {'data', 'toy'},
    'inputs': MODEL | {'data'},
    'made_from': MODEL | {'data'},
    'stages': STAGES,
    'safety': STAGES | {'rl', 'report'},
    'rl': STAGES | {'rl', 'safety'},
    'report': BASE | {'runtime', 'train'},
}


def modules():
    """Module name -> file, of the package."""
    for path in (ROOT / 'llama2_jax').rglob('*.py'):
        parts = path.relative_to(ROOT).with_suffix('').parts
        yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts), path


@cache
def imports(path, top_only=False):
    """Full names that a file imports, those inside functions too unless `top_only`."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: imports are absolute'
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def part(module):
    """'llama2_jax.train.loop' -> 'train'; '' for the package itself."""
    return (module.split('.') + [''])[1]


def test_imports_flow_one_way():
    for module, path in modules():
        for imported in imports(path):
            if imported.startswith('llama2_jax.') and part(imported) != part(module):
                assert part(imported) in ALLOWED[part(module)], f'{path.relative_to(ROOT)} must not import {imported}'
            assert not imported.startswith(('experiments', 'common', 'tests')), path


def test_no_import_cycles():
    known = dict(modules())
    graph = {module: {name for name in imports(path) if name in known and name != module} for module, path in known.items()}
    graph.pop('llama2_jax')  # imports what it shows only when asked for it
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index('llama2_jax.config') < order.index('llama2_jax.stages.pretrain')


def test_only_experiments_read_flags():
    """But for grain's own flag, which data/pretrain.py marks as parsed where no program has."""
    readers = {path.relative_to(ROOT).as_posix() for _, path in modules() if any(n.startswith('absl') for n in imports(path))}
    assert readers <= {'llama2_jax/data/pretrain.py'}
    text = (ROOT / 'llama2_jax/data/pretrain.py').read_text()
    assert set(re.findall(r'flags\.\w+(?:\.\w+)?', text)) <= {'flags.FLAGS.is_parsed', 'flags.FLAGS.mark_as_parsed'}


def test_torch_and_tensorflow_are_never_needed():
    extras = {'torch', 'tensorflow', 'transformers', 'gguf', 'peft'}
    for _, path in modules():
        assert not {name.split('.')[0] for name in imports(path, top_only=True)} & extras, path


def run(*arguments, cwd=ROOT):
    environment = {'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu', 'HOME': str(cwd)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_help_shows_a_runnable_example(path):
    shown = run(path, '--help')
    assert f'python experiments/{path.name} ' in shown.stdout
    assert 'Traceback' not in shown.stderr


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_every_preset_shows_its_command(path):
    tree = ast.parse(path.read_text())
    listed = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == 'PRESETS']
    if not listed:
        return  # a tool
    presets = {key.value for key in listed[0].keys}
    assert 'tiny' in presets
    functions = {node.name: ast.get_docstring(node) or '' for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name, value in zip(listed[0].keys, listed[0].values, strict=True):
        config = '' if name.value == 'tiny' else f'--config={name.value} '
        assert f'python experiments/{path.name} {config}' in functions[value.id], name.value


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train_tokenizer', '--config=smal'], "Error: --config=smal: no such preset; did you mean 'small'?"),
        (['train_tokenizer'], 'Error: --workdir=DIR is missing: name the directory of the run.'),
        (
            ['train_tokenizer', 'vocab_size=2'],
            "Error: Unknown argument 'vocab_size=2'; settings are given as --set path.to.field=value.",
        ),
        (
            ['pretrain', '--set', 'model.layer=2'],
            "Error: --set model.layer: ModelConfig has no field 'layer'; did you mean 'layers'?",
        ),
        (['pretrain', '--set', 'length=512'], 'Error: length=512 exceeds model.context=256.'),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path):
    stage, *rest = arguments
    result = run(ROOT / 'experiments' / f'{stage}.py', *rest, cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[-1:], result.stdout) == (1, [message], '')
    assert 'Traceback' not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags(tmp_path):
    result = run(ROOT / 'experiments' / 'pretrain.py', '--confg=tiny', cwd=tmp_path)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert "Unknown command line flag 'confg'. Did you mean: config ?" in result.stderr


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks').rglob('*.py')), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path):
    """No test runs most of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'llama2_jax':
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert all(importlib.util.find_spec(f'{node.module}.{name}') for name in missing), missing
