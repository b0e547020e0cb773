"""The rows of benchmarks, from files as they are published, or from TensorFlow Datasets."""

import csv
import glob
import gzip
import io
import os
from collections.abc import Iterator
from typing import Any

from llama2_jax.config import UserError
from llama2_jax.data.sources import read_records

Row = dict[str, Any]


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
        """The rows of the files that `find` finds: .jsonl, .json (an array, or one object) or .csv, perhaps .gz.

        Args:
          tfds: name of the set there, such as 'gsm8k#test'.

        Raises:
          Missing: there is no such file, nor may it be had elsewhere.
          UserError: a file is damaged.
        """
        try:
            paths = self.find(*patterns)
        except Missing:
            if not (tfds and self._tfds):
                raise
            self.used[f'tfds:{tfds}'] = None
            yield from (record.fields for record in read_records(f'tfds:{tfds}'))
            return
        for path in paths:
            if path.removesuffix('.gz').endswith('.csv'):
                yield from csv.DictReader(io.StringIO(read_text(path), newline=''))
            else:
                yield from (record.fields for record in read_records(f'jsonl:{glob.escape(path)}'))

    def text(self, *patterns: str) -> str:
        """The content of the first file that `find` finds."""
        return read_text(self.find(*patterns)[0])


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
    return list(csv.reader(io.StringIO(read_text(path), newline='')))
