"""The working directory of a run: it belongs to one configuration, and its small files change atomically."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils.epath import Path

from llama2_jax import config as config_lib
from llama2_jax.config import UserError
from llama2_jax.files import bucket_errors, is_remote, locate, matching, write_atomically
from llama2_jax.runtime import barrier

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_locked: set[Path] = set()  # workdirs, by this process


def open_workdir(workdir: str | os.PathLike, config: Any, may_change: tuple[str, ...] = ()) -> Path:
    """Makes `workdir` the home of `config` (a dataclass), or checks that it already is; every process calls it.

    `may_change` lists the dotted fields or sections that a resumed run may change because no result depends on them
    ('mesh', 'data.workers'); config.json follows them.

    Raises:
      UserError: the directory holds a run of another configuration (the first differing field and both values are
        named), its config.json is damaged, it cannot be written, or another run is at work in it.
    """
    workdir = locate(workdir)
    path = workdir / 'config.json'
    text = config_lib.to_json(config)
    with bucket_errors(workdir):
        there = path.exists()
    if there:
        _check_same(path, json.loads(text), may_change)
    barrier('workdir checked')  # nobody writes before everybody has looked
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            _lock(workdir)
            write_atomically(path, text)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f'The workdir {workdir} cannot be written: {error.strerror}.') from None
    barrier('workdir written')
    return workdir


def open_run(
    workdir: str | os.PathLike, config: Any, may_change: tuple[str, ...], results: tuple[str, ...] = ('checkpoints/[0-9]*',)
) -> tuple[Path, bool]:
    """`open_workdir` for a run of which there are results once a file matches one of the patterns `results`.

    As long as there are none there is nothing to protect, and any setting that was wrong can be set right.

    Returns:
      The workdir, and whether there were results.
    """
    with bucket_errors(workdir):
        begun = any(_holds(locate(workdir), pattern) for pattern in results)
    fields = tuple(field.name for field in dataclasses.fields(config))
    return open_workdir(workdir, config, may_change if begun else fields), begun


def _holds(workdir: Path, pattern: str) -> bool:
    """Whether there is a file of such a name; only its last part may be a pattern."""
    path = workdir / pattern
    return path.parent.is_dir() and bool(matching(path.parent, path.name))


def _lock(workdir: Path) -> None:
    """Keeps a lock on the workdir until this process ends, in whatever way; a bucket has none."""
    if workdir in _locked or is_remote(workdir):
        return
    file = os.open(workdir / '.lock', os.O_RDWR | os.O_CREAT, 0o666)  # stays open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process, not of the file: no child holds it on
    except OSError as error:
        owner = os.read(file, 200).decode(errors='replace')
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f'Another run is at work in {workdir} ({owner}): let it end, or take another --workdir.') from None
        return  # a file system without locks
    os.truncate(file, 0)
    os.write(file, f'process {os.getpid()} on {socket.gethostname()}'.encode())
    _locked.add(workdir)


def _check_same(path: Path, ours: dict, may_change: tuple[str, ...]) -> None:
    try:
        theirs = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}); restore it, or start in another --workdir.') from None
    ours, theirs = dict(_fields(ours)), dict(_fields(theirs))
    for field in [*ours, *(theirs.keys() - ours.keys())]:
        if any(field == free or field.startswith(free + '.') for free in may_change):
            continue
        ours_text, theirs_text = (json.dumps(side[field]) if field in side else 'nothing' for side in (ours, theirs))
        if ours_text != theirs_text:
            raise UserError(
                f'{path.parent} belongs to a run with {field}={theirs_text}, and this one has {field}={ours_text}: '
                'use the same settings to continue it, or another --workdir.'
            )


def _fields(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """The leaves of nested JSON objects by dotted path; lists are leaves."""
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from _fields(value, f'{prefix}.{name}' if prefix else name)


@contextlib.contextmanager
def no_space_is_said(directory: Path) -> Iterator[None]:
    """Turns running out of disk space anywhere inside into a UserError that names `directory`."""
    try:
        yield
    except Exception as error:
        if not out_of_space(error):
            raise
        raise UserError(
            f'No space left while writing to {directory}: the checkpoints already there are intact; '
            'free some space and run the same command again to continue.'
        ) from error


def out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is a lack of disk space."""
    # TensorStore reports the system's error as the text of a ValueError, and Orbax wraps errors of its threads.
    while error is not None:
        texts = [os.strerror(code) for code in _NO_SPACE]
        if getattr(error, 'errno', None) in _NO_SPACE or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False
