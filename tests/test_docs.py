"""What README and docs show: every command is one that our programs take, and the cheap ones run, at a tiny size."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
COMMANDS = [(page.name, words) for page in PAGES for words in commands.commands(page)]
PROGRAMS = [(page, words) for page, words in COMMANDS if words[0] == 'python' and words[1].startswith('experiments/')]

# What makes a documented command small enough to run here; the commands of other programs are read only. README's are run in
# their order, the first of each program, in a directory that has what they name.
SMALL_RUN = ['tokens=2048', 'batch_size=4', 'length=64', 'optimizer.warmup_steps=1', 'model.layers=1', 'eval_batches=1']
SMALLER = {
    'train_tokenizer.py': ['--set', 'vocab_size=512'],
    'pretrain.py': [word for field in [*SMALL_RUN, 'model.vocab_size=512'] for word in ('--set', field)],
    'generate.py': ['--max_new_tokens=8'],
    'convert.py': [],
    'report.py': [],
}


def named(items):
    return {'argnames': ('page', 'words'), 'argvalues': items, 'ids': [f'{page}-{" ".join(words)[:60]}' for page, words in items]}


def test_there_are_commands():
    assert len(PROGRAMS) >= 15 and {'pretrain.py', 'sft.py', 'convert.py', 'generate.py', 'chat.py'} <= {
        Path(words[1]).name for _, words in PROGRAMS
    }


def faults(given):
    """What each of these has against its arguments: [script, arguments] -> ''."""
    text = '\n'.join(map(json.dumps, given))
    result = subprocess.run([sys.executable, ROOT / 'tests' / 'commands.py'], input=text, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_programs_take_them():
    """Flags and presets are there, and paths of --set lead to a field that takes the value."""
    given = [[Path(words[1]).name, words[2:]] for _, words in PROGRAMS]
    answers = faults(given)
    assert len(answers) == len(given)
    assert [answer for answer in answers if answer[2]] == []


def test_and_would_not_take_others():
    """Of the test itself."""
    wrong = [
        (['convert.py', ['--inputs=a']], "Unknown command line flag 'inputs'"),
        (['pretrain.py', ['--set', 'model.layer=2', '--workdir=x']], "ModelConfig has no field 'layer'"),
        (['pretrain.py', ['--config=7b', '--workdir=x']], 'no preset 7b'),
        (['sft.py', []], 'no --workdir'),
    ]
    for (given, said), answer in zip(wrong, faults([given for given, _ in wrong]), strict=True):
        assert answer[:2] == given and said in answer[2]


@pytest.mark.parametrize(**named([item for item in COMMANDS if item not in PROGRAMS]))
def test_other_commands(page, words):
    program, *rest = words
    if program == 'make':
        assert set(re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)) >= {w for w in rest if '=' not in w}
    elif program == 'pip':
        extras = set(tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies'])
        assert set(re.findall(r'\w+', ''.join(re.findall(r'\[(.*?)\]', ' '.join(rest))))) - {'tpu'} <= extras
    elif program == 'python' and rest[0] == '-m':
        assert rest[1] in ('llama2_jax.runtime', 'pytest')
    elif program == 'python':
        script = ROOT / rest[0]
        assert {word.lstrip('-').partition('=')[0] for word in rest[1:] if word.startswith('--')} <= commands.flags_of(script)
    elif program.endswith('.sh'):
        variables = {'POD': 'mine', 'ZONE': 'z', 'POD_FILE': '/dev/null'}
        run = subprocess.run([ROOT / program, '--dry_run', *rest], env=os.environ | variables, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout.startswith('gcloud '), run.stderr
    else:
        assert program.startswith('tpu_setup/pod.env')


def test_python_in_the_pages_finds_what_it_imports():
    sources = [text for page in PAGES for language, text in commands.blocks(page) if language == 'python']
    assert sources
    for node in (node for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)):
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r'\]\((?!http)([^)#]+)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


@pytest.mark.slow
def test_the_readme_runs(tmp_path):
    """Top to bottom: the first command of each program whose input is there by then."""
    for name in ('experiments', 'llama2_jax'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'corpus').mkdir()
    from llama2_jax.data import toy

    for number, document in zip(range(60), toy.documents('stories'), strict=False):
        (tmp_path / 'corpus' / f'{number}.txt').write_text(document)
    done = set()
    for page, words in PROGRAMS:
        script = Path(words[1]).name
        inputs = [word.partition('=')[2] for word in words if re.match('--(input|model|prompts|workdir=demo)', word)]
        if (
            page != 'README.md'
            or script in done
            or script not in SMALLER
            or not all((tmp_path / name).exists() for name in inputs)
        ):
            continue
        if any(word.startswith(('--dry_run', '--config')) for word in words):
            continue
        command, environment = [sys.executable, *words[1:], *SMALLER[script]], os.environ | {'XLA_FLAGS': ''}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (words, result.stderr[-2000:])
        done.add(script)
    assert done >= {'train_tokenizer.py', 'pretrain.py', 'generate.py', 'convert.py'}
    assert (tmp_path / 'out-hf' / 'model.safetensors').exists()
