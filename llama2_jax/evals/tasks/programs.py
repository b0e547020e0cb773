"""Python programs in the words of a model: fenced blocks of code, and what of them is run against a task's tests."""

import ast
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator

_FENCE = re.compile(r'\s*(?:[-*+>]\s+|\d+[.)]\s+)?(?P<marks>`{3,}|~{3,})\s*(?P<info>[^`]*)$')
_FENCE_LINE = re.compile(r'^\s*(?:`{3,}|~{3,})', re.MULTILINE)
_FUTURE = re.compile(r'^from __future__ .*\n', re.MULTILINE)
_PYTHON = re.compile(r'\{?\.?(?:i?py(?:thon|con)?[\d.]*)?\}?', re.IGNORECASE)  # or no word at all
_STARTS = re.compile(r'(?:from|import|def|class|async def|@)\b|@\w|\w+(?:\s*:[^=]+)?\s*=[^=]')
_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def program(prompt: str, answer: str, names: Collection[str]) -> str:
    """The code to test: the prompt's beginning (for MBPP ''), continued or answered by a model.

    Args:
      prompt: Code that ends in the head of the function asked for; its helpers and imports stay in front of an answer that
        defines this function again.
      answer: Lines that continue the prompt, or a chat model's text with the code in it.
      names: The functions asked for.

    Returns:
      Code in which statements other than definitions cannot end the program: an answer's own checks, `sys.exit()`, `input()`.
      `__name__` is not '__main__' in it.
    """
    prompt, answer = _lines(prompt), _lines(answer)
    blocks = list(fenced(answer))
    whole = [code for _, code in blocks if _defines(code, names)]
    if not blocks and _defines(answer, names):
        whole = [_code_within(answer, names)]
    if whole:
        code = next((code for code in reversed(whole) if _written(code, names)), whole[-1])
        future = ''.join(_FUTURE.findall(code))  # must be the first statement
        parts = [f'{future}{before(prompt, names)}\n{_FUTURE.sub("", code)}', code]
    else:
        lead = answer if not blocks else _FENCE_LINE.split(answer, maxsplit=1)[0]
        bodies = [code for info, code in blocks if _PYTHON.fullmatch(info)]
        parts = [prompt + form for body in bodies if body.strip() for form in (textwrap.indent(body, '    '), body)]
        continued = [prompt + lead, prompt + textwrap.indent(textwrap.dedent(lead), '    ')]
        parts = [*continued, *parts] if re.match(r'\s*\n?[ \t]', lead) or not parts else parts
    return _tolerant(next((part for part in parts if _tree(part)), parts[0]))


def fenced(text: str) -> Iterator[tuple[str, str]]:
    """The (info string's first word, code) of every fenced block.

    A fence with an info string opens a block, also where the one before it was not closed; one without closes what is open.

    >>> list(fenced('Run:\\n``` bash\\nls\\n```\\n~~~PY\\nx = 1\\n~~~'))
    [('bash', 'ls\\n'), ('PY', 'x = 1\\n')]
    """
    marks, info, block = '', '', []
    for line in text.split('\n'):
        found = _FENCE.match(line)
        if found and (not marks or found['info'].strip() or found['marks'].startswith(marks)):
            if marks:
                yield info, _dedent(block)
            opens = not marks or bool(found['info'].strip())
            marks = found['marks'] if opens else ''
            info, block = (found['info'].split() or [''])[0], []
        elif marks and line.rstrip().endswith(marks):  # after the last line of code
            block.append(line.rstrip().removesuffix(marks))
            yield info, _dedent(block)
            marks = ''
        elif marks:
            block.append(line)
    if marks:
        yield info, _dedent(block)


def _lines(text: str) -> str:
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _dedent(lines: list[str]) -> str:
    return textwrap.dedent('\n'.join(lines)).rstrip('\n') + '\n'


def _tree(code: str) -> ast.Module | None:
    """Its syntax tree; None where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # such as '\d' in a string
            compile(code, 'answer', 'exec')  # refuses more than the parser, such as `return` outside a function
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defines(code: str, names: Collection[str]) -> bool:
    """Whether one of the functions is defined at the top level."""
    pattern = '|'.join(map(re.escape, names))
    return bool(re.search(rf'^(?:(?:async )?def (?:{pattern})\s*\(|(?:{pattern})\s*(?::[^=\n]+)?=[^=])', code, re.MULTILINE))


def _written(code: str, names: Collection[str]) -> bool:
    """Whether it is Python, and no function asked for is left as it was in the prompt: a docstring, perhaps with an import."""
    tree = _tree(code)
    functions = [node for node in tree.body if getattr(node, 'name', '') in names] if tree else []
    empty = (ast.Expr, ast.Pass, ast.Import, ast.ImportFrom)
    return bool(tree) and not any(all(isinstance(line, empty) for line in function.body) for function in functions)


def before(prompt: str, names: Collection[str]) -> str:
    """The prompt's lines before the function asked for: imports and helpers."""
    pattern = '|'.join(map(re.escape, names))
    head = re.search(rf'^(?:@.*\n)*(?:async )?def (?:{pattern})\s*\(', prompt, re.MULTILINE)
    return prompt[: head.start()] if head else ''


def _code_within(text: str, names: Collection[str]) -> str:
    """The first piece of a text without fences that is Python and defines the functions, or else all of it."""
    lines = text.split('\n')
    for start in (number for number, line in enumerate(lines) if _STARTS.match(line)):
        end = len(lines)
        while end > start:
            code = '\n'.join(lines[start:end]) + '\n'
            if not _defines(code, names):
                break
            if _tree(code):
                return code
            end -= 1
    return text


def _tolerant(code: str) -> str:
    """The same program, in which statements that define nothing cannot end it."""
    tree = _tree(code)
    if not tree:
        return code
    body = []
    for node in tree.body:
        if isinstance(node, _DEFINITIONS):
            body.append(node)
        else:
            names = [ast.Name(name, ast.Load()) for name in ('Exception', 'SystemExit')]
            handler = ast.ExceptHandler(ast.Tuple(names, ast.Load()), None, [ast.Pass()])
            body.append(ast.Try([node], [handler], [], []))
    future = sum(isinstance(node, ast.ImportFrom) and node.module == '__future__' for node in tree.body)
    body.insert(future, ast.parse("__name__ = 'answer'").body[0])
    try:
        return ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    except RecursionError:
        return code
