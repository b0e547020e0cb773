"""Renders a chat template: a program in Jinja that somebody else wrote.

It runs in Jinja's sandbox, without the functions that make large strings, and with bounds on steps, time and sizes.
"""

import functools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llama2_jax.config import UserError

MAX_OUTPUT = 4_000_000  # characters, of the prompt and of any string on the way to it
MAX_PRODUCT = 100 * MAX_OUTPUT  # of the sizes of two strings, one of which is put into the other
MAX_STEPS = 1_000_000
MAX_SECONDS = 2.0
FILTERS = {
    *('abs', 'attr', 'capitalize', 'count', 'd', 'default', 'dictsort', 'e', 'escape', 'first', 'float', 'groupby'),
    *('int', 'items', 'join', 'last', 'length', 'list', 'lower', 'map', 'max', 'min', 'reject', 'rejectattr'),
    *('replace', 'reverse', 'round', 'safe', 'select', 'selectattr', 'sort', 'string', 'sum', 'title', 'trim'),
    *('unique', 'upper'),
}  # fmt: skip
LARGE = {'center', 'ljust', 'rjust', 'zfill', 'expandtabs', 'format', 'format_map', 'translate'}  # methods of strings


def render(template: str, messages: Sequence[Mapping[str, Any]], bos: str, eos: str, where: str = 'The dialog') -> str:
    """The prompt that a template makes of a dialog, up to where the answer begins.

    Raises:
      UserError: the template is not valid, refuses the dialog, or does more than MAX_STEPS, MAX_SECONDS or MAX_OUTPUT allow.
    """
    try:
        compiled = _compiled(template)
        _Sandbox.deadline, _Sandbox.steps = time.monotonic() + MAX_SECONDS, 0
        plain = [{'role': message['role'], 'content': message['content']} for message in messages]
        return _joined(compiled.generate(messages=plain, bos_token=bos, eos_token=eos, add_generation_prompt=True, tools=None))
    except Exception as error:  # of any kind: the program is not ours
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{where}: the model's chat template does not render it ({reason}).") from None


class _Generator(CodeGenerator):
    """Has the compiled template count its steps, and make strings and lists where their size is checked."""

    def blockvisit(self, body: Any, frame: Any) -> None:
        self.writeline('environment.step()')
        super().blockvisit(body, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write('environment.joined((')
        for part in node.nodes:
            self.visit(part, frame)
            self.write(', ')
        self.write('))')

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._checked(super().visit_Dict, node, frame)

    def _checked(self, visit: Any, node: Any, frame: Any) -> None:
        self.write('environment.bounded(')
        visit(node, frame)
        self.write(')')


class _Generation(Extension):
    """`{% generation %}` marks what is trained on, which a prompt does not show."""

    tags = frozenset({'generation'})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(['name:endgeneration'], drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({'+', '*', '**', '%'})
    concat = staticmethod(lambda parts: _joined(parts))
    deadline, steps = 0.0, 0

    @staticmethod
    def step() -> None:
        _Sandbox.steps += 1
        if _Sandbox.steps > MAX_STEPS or time.monotonic() > _Sandbox.deadline:
            raise TemplateError(f'it takes more than {MAX_STEPS} steps or {MAX_SECONDS:.0f} seconds')

    @staticmethod
    def joined(parts: Sequence[Any]) -> str:
        return _joined([str(_bounded(part)) for part in parts])

    @staticmethod
    def bounded(value: Any) -> Any:
        return _bounded(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.step()
        if operator == '+':
            return _bounded(left + right)
        if all(isinstance(value, int | float) for value in (left, right)) and abs(left) < 2**40 and abs(right) < 64:
            return super().call_binop(context, operator, left, right)
        raise TemplateError(f'{operator!r} is not allowed between {type(left).__name__} and {type(right).__name__}')

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        self.step()
        if isinstance(of := getattr(function, '__self__', None), str):
            _check_product(of, *arguments, *named.values())
        return _bounded(super().call(context, function, *arguments, **named))

    def is_safe_attribute(self, value: Any, name: str, attribute: Any) -> bool:
        return not (isinstance(value, str) and name in LARGE) and super().is_safe_attribute(value, name, attribute)

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(getattr(value, '__self__', None), str) and value.__name__ in LARGE:
            raise TemplateError(f'str.{value.__name__} is not allowed')


def _bounded(value: Any) -> Any:
    """The value, if what it holds is not too large; a list that is shared counts each time, as it would when printed."""
    size, todo = 0, [value]
    while todo:
        item = todo.pop()
        size += len(item) if isinstance(item, str) else 1
        if isinstance(item, list | tuple):
            size += len(item)
        elif isinstance(item, dict):
            item = [*item.keys(), *item.values()]
        elif isinstance(item, _Namespace):
            item = list(object.__getattribute__(item, '_Namespace__attrs').values())
        if size > MAX_OUTPUT:
            raise TemplateError(f'it makes more than {MAX_OUTPUT} characters')
        if isinstance(item, list | tuple):
            todo += item
    return value


def _joined(parts: Iterable[str]) -> str:
    text, size = [], 0
    for part in parts:
        text.append(part)
        if (size := size + len(part)) > MAX_OUTPUT:
            raise TemplateError(f'it makes more than {MAX_OUTPUT} characters')
    return ''.join(text)


def _check_product(*values: Any) -> None:
    """Before strings are put into each other: `replace` and `join` can square their size."""
    sizes = []
    for value in values:
        strings = value if isinstance(value, list | tuple) else [value]
        sizes += [len(_bounded(value))] if isinstance(value, list | tuple | range) else []
        sizes += [max((len(item) for item in strings if isinstance(item, str)), default=1)]
    second, first = sorted([*sizes, 1, 1])[-2:]
    if first * second > MAX_PRODUCT:
        raise TemplateError('it makes strings that are too large')


def _checked(function: Any) -> Any:
    @functools.wraps(function)  # with Jinja's mark of what its first argument is
    def filtered(*arguments: Any, **named: Any) -> Any:
        _Sandbox.step()
        _check_product(*arguments, *named.values())
        return _bounded(function(*arguments, **named))

    return filtered


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith('_'):
            raise TemplateError(f'the name {name!r} is not allowed')
        super().__setitem__(name, _bounded(value))


def _refuse(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
    return json.dumps(
        _bounded(value), ensure_ascii=ensure_ascii, indent=None if indent is None else min(int(indent), 16), **settings
    )


@functools.cache
def _environment() -> _Sandbox:
    # As transformers sets it up, but for the bounds; nothing is computed while compiling, where no bounds hold.
    settings = {'trim_blocks': True, 'lstrip_blocks': True, 'extensions': [_Generation, loopcontrols]}
    environment = _Sandbox(**settings, optimized=False, finalize=_bounded)
    environment.filters = {name: _checked(function) for name, function in environment.filters.items() if name in FILTERS}
    environment.filters['tojson'] = _to_json
    environment.globals = {
        'range': environment.globals['range'],
        'dict': dict,
        'namespace': _Namespace,
        'raise_exception': _refuse,
        'strftime_now': lambda form: datetime.now().strftime(form[:100]),
    }
    return environment


@functools.cache
def _compiled(template: str) -> Any:
    return _environment().from_string(template)
