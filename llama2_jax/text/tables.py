"""Tables in Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of the same columns, at least one, as a table.

    For example:

        >>> print(markdown_table([{'stage': 'SFT', 'n': 36}]))
        | stage | n |
        |---|---|
        | SFT | 36 |
    """
    rows = list(rows)
    lines = [f'| {" | ".join(rows[0])} |', '|---' * len(rows[0]) + '|']
    return '\n'.join(lines + [f'| {" | ".join(map(str, row.values()))} |' for row in rows])
