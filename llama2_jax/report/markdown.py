"""As much of Markdown as the stages write, as HTML. Whatever a model has written is text, never markup."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

_KEPT = re.compile(r'&lt;(/?(?:pre|mark))&gt;')
_TWICE = re.compile(r'&amp;(lt|gt|amp|quot|#x27|#124);')


def escape(text: str) -> str:
    """Text for HTML; what its writer has escaped already is not escaped again."""
    return _TWICE.sub(r'&\1;', html.escape(text))


def inline(text: str) -> str:
    """A line, with bold, code and links."""
    text = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', escape(text))
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', text)


def render(text: str, marks: bool = False) -> str:
    """Blocks of Markdown as HTML; with `marks`, `<pre>` and `<mark>` in it stay what they are."""
    if marks and '<pre>' in text:
        before, _, rest = text.partition('<pre>')
        inside, _, after = rest.partition('</pre>')
        shown = _KEPT.sub(r'<\1>', escape(inside))
        return f'{render(before)}<pre>{shown}</pre>{render(after)}'
    return ''.join(map(block, filter(str.strip, re.split(r'\n\s*\n', text))))


def block(text: str) -> str:
    """A paragraph, heading, quotation, list, table or piece of code."""
    lines = text.splitlines()
    if lines[0].startswith('#'):
        rest = '\n'.join(lines[1:])
        return f'<h4>{inline(lines[0].lstrip("# "))}</h4>' + (block(rest) if rest.strip() else '')
    kinds = {'>': 'quote', '|': 'table', '-': 'list'}
    parts = []
    for kind, group in groupby(lines, key=lambda line: kinds.get(line.lstrip()[:1], 'text')):
        some = list(group)
        if kind == 'quote':
            parts.append('<blockquote>' + '<br>'.join(inline(line.lstrip()[1:].strip()) for line in some) + '</blockquote>')
        elif kind == 'table':
            rows = [[cell.strip() for cell in line.strip().strip('|').split('|')] for line in some if set(line) - set('|-: ')]
            parts.append(table(rows[0], rows[1:]) if rows else '')
        elif kind == 'list':
            parts.append('<ul>' + ''.join(f'<li>{inline(line.lstrip("- "))}</li>' for line in some) + '</ul>')
        else:
            parts.append('<p>' + '<br>'.join(map(inline, some)) + '</p>')
    return ''.join(parts)


def table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    head = ''.join(f'<th>{inline(str(column))}</th>' for column in columns)
    body = ''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value: Any) -> str:
    """A number to the right, text to the left."""
    if isinstance(value, bool) or value is None:
        return f'<td>{"–" if value is None else str(value).lower()}</td>'
    if isinstance(value, int | float):
        return f'<td class="number">{number(value)}</td>'
    text = str(value)
    return f'<td{" class=number" if re.fullmatch(r"[-+]?[0-9.,]+ ?%?", text) else ""}>{inline(text)}</td>'


def number(value: float) -> str:
    """For people: 12,345, 0.8409."""
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}' if abs(value) < 1e5 else f'{value:,.0f}'


def tables_of(name: str, value: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What a JSON file holds, as tables (title, rows): lists of objects, objects of objects, and whatever numbers are left."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        yield name, [flat(item) for item in value]
    elif isinstance(value, Mapping):
        inner = {key: item for key, item in value.items() if isinstance(item, Mapping)}
        if len(inner) > 1 and all(not any(isinstance(deep, Mapping | list) for deep in item.values()) for item in inner.values()):
            yield name, [{'': key, **item} for key, item in inner.items()]
        else:
            for key, item in inner.items():
                yield from tables_of(f'{name} · {key}', item)
        for key, item in value.items():
            if isinstance(item, list):
                yield from tables_of(f'{name} · {key}', item)
        if plain := {key: item for key, item in value.items() if not isinstance(item, Mapping | list)}:
            yield name, [{'': key, 'value': item} for key, item in plain.items()]


def flat(item: Mapping[str, Any]) -> dict[str, Any]:
    """Without objects in it; lists as text."""
    found = {}
    for key, value in item.items():
        if isinstance(value, Mapping):
            found |= {f'{key}/{deep}': inner for deep, inner in flat(value).items()}
        else:
            found[key] = ', '.join(map(str, value)) if isinstance(value, list) else value
    return found
