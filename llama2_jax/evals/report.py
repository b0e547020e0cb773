"""The table at the end: every task and group beside the paper's figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama2_jax.evals.measure import interval, resampled
from llama2_jax.evals.paper import reported
from llama2_jax.evals.tasks import PAPER, TASKS

Result = Mapping[str, Any]  # as `stages.evaluate` writes it to TASK.json


def rows(results: Mapping[str, Result], size: str | None, chat: bool) -> list[dict[str, Any]]:
    """One for each task, with its groups below it, then one for each group of the paper whose tasks are all there."""
    table, drawn = [], {}
    for name, result in results.items():
        measure = TASKS[name].headline(result['measures'])
        drawn[name] = resampled(result['values'], name)
        table.append(
            {
                'name': name,
                'shots': result['shots'],
                'measure': measure,
                'ours': result['measures'][measure],
                'interval': interval(drawn[name]),
                'paper': reported(name, size, chat),
                **{key: result[key] for key in ('examples', 'seconds', 'tokens_per_second')},
            }
        )
        for other, value in result['measures'].items():
            if other != measure:
                table.append(_row(name, other, value, reported(f'{name}/{other}', size, chat)))
        for group, values in result['groups'].items():
            if measure in values:
                table.append(_row(f'{name}/{group}', measure, values[measure], reported(f'{name}/{group}', size, chat)))
    for group, members in PAPER.items():
        if len(members) > 1 and set(members) <= results.keys():
            samples = np.mean([drawn[name] for name in members], axis=0)
            ours = float(np.mean([np.mean(results[name]['values']) for name in members]))
            row = _row(f'mean of {group}', 'mean', ours, reported(f'group:{group}', size, chat))
            table.append(row | {'interval': interval(samples)})
    return table


def _row(name: str, measure: str, ours: float, paper: float | None) -> dict[str, Any]:
    return {'name': name, 'measure': measure, 'ours': ours, 'paper': paper}


def markdown(table: Sequence[Mapping[str, Any]], size: str | None, chat: bool) -> str:
    """The table; shares in per cent."""
    paper = f'Llama 2{"-Chat" if chat else ""} {size.upper()}' if size else 'paper'
    lines = [
        f'| task | shots | measure | % | 95 % interval | {paper} | examples | seconds | tokens/s |',
        '|---|---:|---|---:|---:|---:|---:|---:|---:|',
    ]
    for row in table:
        bounds = '–'.join(f'{100 * bound:.1f}' for bound in row['interval']) if 'interval' in row else ''
        theirs = '' if row['paper'] is None else f'{row["paper"]:.1f}'
        speed = [f'{row[key]:,.{digits}f}' if key in row else '' for key, digits in (('seconds', 1), ('tokens_per_second', 0))]
        cells = [row['name'], row.get('shots', ''), row['measure'], f'{100 * row["ours"]:.1f}', bounds, theirs]
        lines.append('| ' + ' | '.join(map(str, [*cells, row.get('examples', ''), *speed])) + ' |')
    return '\n'.join(lines) + '\n'
