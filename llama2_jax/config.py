"""Errors, model shapes, and command-line overrides (`--set path.to.field=value`)."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar('T')


class UserError(Exception):
    """A mistake of the person at the keyboard: the text is the one sentence they see, without a traceback."""


def between(default: Any, low: float, high: float = math.inf, resumable: str = '') -> Any:
    """A field of a config that holds a number, or several; `check_field` refuses values outside of `low`..`high`.

    Args:
      default: The value where none is given.
      low, high: The smallest and largest valid number.
      resumable: Whether a resumed run may change it: see `resumable_fields`.
    """
    return dataclasses.field(default=default, metadata={'range': (low, high), 'resumable': resumable})


def resumable(default: Any, where: Literal['anywhere', 'alone'] = 'anywhere') -> Any:
    """A field of a config that a resumed run may change: see `resumable_fields`."""
    return dataclasses.field(default=default, metadata={'resumable': where})


def resumable_fields(config: Any, prefix: str = '') -> Iterator[str]:
    """Dotted names of the fields that a resumed run may change.

    'anywhere' marks fields on which no result depends beyond rounding, such as the mesh. 'alone' marks what a stage uses after
    its first results, such as the fine-tuning after sampling: its own run may change them, a loop of several rounds may not.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        where = field.metadata.get('resumable')
        if where == 'anywhere' or (where == 'alone' and not prefix):
            yield name
        elif dataclasses.is_dataclass(value):
            yield from resumable_fields(value, name + '.')


SEED = between(0, 0, 2**32 - 1)  # the seeds that all generators of random numbers take


def check_field(label: str, value: Any, field: dataclasses.Field) -> None:
    """Checks a value against a field's type and range, which is that of `between`, else from 0 on; errors as of `check_value`."""
    kind, several = field.type, typing.get_origin(field.type) is tuple
    kind = typing.get_args(kind)[0] if several else kind
    if kind in (int, float, bool, str):
        for number in value if several else (value,):
            check_value(label, number, kind, *field.metadata.get('range', (0, math.inf)))


def check_value(label: str, value: Any, kind: type, low: float = -math.inf, high: float = math.inf) -> None:
    """Checks a value of a file or a command line.

    Args:
      label: What to call the value in the error: file and name.
      value: Any JSON value.
      kind: int, float (whole numbers pass), bool or str.
      low, high: The smallest and largest number that is valid.

    Raises:
      UserError: The type differs, the number is NaN or infinite, or it is out of range.
    """
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        name = {int: 'a whole number', float: 'a number', bool: 'true or false'}.get(kind, 'text')
        raise UserError(f'{label} is {shown(value)}, not {name}.')
    if kind in (int, float) and not (low <= value <= high and abs(value) < 2**63):
        limits = f'a number from {low} to {high}' if high < math.inf else f'a finite number of at least {low}'
        raise UserError(f'{label} is {shown(value)}, not {limits}.')


def shown(value: Any, size: int = 80) -> str:
    """A value of a file that is not ours, for an error: short, with control characters escaped."""
    text = repr(value)
    return text if len(text) <= size else f'{text[:size]}…'


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names of fields of a file that is not ours, for an error: a few short ones, with control characters escaped."""
    names = list(names)
    found = [name if name.isprintable() and len(name) <= 80 else shown(name) for name in names[:most]]
    return ', '.join(found + [f'{len(names) - most} more'] * (len(names) > most)) or '(none)'


def reason(error: Exception) -> str:
    """What another library says is wrong, on one line."""
    text = ' '.join(str(error).split()).removesuffix('.') or type(error).__name__
    return text if text.isprintable() and len(text) <= 200 else shown(text, 200)


class Config:
    """The base of all dataclasses of settings: one is made only if every number is in the range of its field."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field.name, getattr(self, field.name), field)


@dataclasses.dataclass(frozen=True)
class Names:
    """What a text field of a config names, for `inputs.py` to check before a run starts.

    Attributes:
      kind: a model, one source of rows or texts, a mixture of sources, or a directory that holds a file.
      of: of a model the kind, '' for both; of sources the kind of rows; the name of the file.
      words: values that name nothing, such as 'oracle' in the place of a judge.
    """

    kind: Literal['model', 'source', 'mixture', 'file']
    of: str = ''
    words: tuple[str, ...] = ()


LanguageModel = Annotated[str, Names('model', 'language model')]
RewardModel = Annotated[str, Names('model', 'reward model')]
AnyModel = Annotated[str, Names('model')]


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The shape of one LLaMA 2 model; letters as in `model/llama.py`.

    Values: paper p6 Table 1 (context, grouped queries) and LLaMA 1 Table 2 (the rest).
    """

    vocab_size: int = between(32_000, 1, 2**24)  # V
    dim: int = between(4096, 1, 2**20)  # D
    layers: int = between(32, 1, 10_000)  # N
    heads: int = between(32, 1, 2**16)  # H
    kv_heads: int = between(32, 1, 2**16)  # G
    head_dim: int = between(128, 1, 2**16)  # K
    hidden: int = between(11_008, 1, 2**22)  # F
    context: int = between(4096, 1, 2**27)  # the longest sequence the model is trained for
    norm_eps: float = between(1e-5, 1e-30, 1.0)
    rope_theta: float = between(10_000.0, 1.0, 1e15)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise UserError(f'model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}.')
        if self.head_dim % 2:
            raise UserError(f'model.head_dim={self.head_dim} must be even: RoPE rotates its two halves.')

    @property
    def parameters(self) -> int:
        """Number of parameters, both embedding matrices counted (recipe A.2)."""
        attention = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.dim * self.hidden + 2 * self.dim) + 2 * self.vocab_size * self.dim + self.dim

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs to train on one token of a sequence of `length`: matrix products and causal attention.

        Three passes (one forward, two backward) of two FLOPs a multiply-add; recomputation does not count. The
        embedding table is a lookup, and a query sees (length + 1) / 2 keys on average.
        """
        matrices = self.parameters - self.vocab_size * self.dim - (2 * self.layers + 1) * self.dim
        return 6 * matrices + 6 * self.layers * self.heads * self.head_dim * (length + 1)


def hidden_size(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """The feed-forward width by Meta's integer rule.

    >>> hidden_size(4096), hidden_size(5120), hidden_size(8192), hidden_size(8192, 4096, 1.3)
    (11008, 13824, 22016, 28672)
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


MODELS: Mapping[str, ModelConfig] = types.MappingProxyType(
    {
        'tiny': ModelConfig(vocab_size=1024, dim=128, layers=4, heads=4, kv_heads=2, head_dim=32, hidden=352, context=256),
        'small': ModelConfig(vocab_size=4096, dim=192, layers=6, heads=6, kv_heads=2, head_dim=32, hidden=512, context=256),
        '7b': ModelConfig(),
        '13b': ModelConfig(dim=5120, layers=40, heads=40, kv_heads=40, hidden=hidden_size(5120)),
        '34b': ModelConfig(dim=8192, layers=48, heads=64, kv_heads=8, hidden=hidden_size(8192)),
        '70b': ModelConfig(dim=8192, layers=80, heads=64, kv_heads=8, hidden=hidden_size(8192, 4096, 1.3)),
    }
)


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence's tail that helps after an unknown name: the nearest valid one, or all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name[:200], choices, n=1, cutoff=0.5)
    return f'did you mean {close[0]!r}?' if close else f'valid: {", ".join(choices)}.'


def override(config: T, assignments: Iterable[str]) -> T:
    """Applies `path.to.field=value` strings to a tree of frozen dataclasses; values are parsed by field type.

    Raises:
      UserError: for an unknown path (with the nearest valid name), a section given a value, or a value of another type.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition('=')
        if not equals:
            raise UserError(f'--set {assignment!r} is not of the form path.to.field=value.')
        _note(config, path.strip().split('.'), text.strip(), path.strip(), changes)
    return _replace(config, changes)


def _note(config: Any, path: list[str], text: str, whole: str, changes: dict[str, Any]) -> None:
    """Puts a parsed value into `changes`, a tree like the config's; the last of several for one field counts."""
    hints = typing.get_type_hints(type(config))
    name, rest = path[0], path[1:]
    if name not in hints:
        raise UserError(f'--set {whole}: {type(config).__name__} has no field {name!r}; {nearest(name, hints)}')
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            fields = ', '.join(field.name for field in dataclasses.fields(value))
            raise UserError(f'--set {whole} is a section, not a value; its fields: {fields}.')
        _note(value, rest, text, whole, changes.setdefault(name, {}))
    elif rest:
        raise UserError(f'--set {whole}: {name!r} is a value and has no field {rest[0]!r}.')
    else:
        changes[name] = _parse(text, hints[name], whole)
        if isinstance(config, Config):
            check_field(f'--set {whole}', changes[name], type(config).__dataclass_fields__[name])


def _replace(config: T, changes: dict[str, Any]) -> T:
    """All changes at once: what the fields demand of each other is checked when all have their values."""
    new = {name: _replace(getattr(config, name), value) if isinstance(value, dict) else value for name, value in changes.items()}
    return dataclasses.replace(config, **new)


def _parse(text: str, hint: Any, path: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise UserError(f'--set {path}={text}: {nearest(text, typing.get_args(hint))}')
        return text
    if typing.get_origin(hint) is tuple:
        return tuple(_parse(part.strip(), typing.get_args(hint)[0], path) for part in text.split(',') if part.strip())
    try:
        if hint is bool:
            return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
        if hint is int:
            number = float(text) if 'e' in text.lower() else int(text.replace('_', ''))
            if number != int(number):
                raise ValueError
            return int(number)
        return hint(text)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f'--set {path}={text}: {text!r} is not of type {hint.__name__}.') from None


def to_json(config: Any) -> str:
    """The config as indented JSON with a final newline."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + '\n'


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Rebuilds a flat dataclass from JSON values; `where` names the file in errors.

    Raises:
      UserError: for unknown or missing fields, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(values, Mapping):
        raise UserError(f'{where}: {shown(values)} is not an object with the fields of a {cls.__name__}.')
    if unknown := sorted(values.keys() - fields.keys()):
        raise UserError(f'{where}: unknown field {shown(unknown[0])}; {nearest(unknown[0], fields)}')
    missing_value = dataclasses.MISSING
    required = {name for name, f in fields.items() if f.default is missing_value and f.default_factory is missing_value}
    if missing := sorted(required - values.keys()):
        raise UserError(f'{where}: field {missing[0]!r} is missing.')
    for name, value in values.items():
        check_field(f'{where}: field {name!r}', value, fields[name])
    try:
        return cls(**values)
    except UserError as error:  # what fields demand of each other
        raise UserError(f'{where}: {error}') from None
