"""Everything that a config names, checked before a run begins: nothing is trained, loaded or downloaded for a run that must fail.

A field says what it names by its type (`config.Names`), so that this one function serves all stages.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from llama2_jax.checkpoints.load import check_given, open_model, tokenizer_of
from llama2_jax.config import ModelConfig, Names, UserError
from llama2_jax.data.comparisons import read_comparisons
from llama2_jax.data.mixing import Component, parse_mixture
from llama2_jax.data.prompts import read_questions
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.data.sources import check_tfds, split
from llama2_jax.files import locate
from llama2_jax.text.tokenizer import Tokenizer

HEADS = {'language model': 'head_DV', 'reward model': 'score_D'}
READERS: dict[str, Callable[[str], Iterator[Any]]] = {
    'dialogs': read_dialogs, 'comparisons': read_comparisons, 'prompts': read_questions,
}  # fmt: skip


def check_inputs(config: Any, *required: str) -> None:
    """Checks every model, source and file that a config names, at any depth.

    Fields that name nothing are passed over, as are those in the config's `OVERWRITTEN`, which its stage sets itself. The first
    row of a source is read, unless bad rows may be skipped. TFDS data sets are not opened: that would download them.

    Args:
      config: a dataclass whose fields are marked with `Names`.
      required: dotted fields that must name something.

    Raises:
      UserError: naming the field, and what is wrong with its value.
    """
    named = dict(_named(config, ''))
    for field in required:
        values, names = named[field]
        for value in values or ('',):
            if names.kind == 'model':
                check_given(field, value)
            elif not value:
                raise UserError(f'{field} is missing: give it with --set {field}=….')
    for field, (values, names) in named.items():
        for value in values:
            if not value or value in names.words:
                continue
            if names.kind == 'model':
                check_given(field, value)
            try:
                _check(value, names)
            except UserError as error:
                raise UserError(f'{field}={value}: {error}') from None


def _named(config: Any, prefix: str) -> Iterator[tuple[str, tuple[tuple[str, ...], Names]]]:
    """Dotted field -> its values and what they name."""
    overwritten = getattr(type(config), 'OVERWRITTEN', ())
    for field, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, field, None)
        if dataclasses.is_dataclass(value):
            inner = _named(value, f'{field}.')
        else:
            [hint] = {part for part in typing.get_args(hint) if part is not ...} if typing.get_origin(hint) is tuple else {hint}
            values = value if isinstance(value, tuple) else (value,)
            inner = ((field, (values, names)) for names in getattr(hint, '__metadata__', ()) if isinstance(names, Names))
        for path, found in inner:
            if not any(path == other or path.startswith(f'{other}.') for other in overwritten):
                yield prefix + path, found


def _check(value: str, names: Names) -> None:
    if names.kind == 'model':
        head = open_model(value).head
        if names.of and head != HEADS[names.of]:
            raise UserError(f'this is a {next(kind for kind in HEADS if HEADS[kind] == head)}; give a {names.of}.')
    elif names.kind == 'file':
        if not (locate(value) / names.of).exists():
            raise UserError(f'there is no {names.of} in it.')
    else:
        for component in parse_mixture(value) if names.kind == 'mixture' else (Component(value),):
            kind, _, name = component.source.partition(':')
            if kind == 'tfds':
                check_tfds(name)
            else:
                split(component.source)
            read = kind not in ('tfds', 'toy') and not component.skip and READERS.get(names.of)
            if read and next(read(component.source), None) is None:
                raise UserError(f'{component.source} has no rows.')


def common_tokenizer(models: Mapping[str, str]) -> Tokenizer:
    """The tokenizer of the models, field -> path, which must share it: token ids that one of them draws are read by the others.

    Raises:
      UserError: naming the first model that has another one.
    """
    tokenizers = {field: tokenizer_of(open_model(path)) for field, path in models.items()}
    first, *others = tokenizers
    for field in others:
        if tokenizers[field].model != tokenizers[first].model:
            raise UserError(
                f'{field}={models[field]} has another tokenizer than {first}={models[first]}: token ids that one of them draws '
                'mean something else to the other.'
            )
    return tokenizers[first]


def check_room(longest: int, max_new_tokens: int, models: Iterable[tuple[str, ModelConfig]]) -> None:
    """Raises a UserError where the longest prompt with its answer does not fit the context of a model (field, shape)."""
    for field, shape in models:
        if longest + max_new_tokens > shape.context:
            raise UserError(
                f'prompts.longest={longest} and max_new_tokens={max_new_tokens} are more than the context of {field}, '
                f'{shape.context}: make one of them smaller.'
            )
