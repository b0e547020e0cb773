"""What an optimised XLA program does, read from its text: instructions, loops, FLOPs and collectives.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel as nothing, which for layers under `scan` and splash
attention is nearly everything. `schedule` counts and times what is read here.
"""

import math
import re
from typing import NamedTuple

import numpy as np

CAUSAL = 0.5  # share of the score matrix that a causal attention kernel computes
HOST_SPACE = 5
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BITS = {'pred': 8, 'bf16': 16} | {f'{kind}{bits}': bits for kind in 'suf' for bits in (8, 16, 32, 64)}
SIZES = {dtype: bits // 8 for dtype, bits in BITS.items()}


class Instruction(NamedTuple):
    """One line of a computation: `rest` is what follows the opening parenthesis of its operands."""

    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str
    is_root: bool


class Collective(NamedTuple):
    """Its kind, the devices that take part, bytes of the full buffer, bytes on the links of one device, and its channel."""

    kind: str
    size: int
    payload: float
    wire: float
    channel: str


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by computation and name, in scheduled order, and the name of the first computation."""
    computations, entry, current = {}, '', {}
    for line in text.splitlines():
        if match := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{\s*$', line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := re.match(r'\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(', line):
            depth, end = 1, match.end()
            while depth and end < len(line):
                depth += {'(': 1, ')': -1}.get(line[end], 0)
                end += 1
            operands = re.findall(r'%([\w.\-]+(?:#\d+)*)', line[match.end() : end])
            for name in operands:
                _add_element(current, name)
            current[match[2]] = Instruction(match[2], match[3], match[4], operands, line[match.end() :], bool(match[1]))
    return computations, entry


def _add_element(body: dict[str, Instruction], name: str) -> None:
    """Adds the get-tuple-element that an operand `tuple#2` stands for: jaxlib 0.12 does not write it as an instruction."""
    whole, mark, index = name.rpartition('#')
    if mark and name not in body:
        _add_element(body, whole)
        shape = _element(body[whole].shape, int(index))
        body[name] = Instruction(name, shape, 'get-tuple-element', [whole], f'%{whole}), index={index}', False)


def _element(shape: str, index: int) -> str:
    """The shape of a tuple's element.

    >>> _element('(f32[2,3]{1,0:T(8,128)}, (s32[], /*index=5*/u8[4]))', 1)
    '(s32[], /*index=5*/u8[4])'
    """
    depth, elements = 0, ['']
    for character in shape[1:-1]:
        depth += (character in '({[') - (character in ')}]')
        if character == ',' and not depth:
            elements.append('')
        else:
            elements[-1] += character
    return elements[index].strip()


def read_memory(report: str) -> tuple[int, int]:
    """Bytes that buffer assignment gives a program in device memory and in host memory, from the compiler's memory usage report.

    Device memory is memory space 0, arguments included. Offloaded buffers are in space 5 (`S(5)` in a layout).
    """
    spaces = dict(re.findall(r'^Memory Space: .*\(color=(\d+)\)\nTotal bytes: (\d+)', report, re.MULTILINE))
    return int(spaces['0']), int(spaces.get(str(HOST_SPACE), 0))


def arrays_of(shape: str) -> list[tuple[str, list[int], bool]]:
    """(dtype, dimensions, whether in host memory) of each array of a shape."""
    found = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?', shape)
    return [
        (dtype, [int(n) for n in dims.split(',') if n], f'S({HOST_SPACE})' in layout)
        for dtype, dims, layout in found
        if dtype in SIZES
    ]


def bytes_of(shape: str) -> int:
    """Bytes of all arrays in a shape."""
    return sum(SIZES[dtype] * math.prod(dims) for dtype, dims, _ in arrays_of(shape))


def called_by(i: Instruction, *keys: str) -> str | None:
    """The computation that an instruction names."""
    keys = keys or ('calls', 'to_apply', 'called_computations')
    match = re.search(rf'\b(?:{"|".join(keys)})=\{{?%?([\w.\-]+)', i.rest)
    return match and match[1]


def kind_of(i: Instruction) -> str | None:
    """The kind of collective that an instruction is or starts, if any."""
    base = i.op.removesuffix('-start')
    return base if base in KINDS else None


def _group(rest: str) -> int:
    """Devices that take part in one collective; 0 where the text does not say."""
    if match := re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes.get(axis, 1) for axis, _, part in parts)
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', rest):
        return int(match[2])
    match = re.search(r'replica_groups=\{\{([^}]*)\}', rest)
    return len(match[1].split(',')) if match else 0


class Module:
    """An optimised module.

    Attributes:
      entry: the computation it begins with.
      computations: instructions by computation, in scheduled order.
      named: the same by name.
    """

    def __init__(self, text: str):
        self.named, self.entry = _parse(text)
        self.computations = {name: list(body.values()) for name, body in self.named.items()}
        self._inside: dict[str, tuple[list[Collective], str]] = {}

    def operand(self, computation: str, i: Instruction, index: int) -> Instruction | None:
        """What made an operand, if it was made in the same computation."""
        return self.named[computation].get(i.operands[index]) if index < len(i.operands) else None

    def turns(self, computation: str, loop: Instruction) -> int:
        """How often a loop turns: XLA's note, or what its condition compares the counter with, less where that begins."""
        if match := re.search(r'known_trip_count\\?"?:\s*\{\\?"n\\?":\\?"(\d+)', loop.rest):
            return int(match[1])
        condition = called_by(loop, 'condition')
        counters = [i for i in self.computations[condition] if i.op == 'get-tuple-element']
        limits = {value for i in self.computations[condition] if (value := self.constant(condition, i)) is not None}
        start, state = 0, self.operand(computation, loop, 0)
        if state is not None and len(counters) == 1:
            counter = int(re.search(r'index=(\d+)', counters[0].rest)[1])
            start = (
                self.constant(computation, self.operand(computation, state, counter)) or 0
            )  # not 0 where XLA peeled off a turn
        if len(limits) != 1:
            raise ValueError(f'the number of turns of {loop.name} is not in the program')
        return limits.pop() - start

    def constant(self, computation: str, i: Instruction | None) -> int | None:
        """The value of a whole constant, or of a copy of one."""
        if i is not None and i.op in ('copy', 'bitcast'):
            return self.constant(computation, self.operand(computation, i, 0))
        match = i is not None and i.op == 'constant' and re.match(r'(\d+)\)', i.rest)
        return int(match[1]) if match else None

    def dot_flops(self, computation: str, i: Instruction) -> float:
        """FLOPs of one instruction, and of what it calls."""
        if i.op in ('fusion', 'call'):
            called = called_by(i)
            return sum(self.dot_flops(called, inner) for inner in self.computations.get(called, ()))
        if i.op not in ('dot', 'convolution'):
            return 0
        out = arrays_of(i.shape)[0][1]
        left, right = (arrays_of(self.operand(computation, i, n).shape)[0][1] for n in (0, 1))
        if i.op == 'dot':
            dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)[1]
            return 2 * math.prod(out) * math.prod(left[int(n)] for n in dims.split(',') if n)
        left_labels, right_labels, out_labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest).groups()
        window = re.search(r'window=\{([^}]*)\}', i.rest)
        flops = 2 * math.prod(out) * right[right_labels.index('i')]
        for n, size in enumerate(_window(window, 'size', [])):
            lengths = left[left_labels.index(str(n))], out[out_labels.index(str(n))]
            flops *= _taps(size, *lengths, *(_window(window, key, [default] * 9)[n] for key, default in WINDOW))
        return flops

    def kernel_flops(self, computation: str, i: Instruction) -> float:
        """FLOPs of an attention kernel, from its shapes and name: 2 products forward, 5 backward (3 and 4 where dq is apart)."""
        if not re.search('splash|flash|attention', i.name):
            return 0
        shapes = [self.named[computation][name].shape for name in i.operands if name in self.named[computation]]
        arrays = [dims for shape in shapes for dtype, dims, _ in arrays_of(shape) if dtype in ('bf16', 'f32') and len(dims) >= 3]
        arrays = [dims for dims in arrays if dims[-2] >= 128]
        queries = max(arrays, key=math.prod)
        keys = max(dims[-2] for dims in arrays if dims[-1] == queries[-1])
        outputs = [dims for _, dims, _ in arrays_of(i.shape) if len(dims) >= 3 and dims[-1] == queries[-1] and dims[-2] >= 128]
        products = (5 if len(outputs) >= 3 else 4) if 'dkv' in i.name else 3 if 'dq' in i.name else 2
        return 2 * math.prod(queries) * keys * CAUSAL * products

    def inside(self, computation: str) -> tuple[list[Collective], str]:
        """Collectives inside a called computation, and the part of them it plays: sync, start, step or done.

        TPU compilers spread one asynchronous collective over several fusions: a start, steps that also compute, and a done.
        """
        if computation not in self._inside:
            found, role, ops = [], 'sync', set()
            for i in self.computations.get(computation, ()):
                ops.add(i.op)
                if kind_of(i):
                    found.append(self.collective(computation, i))
                if match := re.search('AsyncCollective(Start|Done)', i.rest):
                    role = match[1].lower()
                if i.op in ('fusion', 'call', 'async-start', 'custom-call') and (called := called_by(i)):
                    inner, inner_role = self.inside(called)
                    found += inner
                    role = inner_role if inner_role in ('start', 'done') else role
            if 'dynamic-slice' in ops and 'all-reduce' in ops:  # summed everywhere, but each device keeps a slice
                found = [c._replace(kind='reduce-scatter', wire=c.wire / 2) if c.kind == 'all-reduce' else c for c in found]
            if found and role == 'sync' and 'async_collective_fusion' in computation:
                role = 'step'
            self._inside[computation] = found, role
        return self._inside[computation]

    def collective(self, computation: str, i: Instruction) -> Collective:
        """What a collective instruction moves."""
        kind, named = kind_of(i), self.named[computation]
        given = sum(bytes_of(named[name].shape) for name in i.operands if name in named)
        payload = given or bytes_of(i.shape)
        if kind == 'all-gather':
            payload = max(bytes_of(i.shape) - given, 0) if i.op.endswith('-start') else bytes_of(i.shape)
        size = _group(i.rest) or (max(1, round(payload / given)) if kind == 'all-gather' and given else 0)
        share = 1 if kind == 'collective-permute' else (size - 1) / size if size > 1 else 0
        channel = re.search(r'channel_id=(\d+)', i.rest)
        wire = payload * share * (2 if kind == 'all-reduce' else 1)
        return Collective(kind, size, payload, wire, channel[1] if channel else i.name)

    def copied(self, computation: str, i: Instruction) -> tuple[int, int | None]:
        """Bytes of an asynchronous copy, and its way: 0 from the host, 1 to it, None if it stays on the chip."""
        arrays = arrays_of(i.shape)
        size = max((SIZES[dtype] * math.prod(dims) for dtype, dims, _ in arrays), default=0)
        root = next((inner for inner in self.computations.get(called_by(i) or '', ()) if inner.is_root), None)
        updates = 'dynamic-update-slice' in i.op or (root is not None and root.op == 'dynamic-update-slice')
        if root is not None:
            update = self.operand(called_by(i), root, 1) if updates else None
            size = bytes_of((update or root).shape)
        elif updates:
            size = bytes_of(self.operand(computation, i, 1).shape)
        elif match := re.search(r'dynamic_slice_sizes=\{([\d,]*)\}', i.rest):
            size = SIZES[arrays[0][0]] * math.prod(int(n) for n in match[1].split(','))
        if not any(on_host for _, _, on_host in arrays):
            return size, None
        return size, int(updates or (i.op == 'copy-start' and arrays[0][2]))


WINDOW = (('stride', 1), ('pad', (0, 0)), ('lhs_dilate', 1), ('rhs_dilate', 1))


def _window(window: re.Match | None, key: str, default: list) -> list:
    """One field of a convolution's window, a value for each spatial dimension."""
    match = window and re.search(rf'{key}=([\dx_\-]+)', window[1])
    if not match:
        return default
    values = match[1].split('x')
    return [tuple(int(n) for n in value.split('_')) for value in values] if key == 'pad' else [int(value) for value in values]


def _taps(size: int, length: int, out: int, stride: int, pad: tuple[int, int], dilate: int, spread: int) -> float:
    """Mean number of window positions that meet data: TPU programs write batched products as padded convolutions."""
    at = np.arange(out)[:, None] * stride - pad[0] + np.arange(size)[None, :] * spread
    return float(((at >= 0) & (at % dilate == 0) & (at // dilate < length)).sum() / max(out, 1))
