"""The working directory of a run: it belongs to one configuration and its inputs, and its small files change atomically."""

import contextlib
import contextvars
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
from llama2_jax.files import bucket_errors, check_name, check_writable, is_remote, locate, matching, read_json, write_atomically
from llama2_jax.runtime import barrier, is_main_process, log
from llama2_jax.runtime.hosts import code_fingerprint, gather

INPUTS = 'inputs.json'
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_locked: set[Path] = set()  # workdirs, by this process


@dataclasses.dataclass(frozen=True)
class ResumeConfig(config_lib.Config):
    """How a run continues; this holds for one command, so no workdir keeps it.

    Attributes:
      resume_with_changed_data: continues although data, a tokenizer or a model differ from those that the run began with.
    """

    resume_with_changed_data: bool = False


_AS_BEGUN = ResumeConfig()
_resume = contextvars.ContextVar('resume', default=_AS_BEGUN)


@contextlib.contextmanager
def resuming(config: ResumeConfig) -> Iterator[None]:
    """Runs inside, and the stages that they start, continue in this way."""
    token = _resume.set(config)
    try:
        yield
    finally:
        _resume.reset(token)


def open_workdir(workdir: str | os.PathLike, config: Any, may_change: tuple[str, ...] = ()) -> Path:
    """Makes `workdir` the home of `config` (a dataclass), or checks that it already is; every process calls it.

    `may_change` lists the dotted fields or sections that a resumed run may change because no result depends on them
    ('mesh', 'data.workers'); config.json follows them.

    Raises:
      UserError: the directory holds a run of another configuration (the first differing field and both values are
        named), its config.json is damaged, it cannot be written, or another run holds its lock.
    """
    workdir = locate(workdir)
    check_name(workdir)
    check_writable('--workdir', workdir, directory=True)
    path = workdir / 'config.json'
    text = config_lib.to_json(config)
    _check_agreement(json.loads(text))
    with bucket_errors(workdir):
        there = path.exists()
    if there:
        _check_same(path, json.loads(text), may_change)
    barrier('workdir checked')  # nobody writes before everybody has looked
    if jax.process_index() == 0:
        try:
            with report_disk_full(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                _lock(workdir)
                write_atomically(path, text)
        except OSError as error:
            raise UserError(f'--workdir={workdir} cannot be written: {error.strerror}.') from None
    barrier('workdir written')
    return workdir


def _check_agreement(config: Mapping[str, Any]) -> None:
    """Compares settings and code of all processes: with others, each would train a part of another model.

    Raises:
      UserError: they differ; the first process and field that do are named.
    """
    everyone = [json.loads(text) for text in gather(json.dumps({'code': code_fingerprint(), 'config': config}))]
    for index, theirs in enumerate(everyone):
        for field, their_text, text in differences(theirs, everyone[0]):
            raise UserError(
                f'Process {index} has {field}={their_text}, process 0 has {text}: '
                'start the same command, with the same code, on every host.'
            )


def open_run(workdir: str | os.PathLike, config: Any, results: tuple[str, ...] = ('checkpoints/[0-9]*',)) -> tuple[Path, bool]:
    """`open_workdir` for a run that has results once a file matches one of the patterns `results`.

    A run with results may change only its config's resumable fields. Without results, every field may still be corrected.

    Returns:
      The workdir, and whether there were results.
    """
    with bucket_errors(workdir):
        begun = any(_holds(locate(workdir), pattern) for pattern in results)
    may_change = config_lib.resumable_fields(config) if begun else (field.name for field in dataclasses.fields(config))
    return open_workdir(workdir, config, tuple(may_change)), begun


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
            raise UserError(
                f'{workdir} is locked by another run ({owner}): wait until it ends, or use another --workdir.'
            ) from None
        return  # a file system without locks
    os.truncate(file, 0)
    os.write(file, f'process {os.getpid()} on {socket.gethostname()}'.encode())
    _locked.add(workdir)


def record_inputs(workdir: Path, inputs: Mapping[str, str], begun: bool) -> None:
    """Writes workdir/inputs.json, or checks that a run which has results still has the inputs it began with.

    Every process calls it, before anything expensive.

    Args:
      workdir: as `open_run` returned it.
      inputs: name, such as 'data jsonl:a.jsonl' or 'init_from', -> fingerprint of rows, tokenizer or model.
      begun: whether there are results, as `open_run` returned it.

    Raises:
      UserError: an input differs (the first one is named with both fingerprints), and `resuming` does not allow it.
    """
    path = workdir / INPUTS
    if begun and path.exists():
        check_inputs(str(workdir), inputs, read_inputs(workdir))
    elif begun:
        log(f'{workdir} has results and no inputs.json, so whether its data and models are the same is not known.')
    barrier('inputs checked')
    if is_main_process():
        with report_disk_full(workdir):
            write_atomically(path, json.dumps(dict(inputs), indent=2, ensure_ascii=False) + '\n')
    barrier('inputs written')


def read_inputs(workdir: Path) -> dict[str, str]:
    """What `record_inputs` wrote in a workdir; nothing where it did not."""
    path = workdir / INPUTS
    return read_json(path) if path.exists() else {}


def check_inputs(what: str, inputs: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Compares inputs with recorded ones; `what` was made from those.

    Raises:
      UserError: they differ, and `resuming` does not allow it.
    """
    for name, *texts in differences(inputs, recorded):
        ours, theirs = (text.strip('"') for text in texts)
        if not _resume.get().resume_with_changed_data:
            raise UserError(
                f'{what} was made from {name} ({theirs}), which has changed ({ours}): restore it, use another --workdir, or, '
                'if the change is meant, add --set resume_with_changed_data=true.'
            )
        log(f'Continuing {what} with another {name}: {ours} in place of {theirs}.')


def _check_same(path: Path, ours: dict, may_change: tuple[str, ...]) -> None:
    for field, our_text, their_text in differences(ours, read_json(path), may_change):
        raise UserError(
            f'{path.parent} belongs to a run with {field}={their_text}, and this one has {field}={our_text}: '
            'use the same settings to continue it, or another --workdir.'
        )


def differences(ours: Mapping, theirs: Mapping, may_change: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """The fields in which nested JSON objects differ, each as (dotted path, our value, their value) for people."""
    ours, theirs = dict(_fields(ours)), dict(_fields(theirs))
    for field in [*ours, *(theirs.keys() - ours.keys())]:
        if any(field == free or field.startswith(free + '.') for free in may_change):
            continue
        texts = [_text(side[field]) if field in side else 'nothing' for side in (ours, theirs)]
        if texts[0] != texts[1]:
            yield field, *texts


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _fields(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """The leaves of nested JSON objects by dotted path; lists are leaves."""
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from _fields(value, f'{prefix}.{name}' if prefix else name)


@contextlib.contextmanager
def report_disk_full(directory: Path) -> Iterator[None]:
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
