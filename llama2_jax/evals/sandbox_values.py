"""How the two processes of `sandbox_child` talk: requests and plain values as JSON, and no code of the other side.

Plain values (numbers, strings, lists, tuples, sets, dictionaries, …) are copied with their types. What a call changes in the
lists, sets and dictionaries that it was given is copied back. Anything else stays where it is, and the other side gets a
`Remote`, which forwards calls, attributes and iteration, but no comparison: an object of the program equals nothing.
"""

import builtins
import collections
import importlib
import json
import os
import struct
import sys

MESSAGE = 2**26  # bytes, at most
KEYS, ITEMS = type({}.keys()), type({}.items())
MUTABLE = {'l': list, 'd': dict, 's': set, 'b': bytearray, 'q': collections.deque}
FROZEN = {'t': tuple, 'f': frozenset}


class Gone(Exception):
    """The other process has ended, or does not speak this language."""


class Remote:
    """An object of the other process."""

    def __init__(self, peer: 'Peer', number: int):
        self.__dict__.update(_peer=peer, _number=number)

    def __repr__(self):
        return '<object of the other process>'

    def __getattr__(self, name):
        return self._peer.ask('getattr', self, name)

    def __setattr__(self, name, value):
        self._peer.ask('setattr', self, name, value)

    def __call__(self, *values, **named):
        """Calls it in the other process."""
        return self._peer.ask('call', self, list(values), named)


def _forwarded(name):
    return lambda self, *values: self._peer.ask(name, self, *values)


OPERATIONS = {
    'call': lambda function, values, named: function(*values, **named),
    'getattr': getattr, 'setattr': setattr, 'iter': iter, 'next': next, 'len': len, 'bool': bool, 'str': str,
    'getitem': lambda value, key: value[key], 'setitem': lambda value, key, item: value.__setitem__(key, item),
    'contains': lambda value, item: item in value,
}  # fmt: skip
for _name in ('iter', 'next', 'len', 'bool', 'str', 'getitem', 'setitem', 'contains'):
    setattr(Remote, f'__{_name}__', _forwarded(_name))


def _is(value, module: str, name: str) -> bool:
    """Whether it is of a class whose module takes long to import; where it is not imported there are no such values."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


class Peer:
    """One end of the connection.

    Attributes:
      operations: What the other side may ask for.
    """

    def __init__(self, reading: int, writing: int, operations: dict):
        self.reading, self.writing, self.operations = reading, writing, operations
        self.exported: list = []
        self.exported_numbers: dict[int, int] = {}
        self.remotes: dict[int, Remote] = {}

    def send(self, message) -> None:
        """Writes a message; raises Gone."""
        data = json.dumps(message).encode()
        data = struct.pack('=I', len(data)) + data
        try:
            while data:
                data = data[os.write(self.writing, data) :]
        except BrokenPipeError:
            raise Gone('killed') from None

    def receive(self):
        """The next message; raises Gone."""
        (size,) = struct.unpack('=I', self._read(4))
        if size > MESSAGE:
            raise Gone('ValueError: an answer is too large')
        try:
            return json.loads(self._read(size))
        except (ValueError, RecursionError):
            raise Gone('ValueError: an answer is not valid') from None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = os.read(self.reading, min(size - len(data), 2**20))
            if not piece:
                raise Gone('killed')
            data += piece
        return bytes(data)

    def ask(self, operation: str, *values):
        """Has the other side do something, and answers its questions in the meantime."""
        table: list = []
        self.send(['ask', operation, [self.encode(value, table) for value in values]])
        while True:
            message = self.receive()
            try:
                kind, *parts = message
                if kind == 'value':
                    result, states = parts
                    return self._accept(result, states, table)
                if kind == 'error':
                    error = self._error(*parts)
            except Exception:
                raise Gone('ValueError: an answer is not valid') from None
            if kind == 'error':
                raise error
            self.answer(message)

    def _accept(self, result, states, table: list):
        """Decodes a result, and puts what the call has changed into the values that were given to it."""
        given, contents = len(table), []
        decoded = list(table)
        for value, state in zip(table, states, strict=True):
            contents.append(self._fill(type(value)(), state, decoded))
        result = self.decode(result, decoded)
        for value, content in zip(table[:given], contents, strict=True):
            if isinstance(value, list | bytearray):
                value[:] = content
            else:
                value.clear()
                (value.extend if isinstance(value, collections.deque) else value.update)(content)
        return result

    def answer(self, message) -> None:
        """Does what the other side asks for."""
        try:
            kind, operation, values = message
            table: list = []
            values = [self.decode(value, table) for value in values]
            if kind != 'ask':
                raise ValueError(f'{kind} is not a question')
            result = self.operations[operation](*values)
            numbers, known = {id(value): number for number, value in enumerate(table)}, list(table)
            states = [self._content(value, known, numbers) for value in table]
            self.send(['value', self.encode(result, known, numbers), states])
        except Gone:
            raise
        except BaseException as error:
            self.send(self.describe(error))

    def describe(self, error: BaseException) -> list:
        """The message that raises an exception on the other side."""
        names = [kind.__name__ for kind in type(error).__mro__]
        try:
            return ['error', names, str(error)[:200], [self.encode(value, []) for value in error.args[:9]]]
        except BaseException:
            return ['error', names, '', []]

    def _error(self, names: list, text: str, values: list) -> BaseException:
        known = (getattr(builtins, name) for name in names if isinstance(getattr(builtins, name, None), type))
        base = next(kind for kind in known if issubclass(kind, BaseException))
        kind = base if names[0] == base.__name__ else type(str(names[0])[:100], (base,), {})
        try:
            error = kind(*(self.decode(value, []) for value in values))
            if str(error)[:200] == text:
                return error
        except Exception:
            pass
        return type(str(names[0])[:100], (Exception,), {})(str(text))

    def encode(self, value, table: list, numbers: dict | None = None):
        """A value as JSON; lists, sets and dictionaries are added to `table` and written once."""
        if type(value).__module__ == 'numpy' and getattr(value, 'shape', None) == () and type(value).__name__ != 'ndarray':
            value = value.item()
        if value is None or value is True or value is False:
            return value
        numbers = {id(known): number for number, known in enumerate(table)} if numbers is None else numbers
        if isinstance(value, int):
            return int(value) if -(2**60) < value < 2**60 else ['i', hex(value)]
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, float):
            return float(value)
        if id(value) in numbers:
            return ['r', numbers[id(value)]]
        for tag, kind in MUTABLE.items():
            if isinstance(value, kind):
                numbers[id(value)] = len(table)
                table.append(value)
                return [tag, self._content(value, table, numbers)]
        for tag, kind in FROZEN.items():
            if isinstance(value, kind):
                return [tag, [self.encode(item, table, numbers) for item in value]]
        if isinstance(value, KEYS | ITEMS):
            return ['k' if isinstance(value, KEYS) else 'I', [self.encode(item, table, numbers) for item in value]]
        if isinstance(value, bytes):
            return ['B', value.hex()]
        if isinstance(value, complex):
            return ['c', value.real, value.imag]
        if isinstance(value, range):
            return ['R', *(self.encode(number, table, numbers) for number in (value.start, value.stop, value.step))]
        if _is(value, 'fractions', 'Fraction'):
            return ['F', hex(value.numerator), hex(value.denominator)]
        if _is(value, 'decimal', 'Decimal'):
            return ['D', str(value)]
        if isinstance(value, Remote):
            return ['yours', value._number]
        if id(value) not in self.exported_numbers:
            self.exported_numbers[id(value)] = len(self.exported)
            self.exported.append(value)  # which keeps it, and so its id
        return ['mine', self.exported_numbers[id(value)]]

    def _content(self, value, table: list, numbers: dict):
        if isinstance(value, bytearray):
            return value.hex()
        if isinstance(value, dict):
            return [[self.encode(key, table, numbers), self.encode(item, table, numbers)] for key, item in dict.items(value)]
        return [self.encode(item, table, numbers) for item in value]

    def decode(self, data, table: list):
        """The value that `encode` was given; only of exact, built-in types."""
        if not isinstance(data, list):
            if isinstance(data, dict):
                raise ValueError('a value is not valid')
            return data
        tag, *parts = data
        if tag in MUTABLE:
            value = MUTABLE[tag]()
            table.append(value)  # before what is in it, which may refer to it
            return self._fill(value, parts[0], table)
        if tag in FROZEN:
            return FROZEN[tag](self.decode(item, table) for item in parts[0])
        if tag == 'k':
            return dict.fromkeys(self.decode(item, table) for item in parts[0]).keys()
        if tag == 'I':
            return dict(self.decode(item, table) for item in parts[0]).items()
        if tag == 'r':
            return table[parts[0]]
        if tag == 'mine':
            return self.remotes.setdefault(int(parts[0]), Remote(self, int(parts[0])))
        if tag == 'yours':
            return self.exported[parts[0]]
        simple = {
            'i': lambda text: int(text, 16),
            'B': bytes.fromhex,
            'c': complex,
            'R': lambda *numbers: range(*(self.decode(number, table) for number in numbers)),
            'F': lambda above, below: importlib.import_module('fractions').Fraction(int(above, 16), int(below, 16)),
            'D': lambda text: importlib.import_module('decimal').Decimal(text),
        }
        return simple[tag](*parts)

    def _fill(self, value, content, table: list):
        if isinstance(value, bytearray):
            value += bytes.fromhex(content)
        elif isinstance(value, dict):
            value.update((self.decode(key, table), self.decode(item, table)) for key, item in content)
        elif isinstance(value, set):
            value.update(self.decode(item, table) for item in content)
        else:
            value.extend(self.decode(item, table) for item in content)
        return value
