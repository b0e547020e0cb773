"""Files of rows that grow as a run goes on, one JSON object a line, and outlive its interruption."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils.epath import Path

from llama2_jax.config import UserError
from llama2_jax.files import Lines, read_json, write_atomically
from llama2_jax.runtime import barrier, is_main_process
from llama2_jax.runtime.workdir import differences, report_disk_full


def resume_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are there, none if there is no file; a last line that was cut short goes. Every process calls it.

    Raises:
      UserError: a line is no row.
    """
    text = path.read_text(encoding='utf-8') if path.exists() else ''
    *lines, rest = text.split('\n')
    try:
        rows = [json.loads(line) for line in lines]
        whole = all(isinstance(row, dict) for row in rows)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f'{path} is damaged: it contains lines that are not JSON objects. Delete it to start over.')
    barrier('rows read')
    if rest and is_main_process():
        os.truncate(path, sum(len(line.encode()) + 1 for line in lines))  # on a disk: what is in a bucket is whole
    barrier('rows cut')
    return rows


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Callable[..., None]]:
    """A function that adds the rows that it is given to the end of the file; every process may call it, the main one writes.

    Raises:
      UserError: no space is left.
    """
    if not is_main_process():
        yield lambda *rows: None
        return
    with report_disk_full(path), Lines(path) as file:
        yield lambda *rows: file.write(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))


def add_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to the end of the file, from the main process."""
    with growing(path) as add:
        add(*rows)


def check_settings(path: Path, settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Compares settings with those that were recorded for the results in `path`.

    Raises:
      UserError: they differ, naming the first one.
    """
    for field, ours, theirs in differences(settings, recorded):
        raise UserError(f'{path} holds results for {field}={theirs}, and this command has {field}={ours}: give another --output.')


def resume(path: Path, settings: Mapping[str, Any], names: list[Any]) -> int:
    """How many results are there already; a last line that was cut short goes. Every process comes to the same count.

    Args:
      path: of the results; their settings are in a file beside it.
      settings: what the results depend on.
      names: the ids of all results.

    Raises:
      UserError: the results are of other settings, or not in the order of `names`.
    """
    beside = path.with_name(path.name + '.settings')
    if not path.exists():
        barrier('no output yet')
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(beside, json.dumps(settings))
            write_atomically(path, '')
        barrier('output made')
        return 0
    if not beside.exists():
        raise UserError(f'{path} is there without {beside.name}, so what it was made from is not known: give another --output.')
    check_settings(path, settings, read_json(beside))
    rows = resume_rows(path)
    if [row.get('id') for row in rows] != names[: len(rows)]:
        raise UserError(f'{path} is damaged: its lines are not results of the prompts in their order. Delete it to start over.')
    return len(rows)
