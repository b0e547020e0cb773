"""Measures how much of the package a reader crosses for one idea; imports are followed in the source.

python benchmarks/structure.py
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'llama2_jax'
IDEAS = {'pretraining step': 'stages/pretrain.py', 'PPO iteration': 'rl/ppo.py', 'evaluation': 'stages/evaluate.py'}


def imports(path: Path) -> set[Path]:
    """Files of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == PACKAGE.name:
            for name in (*(f'{node.module}.{alias.name}' for alias in node.names), node.module):
                file = ROOT / (name.replace('.', '/') + '.py')
                if file.exists():
                    found.add(file)
    return found


def lines(paths: set[Path]) -> int:
    """Lines of all files together."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def behind(path: Path, graph: dict[Path, set[Path]]) -> set[Path]:
    """A file, and all that it imports directly or through others."""
    found, new = set(), {path}
    while new:
        found |= new
        new = set().union(*(graph[file] for file in new)) - found
    return found


def config_fields() -> int:
    """Fields of the dataclasses that --set reaches."""
    count = 0
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(getattr(base, 'id', '').endswith('Config') for base in node.bases):
                count += sum(
                    isinstance(line, ast.AnnAssign) and 'ClassVar' not in ast.unparse(line.annotation) for line in node.body
                )
    return count


def main() -> None:
    """Prints the table."""
    files = set(PACKAGE.rglob('*.py'))
    graph = {path: imports(path) for path in files}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError
    for idea, name in IDEAS.items():
        found = behind(PACKAGE / name, graph)
        print(f'{idea:<44} {len(found):>4} files, {lines(found):>6,} lines')
    stages = set((PACKAGE / 'stages').glob('*.py'))
    print(f'{"imports between files of stages/":<44} {sum(len(graph[path] & stages) for path in stages):>4}')
    print(f'{"fields of configs":<44} {config_fields():>4}')
    naming = {p for p in files if re.search(r'\btoy\b', p.read_text()) and PACKAGE / 'toy' not in p.parents}
    print(f'{"files outside toy/ that name the toy world":<44} {len(naming):>4}')
    print(f'{"lines of package and experiments":<44} {lines(files | set((ROOT / "experiments").glob("*.py"))):>6,}')


if __name__ == '__main__':
    main()
