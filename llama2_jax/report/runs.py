"""What lies in a workdir, or in a tree of them, as far as it can be shown; nothing is taken for granted."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2_jax.config import UserError
from llama2_jax.train.metrics import read_metrics

# What is not a run's own: models, states, and files that others hold too.
SKIPPED = {'model', 'checkpoints', 'tensorboard', 'adapters', 'params', 'rollouts', 'samples', '.ipynb_checkpoints'}
LARGEST = 2_000_000  # bytes of a JSON file or picture that is shown


@dataclasses.dataclass(frozen=True)
class Run:
    """A directory with something to show.

    Attributes:
      name: its path from the root; '' for the root itself.
      config: as the run resolved it.
      provenance: stage, parent and step of the model it has made.
      metrics: the lines of metrics.jsonl.
      samples: the text of samples.md.
      tables: contents of other JSON files, by name.
      notes: texts of other Markdown files, by name.
      pictures: PNG files.
    """

    name: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: str
    tables: dict[str, Any]
    notes: dict[str, str]
    pictures: tuple[Path, ...]

    @property
    def stage(self) -> str:
        """What the run is: as its model says, or by its name."""
        return self.provenance.get('stage') or self.name.rpartition('/')[2] or 'run'

    def last(self, key: str) -> Any:
        """The last value of a figure; None if it has none."""
        return next((line[key] for line in reversed(self.metrics) if line.get(key) is not None), None)


def find_runs(root: Path) -> list[Run]:
    """All there is under `root`, the oldest first.

    Raises:
      UserError: there is no such directory, or nothing in it to show.
    """
    if not root.is_dir():
        raise UserError(f'--workdir={root} is no directory.')
    runs = []
    for directory, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in SKIPPED)
        files = sorted(name for name in files if os.path.isfile(os.path.join(directory, name)))  # no pipes, no links to nothing
        if run := read_run(Path(directory), root, files):
            runs.append((min(os.path.getmtime(os.path.join(directory, name)) for name in files), run))
    if not runs:
        raise UserError(f'There is nothing to report in {root}: neither metrics.jsonl nor samples.md nor results.')
    # What is said of all comes first; and a stage's own base model, which is younger than its directory, before the stage.
    return [run for _, run in sorted(runs, key=lambda pair: (pair[1].name != '', pair[0], -pair[1].name.count('/')))]


def read_run(directory: Path, root: Path, files: list[str]) -> Run | None:
    """A directory as a run; None if it holds nothing of one."""
    tables, notes, pictures = {}, {}, []
    for name in files:
        path = directory / name
        if name == 'config.json' or path.stat().st_size > LARGEST:
            continue
        if name.endswith('.json'):
            tables[name.removesuffix('.json')] = read_json(path)
        elif name.endswith('.md') and name != 'samples.md':
            notes[name.removesuffix('.md')] = path.read_text(encoding='utf-8', errors='replace')
        elif name.endswith('.png') and name != 'loss.png':
            pictures.append(path)
    has_metrics = 'metrics.jsonl' in files
    if not (has_metrics or 'samples.md' in files or tables or notes or pictures):
        return None
    made = as_object(as_object(read_json(directory / 'model' / 'config.json')).get('provenance'))
    return Run(
        name='' if directory == root else directory.relative_to(root).as_posix(),
        config=as_object(read_json(directory / 'config.json')),
        provenance=made,
        metrics=[numbers(line) for line in read_metrics(directory / 'metrics.jsonl')] if has_metrics else [],
        samples=(directory / 'samples.md').read_text(encoding='utf-8', errors='replace') if 'samples.md' in files else '',
        tables={name: table for name, table in tables.items() if table},
        notes=notes,
        pictures=tuple(pictures),
    )


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """The finite numbers of a line of metrics: a diverged loss is a gap in its curve."""
    return {name: value for name, value in line.items() if isinstance(value, int | float) and math.isfinite(value)}


def read_json(path: Path) -> Any:
    """Its content; None where there is none that can be read: half a file is no reason to show nothing."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return None


def sections(samples: str) -> list[tuple[int, str]]:
    """The sections of a samples.md by step; what stands before the first has step -1."""
    parts = re.split(r'^<!-- step (\d+) -->\n## Step \d+\n', samples, flags=re.MULTILINE)
    return [(-1, parts[0].strip())] + [(int(step), text.strip()) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


def answers(section: str) -> dict[str, str]:
    """Question -> answer, of a section that answers questions: as paragraphs, or in a table with such columns."""
    found = {}
    for question, quote in re.findall(r'^\*\*(.+?)\*\*\n\n((?:>.*\n?)+)', section, re.MULTILINE):
        found[question] = re.sub(r'^> ?', '', quote, flags=re.MULTILINE).strip()
    for row in markdown_rows(section.splitlines()):
        if 'prompt' in row and 'answer' in row:
            found[row['prompt']] = row['answer']
    return found


def markdown_rows(lines: list[str]) -> Iterator[dict[str, str]]:
    """The rows of the tables among lines of Markdown, by column."""
    columns: list[str] = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip('|').split('|')]
        if not line.lstrip().startswith('|'):
            columns = []
        elif not columns:
            columns = cells
        elif set(line) - set('|-: '):
            yield dict(zip(columns, cells, strict=False))
