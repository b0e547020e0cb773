"""The rows of benchmarks, from files as they are published, or from TensorFlow Datasets."""

import csv
import glob
import gzip
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from llama2_jax.config import UserError
from llama2_jax.data.sources import read_records


class Row(dict[str, Any]):
    """The fields of a row, and of the objects in it, which know their place for errors.

    Attributes:
      where: Such as 'a.jsonl:17'.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.where = where
        super().__init__({name: _placed(value, f'{where}, {name!r}') for name, value in fields.items()})

    def __missing__(self, name: str) -> NoReturn:
        raise UserError(f'{self.where} has no field {name!r}; it has: {", ".join(map(str, self)) or "none"}.')

    def text(self, name: str) -> str:
        """A field that must hold text.

        Raises:
          UserError: It does not.
        """
        if not isinstance(self[name], str) or not self[name].strip():
            raise self.refused(f'{name!r} must be text, and is {str(self[name])[:60]!r}')
        return self[name]

    def refused(self, why: str) -> UserError:
        """The error of a row that is no question of its benchmark."""
        return UserError(f'{self.where}: {why}. Mend the row or remove it.')


def _placed(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return Row(value, where)
    return (
        [_placed(inner, f'{where}, element {number}') for number, inner in enumerate(value)] if isinstance(value, list) else value
    )


class Missing(UserError):
    """A set is not there."""


class Files:
    """A folder of benchmarks.

    Args:
      folder: what lies where below it does not matter beyond the ends of paths that tasks name.
      tfds: sets that are not there are read through TensorFlow Datasets, which downloads them.
    """

    def __init__(self, folder: str, tfds: bool = False):
        self._folder, self._tfds = folder, tfds
        self.used: dict[str, None] = {}  # what was read, in order
        self.place = folder  # of the row that was read last
        self.notes: list[str] = []  # what the user should know about these files

    def find(self, *patterns: str) -> list[str]:
        """The files of the first pattern, below the folder, that matches any.

        Raises:
          Missing: none does.
        """
        for pattern in patterns:
            for form in (pattern, f'{pattern}.gz'):
                found = sorted(glob.glob(os.path.join(glob.escape(self._folder), '**', form), recursive=True))
                if found:
                    self.used[os.path.dirname(found[0]) if len(found) > 1 else found[0]] = None
                    return found
        raise Missing(f'no {" or ".join(patterns)} below {self._folder}')

    def rows(self, *patterns: str, tfds: str = '') -> Iterator[Row]:
        """The rows of the files that `find` finds: .jsonl, .json (an array, one object, or lines) or .csv, perhaps .gz.

        Args:
          tfds: name of the set there, such as 'gsm8k#test'.

        Raises:
          Missing: there is no such file, nor may it be had elsewhere.
          UserError: a file is damaged or empty.
        """
        try:
            paths = self.find(*patterns)
        except Missing:
            if not (tfds and self._tfds):
                raise
            self.used[f'tfds:{tfds}'] = None
            yield from self._placed(((one.where, one.fields) for one in read_records(f'tfds:{tfds}')), f'tfds:{tfds}')
            return
        for path in paths:
            yield from self.read(path)

    def read(self, path: str) -> Iterator[Row]:
        """The rows of one file that was found."""
        return self._placed(_rows(path), path)

    def _placed(self, rows: Iterable[tuple[str, Mapping[str, Any]]], name: str) -> Iterator[Row]:
        empty = True
        for where, fields in rows:
            empty, self.place = False, where
            yield Row(fields, where)
        if empty:
            raise UserError(f'{name} holds no rows.')

    def absent(self, what: str, found: Collection[str], known: Iterable[str]) -> None:
        """Notes which parts of a benchmark are not there; the figure is of the others alone."""
        if lacking := sorted(set(known) - set(found)):
            names = ', '.join(lacking if len(lacking) < 10 else [*lacking[:8], '…'])
            self.notes.append(f'{len(lacking)} of {len(lacking) + len(set(found))} {what} are absent: {names}')


def read_text(path: str) -> str:
    """A UTF-8 file, perhaps .gz.

    Raises:
      UserError: it is damaged.
    """
    try:
        with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
            return file.read().decode('utf-8-sig')
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {error}.') from error


def read_rows(path: str) -> list[list[str]]:
    """The rows of a .csv file without a header."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """The places and cells of a .csv file's rows, but for blank lines.

    Raises:
      UserError: It is damaged.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=''))
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield f'{path}:{reader.line_num}', row
    except csv.Error as error:
        raise UserError(f'{path}:{reader.line_num} cannot be read: {error}.') from error


def _rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The places and fields of a file's rows."""
    name = path.removesuffix('.gz')
    if name.endswith('.csv'):
        header: list[str] = []
        for where, row in numbered_rows(path):
            if header and len(row) != len(header):
                raise UserError(f'{where} has {len(row)} cells, and the header of its file has {len(header)}.')
            if header:
                yield where, dict(zip(header, row, strict=True))
            else:
                header = row
    elif name.endswith('.json') and (whole := _whole(path)) is not None:
        yield path, whole
    else:
        yield from ((record.where, record.fields) for record in read_records(f'jsonl:{glob.escape(path)}'))


def _whole(path: str) -> dict[str, Any] | None:
    """The one object that a .json file is, as most are published; None of an array or lines, which `read_records` reads."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
