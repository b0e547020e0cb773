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


def settings(*fields):
    return [word for field in fields for word in ('--set', field)]


# What makes a documented command small enough to run here; the commands of other programs are read only. README's are run in
# their order, in a directory that has what they name.
ROUND = ('count=48', 'samples=2', 'temperatures=1.0,', 'sft.grade=false', 'sft.data.epochs=1')
ITERATION = ('iterations=1', 'batch_size=8', 'minibatch_size=4', 'eval_prompts=4')
PAIRS = ('data.epochs=0.1', 'batch_size=16', 'optimizer.warmup_steps=1', 'loop.eval_every=0', 'eval_batches=1')
REWARDS = ('rewards.helpfulness=rm-help/model', 'rewards.safety=rm-safe/model')
RUN = ('README.md', 'toy_recipe.md')  # pages whose commands and Python run, see test_readme_and_toy_recipe_run
SMALLER = {
    'train_tokenizer.py': settings('vocab_size=512'),
    'pretrain.py': settings(
        *('tokens=8192', 'batch_size=4', 'length=64', 'eval_batches=1', 'optimizer.warmup_steps=1'),
        *('model.layers=1', 'model.vocab_size=512', 'model.heads=8', 'model.kv_heads=8', 'model.head_dim=16'),
    ),
    'generate.py': ['--max_new_tokens=8'],
    'sft.py': settings(
        'init_from=run/model', 'data.mixture=toy:dialogs:0.2x', 'data.epochs=1', 'loop.eval_every=0', 'eval_batches=1'
    ),
    'ghost_attention.py': settings('model=sft/model', 'samples=1', 'count=8', 'judged=2', 'turns=3', 'sft.data.mixture='),
    'context_distillation.py': settings('model=sft/model', 'safety=rm-safe/model'),
    'reward_model.py': settings('init_from=sft/model', *PAIRS),
    'dpo.py': settings('init_from=sft/model', *PAIRS),
    'evaluate.py': ['--limit=8'],
    'rejection_sampling.py': settings('sample_from=sft/model', *ROUND),
    'collect_preferences.py': settings('count=32'),
    'ppo.py': settings(*ITERATION),
    'rlhf.py': settings(
        *('init_from=sft/model', *REWARDS, 'versions=1', 'evaluation=toy:safety_prompts', 'collect.count=32'),
        *(f'rejection.{field}' for field in ROUND),
        *(f'reward.{field}' for field in PAIRS),
        *(f'ppo.{field}' for field in ITERATION),
    ),
    'convert.py': [],
    'report.py': [],
}
INPUT = re.compile(r'(?:--\w+|[\w.]*(?:model|models|init_from|sample_from|safety|helpfulness))=([\w-]+(?:/\w+)?)$')
OUTPUT = re.compile(r'--(output|workdir|to|dtype)=')


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


def test_python_is_where_it_runs():
    assert [page.name for page in PAGES if any(language == 'python' for language, _ in commands.blocks(page))] == ['README.md']


def test_prose_wraps_at_100_columns():
    prose = re.compile(r'^(?![|#<]|    ).{101,}$', re.MULTILINE)
    for page in PAGES:
        text = re.sub(r'^ *```.*?^ *```|https?://\S+|\]\(\S+\)', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert [line for line in prose.findall(text) if ' ' in line[:100].strip()] == [], page.name


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r'\]\((?!http)([^)#]+)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def misses(words, home):
    """What a command is to read that is not there."""
    named = [match[1] for word in words if not OUTPUT.match(word) and (match := INPUT.match(word))]
    named += [word.partition('=')[2] for word in words if word.startswith('--prompts=') and 'toy:' not in word]
    return [name for name in named if ('/' in name or '.' in name or '-' in name) and not (home / name).exists()]


def smaller(words):
    """A command with settings that make it small enough to run here."""
    script = Path(words[1]).name
    many = script == 'reward_model.py' and not any(word.startswith('--config=') for word in words)  # pairs, in its first preset
    return [words[1], *SMALLER[script], *(settings('data.mixture=toy:preferences') if many else []), *words[2:]]


@pytest.mark.slow
def test_readme_and_toy_recipe_run(tmp_path):
    """Every command that needs no weights or data of others, in an order in which each finds its inputs; then the Python."""
    for name in ('experiments', 'llama2_jax'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'corpus').mkdir()
    from llama2_jax import toy

    for genre in toy.GENRES:
        for number, document in zip(range(40), toy.documents(genre), strict=False):
            (tmp_path / 'corpus' / f'{genre}-{number}.txt').write_text(document)
    waiting = [
        smaller(words)
        for page, words in PROGRAMS
        if page in RUN
        and Path(words[1]).name in SMALLER
        and not any(re.match('--(dry_run|topology|config=(?!tiny)|workdir=demo)', word) for word in words)
    ]
    waiting = [words for number, words in enumerate(waiting) if words not in waiting[:number]]
    done = set()
    while runnable := [words for words in waiting if not misses(words, tmp_path)]:  # some need what comes later on the page
        words = runnable[0]
        waiting.remove(words)
        environment = os.environ | {'XLA_FLAGS': ''}
        command = [sys.executable, *words]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (words, result.stderr[-2000:])
        done.add(Path(words[0]).name)
    assert done == set(SMALLER)
    left = {name for words in waiting for name in misses(words, tmp_path)}
    assert left <= {'llama2-7b', 'Llama-2-7b-hf', 'prompts.jsonl'}, left
    (tmp_path / 'demo').symlink_to(tmp_path)
    [program] = [text for language, text in commands.blocks(ROOT / 'README.md') if language == 'python']
    result = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and re.search(r'\[-?[\d.]+\]$', result.stdout), result.stderr[-2000:]
    assert (tmp_path / 'out-hf' / 'model.safetensors').exists()
    assert (tmp_path / 'versus' / 'versus.json').exists() and (tmp_path / 'rlhf' / 'versions.md').exists()
