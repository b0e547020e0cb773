"""Fuzzes the readers of other people's models: a damaged file ends in a UserError or is read, soon and in little memory.

python benchmarks/fuzz/readers.py gguf --minutes=10

A small random model is written in the format, and one file of it is changed at random, again and again: bytes of its header,
its length, or values of its JSON. Anything but a UserError, more than 2 seconds or 300 MB more than before is printed with the
number of the round, which --round runs again. Exit code 1 if there was any.
"""

import argparse
import copy
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

from llama2_jax.checkpoints.convert import convert
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import open_model, tokenizer_of
from llama2_jax.checkpoints.names import keys
from llama2_jax.config import UserError
from llama2_jax.text.tokenizer import train_tokenizer

sys.path.append(str(Path(__file__).parents[2] / 'tests/checkpoints'))
from small_models import MHA, random_model  # noqa: E402

TARGETS = {  # name -> format and the file that is changed
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
HEADER = 20_000  # bytes of a binary file that are changed
SECONDS, MEGABYTES = 2.0, 300
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
    texts = ['some words to learn from, and some more of them, 12 or 34 at a time'] * 20
    tokenizer = train_tokenizer(texts, home / 'tokenizer.model', 296)
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


def attempt(path: Path) -> str:
    """Opens a model and reads all of it; how it ended."""
    try:
        source = open_model(path)
        tokenizer_of(source)
        for key in keys(source.config, source.head):
            source.read(*key)
    except UserError as error:
        if not str(error).isprintable() or len(str(error)) > 1500:
            return f'a sentence that is not one: {str(error)[:300]!r}'
        return 'refused'
    except Exception:
        return traceback.format_exc(limit=-4)
    return 'read'


def main() -> None:
    """Runs one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('target', choices=TARGETS)
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--round', type=int, help='Run this one only.')
    options = parser.parse_args()
    form, name = TARGETS[options.target]
    home = Path(tempfile.mkdtemp())
    counts: dict[str, int] = {}
    try:
        path = prepare(form, home)
        if options.target == 'index':
            split_index(path)
        file = path / name if name else path
        good, end = file.read_bytes(), time.monotonic() + 60 * options.minutes
        attempt(path)
        number = options.round or 0
        while options.round is not None or time.monotonic() < end:
            file.unlink()
            file.write_bytes(change(good, random.Random(number)))
            start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result = attempt(path)
            seconds = time.monotonic() - start
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1000
            if seconds > SECONDS or more > MEGABYTES:
                result = f'{seconds:.1f} s and {more:.0f} MB more ({result})'
            kind = result if result in ('read', 'refused') else 'wrong'
            counts[kind] = counts.get(kind, 0) + 1
            if kind == 'wrong' and counts['wrong'] <= 20:
                print(f'--- {options.target}, round {number}: {result}', flush=True)
            number += 1
            if options.round is not None:
                print(result)
                break
    finally:
        shutil.rmtree(home)
    print(f'{options.target}: {counts}')
    sys.exit(1 if counts.get('wrong') else 0)


if __name__ == '__main__':
    main()
