"""The console command `llama2 NAME …`: runs the program `experiments/NAME.py`, which is installed with the package."""

import ast
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

from llama2_jax.config import nearest

_PACKAGE = Path(__file__).parent
# A wheel holds the programs inside the package; in a clone they stand beside it.
EXPERIMENTS = next(folder for folder in (_PACKAGE / 'experiments', _PACKAGE.parent / 'experiments') if folder.is_dir())


def programs() -> dict[str, Path]:
    """Maps the name of each command, such as 'reward-model', to its program."""
    return {path.stem.replace('_', '-'): path for path in sorted(EXPERIMENTS.glob('*.py')) if path.stem != 'common'}


def main() -> None:
    """Runs a program with the remaining arguments, as `python experiments/NAME.py` does; lists all programs without a name."""
    name, *arguments = sys.argv[1:] or ['--help']
    known = programs()
    if name == '--version':
        print(f'llama2_jax {version("llama2_jax")}')
    elif name in ('--help', '-h', 'help'):
        print('llama2 NAME [--flags]; `llama2 NAME --help` shows an example and the flags.\n')
        for command, path in known.items():
            print(f'  {command:<21} {ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]}')
    elif name.replace('_', '-') not in known:
        sys.exit(f'llama2 {name}: no such command; {nearest(name, known)}')
    else:
        program = str(known[name.replace('_', '-')])
        sys.argv = [program, *arguments]
        sys.path.insert(0, str(EXPERIMENTS))  # as Python does for a program; its presets import each other
        runpy.run_path(program, run_name='__main__')
