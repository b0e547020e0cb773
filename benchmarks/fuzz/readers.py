"""Fuzzes the readers of foreign files: a damaged file ends in a UserError or is read, soon and in little memory.

python benchmarks/fuzz/readers.py gguf --minutes=10

A good file of each kind is changed at random, again and again: bytes of its header, its length, or values of its JSON. Models are
opened and read whole; rows are read as dialogs, as comparisons and as prompts. Anything but a UserError, more than 2 seconds of
processor time or 300 MB more than before is printed with the number of the round, which --round runs again. A round that does not
end within a minute, or a crash of native code, ends the program with a traceback; the file stays behind. Exit code 1 if there was
any.
"""

import argparse
import copy
import faulthandler
import gzip
import io
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import open_model, tokenizer_of
from llama2_jax.checkpoints.names import keys
from llama2_jax.config import UserError
from llama2_jax.data.comparisons import read_comparisons
from llama2_jax.data.prompts import read_prompt
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.data.sources import read_records
from llama2_jax.text.tokenizer import Tokenizer, train_tokenizer

sys.path += [str(Path(__file__).parents[2] / 'tests' / room) for room in ('checkpoints', 'data')]
from small_models import MHA, random_model  # noqa: E402
from test_formats import COMPARISONS, DIALOGS  # noqa: E402

MODELS = {  # name -> format and the file that is changed
    'safetensors': ('hf', 'model.safetensors'),
    'config': ('hf', 'config.json'),
    'index': ('hf', 'model.safetensors.index.json'),
    'generation': ('hf', 'generation_config.json'),
    'params': ('meta', 'params.json'),
    'torch': ('meta', 'consolidated.00.pth'),
    'tokenizer': ('meta', 'tokenizer.model'),
    'gguf': ('gguf', ''),
    'ours': ('orbax', 'config.json'),
    'zarray': ('orbax', 'params/blocks.w_q_DHK/.zarray'),
}
ROWS = {'rows': ('.jsonl',), 'tables': ('.parquet', '.arrow', '.csv', '.jsonl.gz', '.jsonl.zst', '.json')}
TEXTS = ['some words to learn from, and some more of them, 12 or 34 at a time'] * 20
HEADER = 20_000  # bytes of a binary file that are changed
SECONDS, STALL, MEGABYTES = 2.0, 60, 300
NUMBERS = (0, 1, 2, -1, 127, 255, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 10**9, 10**18)
VALUES = (*NUMBERS, None, True, False, '', 'x', '../x', '/etc/passwd', [], {}, [[]], [1], {'a': 1}, float('nan'), float('inf'))
VALUES += (1.5, '1e-05', '\ud800', 'x' * 100_000, [0] * 10_000)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file with a few changes, most of them near its beginning or end."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = (
            rng.randrange(min(len(data), HEADER)) if rng.random() < 0.8 else len(data) - 1 - rng.randrange(min(len(data), 4096))
        )
        match rng.randrange(6):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                code = rng.choice(['<I', '<Q', '>I', '>Q', '<H'])
                number = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(code))
                data[place : place + struct.calcsize(code)] = struct.pack(code, number)
            case 3:
                del data[place : place + rng.choice((1, 4, 8, 100))]
            case 4:
                other = rng.randrange(len(data))
                data[place:place] = data[other : other + rng.choice((1, 8, 64))]
            case _:
                del data[rng.randrange(1, len(data)) :]
        if len(data) < 2:
            break
    return bytes(data)


def change_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON object with some values or names changed."""
    root = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = root
        while True:
            places = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not places:
                break
            place = rng.choice(places)
            if isinstance(node[place], dict | list) and node[place] and rng.random() < 0.8:
                node = node[place]
                continue
            if isinstance(node, dict) and rng.random() < 0.2:
                node[rng.choice(('x', '', 'rope_scaling', 'quantization_config', 'a' * 5000))] = copy.deepcopy(rng.choice(VALUES))
            elif rng.random() < 0.1:
                del node[place]
            else:
                node[place] = copy.deepcopy(rng.choice(VALUES))
            break
    return json.dumps(root).encode()


def change(content: bytes, rng: random.Random) -> bytes:
    """A changed file; safetensors have JSON inside."""
    if content[:1] == b'{' and rng.random() < 0.8:
        return change_json(content, rng)
    if content[8:9] == b'{' and rng.random() < 0.6:
        length = int.from_bytes(content[:8], 'little')
        header = change_json(content[8 : 8 + length], rng)
        return len(header).to_bytes(8, 'little') + header + content[8 + length :]
    return change_bytes(content, rng)


def prepare(form: str, home: Path) -> Path:
    """A model of a format."""
    tokenizer = train_tokenizer(TEXTS, home / 'tokenizer.model', 296)
    save_model(home / 'start', random_model(MHA), tokenizer, {'stage': 'fuzz', 'parent': None, 'step': 0})
    path = home / ('m.gguf' if form == 'gguf' else 'm')
    convert(open_model(home / 'start'), path, form)
    return path


def split_index(path: Path) -> None:
    """One shard with an index."""
    (path / 'model.safetensors').rename(path / 'shard.safetensors')
    header = (path / 'shard.safetensors').read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], 'little')]).keys() - {'__metadata__'}
    (path / 'model.safetensors.index.json').write_text(
        json.dumps({'weight_map': dict.fromkeys(sorted(names), 'shard.safetensors')})
    )


def read_model(path: Path) -> None:
    """Opens a model and reads all of it."""
    source = open_model(path)
    tokenizer_of(source)
    for key in keys(source.config, source.head):
        source.read(*key)


def rows_file(suffixes: tuple[str, ...], rng: random.Random) -> tuple[str, bytes]:
    """The name and content of a damaged file of published rows; the rows of JSON lines are changed as JSON."""
    rows, _ = rng.choice([*DIALOGS.values(), *COMPARISONS.values()])
    suffix, lines = rng.choice(suffixes), [json.dumps(row).encode() for row in rows * 2]
    if suffix == '.jsonl':
        i = rng.randrange(len(lines))
        lines[i] = change(lines[i], rng)
        return f'a{suffix}', b'\n'.join(lines)
    sink, flat = io.BytesIO(), [{name: str(value) for name, value in row.items()} for row in rows * 2]
    try:
        table = pa.Table.from_pylist([{name: value or str(value) for name, value in row.items()} for row in rows * 2])
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # a column of Arrow has one type
        table = pa.Table.from_pylist(flat)
    match suffix:
        case '.parquet':
            pa.parquet.write_table(table, sink, compression=rng.choice(('none', 'snappy', 'zstd')))
        case '.arrow':
            with rng.choice((pa.ipc.new_file, pa.ipc.new_stream))(sink, table.schema) as writer:
                writer.write_table(table)
        case '.csv':
            pa.csv.write_csv(pa.Table.from_pylist(flat), sink)
        case '.jsonl.gz':
            sink.write(gzip.compress(b'\n'.join(lines)))
        case '.jsonl.zst':
            sink.write(pa.Codec('zstd').compress(b'\n'.join(lines), asbytes=True))
        case _:
            sink.write(b'[' + b','.join(lines) + b']')
    return f'a{suffix}', change_bytes(sink.getvalue(), rng)


def read_rows(path: Path, tokenizer: Tokenizer) -> None:
    """Reads rows in the three ways; raises a UserError if each of them does."""
    source, refused = f'rows:{path}', []
    ways: list[Callable[[], object]] = [
        lambda: list(read_dialogs(source)),
        lambda: list(read_comparisons(source)),
        lambda: [read_prompt(record, tokenizer) for record in read_records(source)],
    ]
    for way in ways:
        try:
            way()
        except UserError as error:
            refused.append(error)
            check_sentence(error)
    if len(refused) == len(ways):
        raise refused[0]


def check_sentence(error: UserError) -> None:
    """Raises an AssertionError if a message cannot be shown, or is no sentence for its length."""
    if not str(error).isprintable() or len(str(error)) > 1500:
        raise AssertionError(f'a sentence that is not one: {str(error)[:300]!r}')


def attempt(read: Callable[[], None]) -> str:
    """Reads a damaged file; how it ended."""
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.dump_traceback_later(STALL, exit=True)
    result = 'read'
    try:
        try:
            read()
        except UserError as error:
            result = 'refused'
            check_sentence(error)
    except Exception as error:
        error.__context__ = None
        result = traceback.format_exc(limit=-4)
    faulthandler.cancel_dump_traceback_later()
    seconds, more = time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1000
    if seconds > SECONDS or more > MEGABYTES:
        result = f'{seconds:.1f} s and {more:.0f} MB more ({result})'
    return result


def rounds(target: str, home: Path) -> Callable[[random.Random], Callable[[], None]]:
    """A function that writes a damaged file and returns what reads it."""
    if target in ROWS:
        tokenizer = train_tokenizer(TEXTS, home / 'tokenizer.model', 296)

        def write_rows(rng: random.Random) -> Callable[[], None]:
            name, content = rows_file(ROWS[target], rng)
            (home / name).write_bytes(content)
            return lambda: read_rows(home / name, tokenizer)

        return write_rows
    form, name = MODELS[target]
    path = prepare(form, home)
    if target == 'index':
        split_index(path)
    file = path / name if name else path
    good = file.read_bytes()
    read_model(path)

    def write_model(rng: random.Random) -> Callable[[], None]:
        file.unlink()
        file.write_bytes(change(good, rng))
        return lambda: read_model(path)

    return write_model


def main() -> None:
    """Runs one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('target', choices=[*MODELS, *ROWS])
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--round', type=int, help='Run this one only.')
    options = parser.parse_args()
    faulthandler.enable()
    home = Path(tempfile.mkdtemp(prefix=f'fuzz-{options.target}-'))
    counts: dict[str, int] = {}
    write = rounds(options.target, home)
    number, end = options.round or 0, time.monotonic() + 60 * options.minutes
    while options.round is not None or time.monotonic() < end:
        result = attempt(write(random.Random(number)))
        kind = result if result in ('read', 'refused') else 'wrong'
        counts[kind] = counts.get(kind, 0) + 1
        if (kind == 'wrong' and counts['wrong'] <= 20) or options.round is not None:
            print(f'--- {options.target}, round {number}: {result}', flush=True)
        number += 1
        if options.round is not None:
            break
    if options.round is None:
        shutil.rmtree(home)
    print(f'{options.target}: {sum(counts.values())} rounds, {counts}', flush=True)
    sys.exit(1 if counts.get('wrong') else 0)


if __name__ == '__main__':
    main()
