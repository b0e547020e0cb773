"""One HTML file that shows a run, or a tree of them: curves, tables and samples, without a network, in light and dark."""

import base64
import html
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2_jax.config import UserError
from llama2_jax.files import is_remote, write_atomically
from llama2_jax.report import markdown
from llama2_jax.report.curves import by_count, calibration, curves, plane
from llama2_jax.report.runs import Run, answers, find_runs, sections
from llama2_jax.runtime.workdir import report_disk_full
from llama2_jax.text.printable import printable

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
MOST_ROWS = 60  # of a table or of samples
# Figures to look at first, where a run has them.
CARDS = (
    *('tokens', 'loss', 'heldout/loss', 'heldout/accuracy', 'toy/learnable/exact', 'toy/stops'),
    *('heldout/score', 'heldout/judge', 'kl'),
)


def write_report(workdir: str, output: str = '') -> Path:
    """Writes the report on `workdir` to `output`, by default report.html in it; returns where it is.

    Raises:
      UserError: there is nothing to report, or it cannot be written.
    """
    if is_remote(workdir):
        raise UserError(f'--workdir={workdir} lies in a bucket: copy it to a disk first, without checkpoints/ and model/params/.')
    root = Path(workdir)
    path = Path(output) if output else root / 'report.html'
    text = page(root.absolute().name, find_runs(root))
    try:
        with report_disk_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, printable(text))
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}.') from None
    return path


def page(title: str, runs: Sequence[Run]) -> str:
    """The whole document."""
    links = ''.join(f'<a href="#{anchor(run)}">{html.escape(run.name or title)}</a>' for run in runs) if len(runs) > 1 else ''
    body = [f'<header><h1>{html.escape(title)}</h1><nav>{links}</nav></header><main>']
    body += [side_by_side(runs)]
    body += [section(run, title) for run in runs]
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in PACKAGES)
    body.append(f'</main><footer>llama2_jax · Python {platform.python_version()}, {versions}</footer>')
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """HTML with our style and script in it."""
    style, script = (Path(__file__).with_name(name).read_text(encoding='utf-8') for name in ('page.css', 'page.js'))
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{html.escape(title)}</title><style>{style}</style>'
    lines = ['<!doctype html>', f'<html lang="en"><head>{head}</head><body>', *body, f'<script>{script}</script></body></html>\n']
    return '\n'.join(lines)


def anchor(run: Run) -> str:
    """The address of a run on the page."""
    return 'run-' + ''.join(letter if letter.isalnum() else '-' for letter in run.name)


def section(run: Run, title: str) -> str:
    """What there is to see of a run."""
    parent = '/'.join(Path(str(run.provenance.get('parent') or '')).parts[-3:])
    lineage = f'<p class="lineage">{html.escape(parent)} → <b>{html.escape(run.stage)}</b></p>' if parent else ''
    parts = [f'<section id="{anchor(run)}"><h2>{html.escape(run.name or title)}</h2>{lineage}', cards(run)]
    figures = curves(run.metrics) + [picture for name, table in run.tables.items() for picture in drawn(name, table)]
    parts.append(f'<div class="charts">{"".join(figures)}</div>' if figures else '')
    parts += [pictured(path) for path in run.pictures]
    parts += [tabled(name, rows) for key, table in run.tables.items() for name, rows in markdown.tables_of(key, table)]
    parts += [folded(name, markdown.render(text), True) for name, text in run.notes.items()]
    parts.append(sampled(run))
    if run.config:
        settings = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
        parts.append(folded('config.json', f'<pre>{settings}</pre>'))
    return ''.join(parts) + '</section>'


def cards(run: Run) -> str:
    """The figures to look at first."""
    found: dict[str, str] = {}
    if run.metrics:
        last = run.metrics[-1]
        found['steps'] = f'{last["step"]:,}'
        for key in CARDS:
            if (value := run.last(key)) is not None:
                share = key.startswith('toy/') or key.endswith('accuracy')
                found[key] = f'{value:.1%}' if share else markdown.number(value)
        if seconds := last.get('seconds'):
            found['time'] = f'{seconds / 60:.1f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'
        if speed := run.last('tokens_per_second'):
            found['tokens/s'] = f'{speed:,.0f}'
    names = {name: html.escape(name).replace('/', '/<wbr>') for name in found}
    inner = ''.join(f'<div class="card"><b>{value}</b><span>{names[name]}</span></div>' for name, value in found.items())
    return f'<div class="cards">{inner}</div>' if inner else ''


def drawn(name: str, table: Any) -> list[str]:
    """Charts of the tables that have one."""
    found = [chart(title, rows) for title, rows in markdown.tables_of(name, table) for chart in (calibration, plane, by_count)]
    return [picture for picture in found if picture]


def tabled(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a JSON file as a table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column) for column in columns] for row in rows[:MOST_ROWS]]
    more = f'<p>… and {len(rows) - MOST_ROWS:,} more.</p>' if len(rows) > MOST_ROWS else ''
    return folded(name, markdown.table(columns, cells) + more, opened=len(rows) <= 20)


def folded(title: str, inner: str, opened: bool = False) -> str:
    """Something under a title that opens it."""
    return f'<details{" open" if opened else ""}><summary>{html.escape(title)}</summary>{inner}</details>' if inner else ''


def pictured(path: Path) -> str:
    """A picture in the page itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    return folded(path.name, f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">', True)


def sampled(run: Run) -> str:
    """What the model wrote, at first, in the middle and at last, side by side."""
    if not run.samples:
        return ''
    first, *rest = sections(run.samples)
    parts = [folded('What is trained', markdown.render(first[1], marks=True), True)]
    chosen = list({step: (step, text) for step, text in [rest[0], rest[len(rest) // 2], rest[-1]]}.values()) if rest else []
    by_step = {f'step {step:,}': answers(text) for step, text in chosen}
    if all(by_step.values()) and by_step:
        parts.append(folded('What it answers', compare(by_step), True))
    else:
        columns = ''.join(f'<div><h4>step {step:,}</h4>{markdown.render(text)}</div>' for step, text in chosen)
        parts.append(folded('What it writes', f'<div class="columns">{columns}</div>', True) if columns else '')
    return ''.join(parts)


def side_by_side(runs: Sequence[Run]) -> str:
    """The last answers of several runs to the same questions."""
    last = {run.name: answers(sections(run.samples)[-1][1]) for run in runs if run.samples}
    shared = {
        name: {question: answer for question, answer in given.items() if sum(question in other for other in last.values()) > 1}
        for name, given in last.items()
    }
    shared = {name: given for name, given in shared.items() if given}
    return f'<section><h2>Side by side</h2>{compare(shared)}</section>' if len(shared) > 1 else ''


def compare(given: Mapping[str, Mapping[str, str]]) -> str:
    """A table of answers: questions down, who or when across."""
    questions = list(dict.fromkeys(question for found in given.values() for question in found))[:MOST_ROWS]
    rows = [[f'**{question}**', *(found.get(question) for found in given.values())] for question in questions]
    return f'<div class="answers">{markdown.table(["", *given], rows)}</div>'
