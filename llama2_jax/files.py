"""Files on a disk or in a bucket (`gs://`): one kind of path for both, read in ranges and written from beginning to end."""

import contextlib
import errno
import fcntl
import fnmatch
import io
import json
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from etils import epath

from llama2_jax.config import UserError, shown

STAGING = 2**23  # bytes that are written at once
OUT_OF_RANGE_SLOT = getattr(os, 'O_DIRECT', 0)  # Linux has it
BUCKET_SECONDS = 60.0  # minimum seconds between rewrites of a growing file in a bucket
# Of a bucket that is not there, not allowed or not reachable; each library has errors of its own.
BUCKET_LIBRARIES = ('gcsfs', 'google', 'aiohttp', 'requests')
JSON_BYTES = 2**23  # a config, an index of shards or a header of a model of 80 layers takes a tenth of it
JSON_DEPTH = 64
LFS_POINTER = b'version https://git-lfs'
T = TypeVar('T')


def locate(path: str | os.PathLike) -> epath.Path:
    """The path made absolute; an address in a bucket is so already."""
    if not is_remote(path):
        return epath.Path(os.path.abspath(path))
    if not os.fspath(path).startswith('gs://'):
        raise UserError(f'{path} is an address that cannot be used: write gs://BUCKET/PATH, or copy the files to a disk.')
    return epath.Path(path)


def check_writable(option: str, path: str | os.PathLike, directory: bool) -> None:
    """Tries whether a file or a directory can be written, before anything expensive begins; its parents need not exist.

    Raises:
      UserError: it cannot; names the option and the path.
    """
    if is_remote(path):
        locate(path)
        return
    whole = place = os.path.abspath(path)
    try:
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.exists(place):
            raise FileNotFoundError(errno.ENOENT, f'{place} is a link to nothing')
        if os.path.isdir(place) != (directory or place != whole):
            raise FileExistsError(errno.EEXIST, f'{place} is {"a" if os.path.isdir(place) else "no"} directory')
        if len(os.path.basename(whole).encode()) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=place if os.path.isdir(place) else os.path.dirname(place)):
            pass
    except OSError as error:
        raise UserError(f'{option}={path} cannot be written: {error.strerror}.') from None


def check_name(directory: str | os.PathLike) -> None:
    """Sees that checkpoints and models in a directory of this name can be read back.

    Orbax joins what processes have written through a glob of the whole path, in which `[…]` and `\\` mean something else, and `*`
    and `?` other directories too; TensorStore wants UTF-8.

    Raises:
      UserError: they cannot.
    """
    path = os.fspath(directory)
    found = [character for character in '[*?\\' if character in path]
    found += [character for character in path if '\ud800' <= character <= '\udfff']
    if found:
        raise UserError(f'{path!r} holds {found[0]!r}, with which no checkpoint or model can be read back: use another name.')


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it lies in a bucket, where nothing can be renamed or appended to, and a file appears when it is complete."""
    return '://' in os.fspath(path)


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the libraries raise about a bucket into a UserError that names the path."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition('.')[0]
        if not is_remote(path) or not (isinstance(error, ImportError | OSError) or library in BUCKET_LIBRARIES):
            raise
        reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise UserError(f'{path} cannot be reached: {reason.removesuffix(".")}.') from error


def matching(directory: epath.Path, pattern: str) -> list[epath.Path]:
    """What lies in a directory under such names, sorted; the directory's own name may hold anything."""
    return sorted(path for path in directory.iterdir() if fnmatch.fnmatch(path.name, pattern))


def make_directory(path: str | os.PathLike) -> epath.Path:
    """Makes an output directory, unless it is there.

    Raises:
      UserError: It cannot be made, such as below a file.
    """
    path = locate(path)
    try:
        with bucket_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'The directory {path} cannot be made: {error.strerror or error}. Give another one.') from error
    return path


def open_file(path: epath.Path) -> BinaryIO:
    """Opens a file that is not ours for reading. Everything that reads such files goes through here.

    Raises:
      UserError: it cannot be read, is a pipe, device or directory (reading a pipe waits forever), or is a pointer of Git LFS.
    """
    if is_remote(path):
        return path.open('rb')
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # would wait for a writer to a pipe otherwise
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}.') from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f'{path} is not a regular file but a directory, a pipe or a device, which is not read.')
    if os.pread(descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
        os.close(descriptor)
        raise UserError(f'{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` where it was cloned.')
    return os.fdopen(descriptor, 'rb')


def check_regular(directory: epath.Path) -> None:
    """Refuses a directory that is to be read by another library and holds pipes or devices, at any depth.

    Raises:
      UserError: naming the first of them.
    """
    for place, _, names in () if is_remote(directory) else os.walk(directory):
        for name in names:
            if not os.path.isfile(file := os.path.join(place, name)):
                raise UserError(f'{file} is not a regular file but a pipe, a device or a broken link, which is not read.')


def size_of(path: epath.Path) -> int:
    """Bytes of a file."""
    with open_file(path) as file:
        return file.seek(0, os.SEEK_END)


def read_bytes(path: epath.Path, offset: int, size: int) -> np.ndarray:
    """Bytes [offset, offset + size) of a file.

    Raises:
      UserError: they are not there.
    """
    with open_file(path) as file:
        if offset + size > (there := file.seek(0, os.SEEK_END)):  # before memory is taken
            raise UserError(f'{path} is cut short: it has {there} bytes, and {offset + size} are needed.')
        buffer = np.empty(size, np.uint8)
        _fill(file, offset, buffer, path)
    return buffer


def read_into(path: epath.Path, offset: int, buffer: np.ndarray) -> None:
    """Fills a buffer of uint8 with bytes of a file from `offset` on; errors as of `read_bytes`."""
    with open_file(path) as file:
        _fill(file, offset, buffer, path)


def _fill(file: BinaryIO, offset: int, buffer: np.ndarray, path: epath.Path) -> None:
    file.seek(offset)
    done, size = 0, len(buffer)
    while done < size:  # one call reads 2 GiB at most
        count = file.readinto(memoryview(buffer)[done:])
        if not count:
            raise UserError(f'{path} is cut short: its last {size - done} bytes or more are missing.')
        done += count


def read_whole(path: epath.Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
      UserError: it is larger, or what `open_file` raises.
    """
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f'{path} has more than {limit} bytes, far more than a file of its kind.')
    return content


def read_json(path: epath.Path, kind: type[T] = dict, limit: int = JSON_BYTES) -> T:
    """The object in a JSON file that is not ours, or that somebody may have edited.

    Args:
      path: The file.
      kind: What it must hold: dict or list.
      limit: Its size in bytes, at most.

    Raises:
      UserError: the file cannot be read, or what `parse_json` raises.
    """
    return parse_json(read_whole(path, limit), path, kind)


def parse_json(content: bytes, path: epath.Path, kind: type[T] = dict) -> T:
    """The object in JSON text; `path` names it in errors.

    Raises:
      UserError: it is not JSON, not of that kind, nested too deeply or has a name twice in one object.
    """
    try:
        value = json.loads(content.decode('utf-8-sig'), object_pairs_hook=lambda pairs: _once(path, pairs))
    except (ValueError, RecursionError):
        raise UserError(f'{path} is damaged: it is not JSON, or nested too deeply.') from None
    if not isinstance(value, kind):
        raise UserError(f'{path} is damaged: it is not a JSON {"object" if kind is dict else "list"}.')
    level, depth = [value], 0
    while level:
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        depth += 1
        if depth > JSON_DEPTH:
            raise UserError(f'{path} is damaged: it is nested more than {JSON_DEPTH} levels deep.')
    return value


def _once(path: epath.Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise UserError(f'{path}: {shown(twice)} is there twice.')
    return found


class Output(Protocol):
    """A new file, written from beginning to end; a context manager."""

    def write(self, data: Any) -> Any:
        """Appends the bytes of a buffer."""

    def __enter__(self) -> 'Output': ...

    def __exit__(self, *error: object) -> None: ...


def create(path: epath.Path) -> Output:
    """A file that is complete when the context ends."""
    return path.open('wb') if is_remote(path) else _Direct(path)


def write(path: epath.Path, content: bytes) -> None:
    """A whole file."""
    with create(path) as file:
        file.write(content)


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """Replaces the file at `path`: whoever looks, at any moment and after any crash, sees the old content or the new."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        with bucket_errors(path):
            path.write_bytes(content)
        return
    temporary = path.with_name(path.name + '.tmp')
    with temporary.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[Callable[[str], Any]]:
    """A function that adds text to a file that appears at `path` when the context ends without an error."""
    if is_remote(path):
        with tempfile.TemporaryFile() as whole:
            yield lambda text: whole.write(text.encode())
            whole.seek(0)
            with bucket_errors(path), path.open('wb') as file:
                shutil.copyfileobj(whole, file)
        return
    temporary = path.with_name(path.name + '.tmp')
    with temporary.open('wb') as file:
        yield lambda text: file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_figure(figure: Any, path: epath.Path) -> None:
    """Writes a matplotlib figure, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=path.suffix.removeprefix('.'))
    write_atomically(path, picture.getvalue())


class Lines:
    """A text file that grows; a context manager. A bucket cannot append, so the whole file is rewritten at intervals."""

    def __init__(self, path: epath.Path):
        self._path, self._written = path, time.monotonic()
        if is_remote(path):
            with bucket_errors(path):
                self._text, self._file = path.read_text() if path.exists() else '', None
        else:
            self._file = path.open('a', encoding='utf-8')

    def write(self, text: str) -> None:
        """Appends whole lines."""
        if self._file:
            self._file.write(text)
            self._file.flush()
            return
        self._text += text
        if time.monotonic() - self._written > BUCKET_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Brings all lines to where they are kept."""
        if self._file:
            os.fsync(self._file.fileno())
            return
        with bucket_errors(self._path):
            self._path.write_text(self._text)
        self._written = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        if self._file:
            self._file.close()
        else:
            self.sync()

    def __enter__(self) -> 'Lines':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Direct:
    """A file whose numbers go to the disk past the system's cache, where that is possible: half of the work of writing.

    The system wants whole blocks from aligned memory for it, so all goes through a staging buffer.
    """

    _idle: list[mmap.mmap] = []  # buffers to be used again: memory that is fresh is slower than the disk

    def __init__(self, path: epath.Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | OUT_OF_RANGE_SLOT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)  # a file system that has nothing of the kind
        self._buffer = self._idle.pop() if self._idle else mmap.mmap(-1, STAGING)
        self._filled = 0

    def write(self, data: Any) -> None:
        """Appends the bytes of a buffer."""
        rest = memoryview(data).cast('B')
        while rest:
            count = min(len(rest), STAGING - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == STAGING:
                self._empty()

    def _empty(self) -> None:
        done, content = 0, memoryview(self._buffer)[: self._filled]
        if self._filled == STAGING:
            with contextlib.suppress(OSError):
                done = os.write(self._file, content)
        if done < self._filled:  # the file's end, which is no whole block, or a disk that is full or wants no such writing
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~OUT_OF_RANGE_SLOT)
            while done < self._filled:
                done += os.write(self._file, content[done:])
        self._filled = 0

    def __enter__(self) -> '_Direct':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._empty()
        finally:
            os.close(self._file)
            self._idle.append(self._buffer)
