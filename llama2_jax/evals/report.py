"""The table at the end: every task and group beside the paper's figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama2_jax.evals.measure import bounds, interval, resampled, wilson
from llama2_jax.evals.paper import reported
from llama2_jax.evals.tasks import PAPER, TASKS

Result = Mapping[str, Any]  # as `stages.evaluate` writes it to TASK.json


def rows(results: Mapping[str, Result], size: str | None, chat: bool) -> list[dict[str, Any]]:
    """One for each task, with its groups below it, then one for each group of the paper whose tasks are all there."""
    table, drawn = [], {}
    for name, result in results.items():
        shots, shares, measure = result['shots'], result['shares'], TASKS[name].headline(result['measures'])
        drawn[name] = resampled(result['values'], name)
        head = _row(name, measure, result['measures'], result['counts'], shares, reported(name, size, chat, shots))
        head |= {'shots': shots, 'seconds': result['seconds'], 'tokens_per_second': result['tokens_per_second']}
        table.append({'interval': interval(drawn[name])} | head)
        for other in result['measures']:
            if other != measure:
                paper = reported(f'{name}/{other}', size, chat, shots)
                table.append(_row(name, other, result['measures'], result['counts'], shares, paper))
        for group, values in result['groups'].items():
            if measure in values:
                paper, counted = reported(f'{name}/{group}', size, chat, shots), result['group_counts'][group]
                table.append(_row(f'{name}/{group}', measure, values, counted, shares, paper))
    for group, members in PAPER.items():
        if len(members) > 1 and set(members) <= results.keys():
            samples = np.mean([drawn[name] for name in members], axis=0)
            ours = float(np.mean([np.mean(results[name]['values']) for name in members]))
            usual = all(results[name]['shots'] == TASKS[name].shots for name in members)
            row = {'name': f'mean of {group}', 'measure': 'mean', 'ours': ours, 'interval': interval(samples)}
            row |= {'examples': sum(results[name]['examples'] for name in members)}
            table.append(row | {'paper': reported(f'group:{group}', size, chat) if usual else None})
    return table


def _row(
    name: str, measure: str, values: Mapping[str, float], counts: Mapping[str, int], shares: Sequence[str], paper: float | None
) -> dict[str, Any]:
    """One measure of a task or group, with Wilson's interval if it is a share."""
    row = {'name': name, 'measure': measure, 'ours': values[measure], 'paper': paper, 'examples': counts[measure]}
    return row | ({'interval': wilson(values[measure], counts[measure]), 'share': True} if measure in shares else {})


def markdown(table: Sequence[Mapping[str, Any]], size: str | None, chat: bool) -> str:
    """The table; shares in per cent."""
    paper = f'Llama 2{"-Chat" if chat else ""} {size.upper()}' if size else 'paper'
    lines = [
        f'| task | shots | measure | % | 95 % interval | {paper} | examples | seconds | tokens/s |',
        '|---|---:|---|---:|---:|---:|---:|---:|---:|',
    ]
    for row in table:
        zero = row['ours'] if row.get('share') else None  # no hits: an upper bound
        span = bounds(*row['interval'], zero) if 'interval' in row else ''
        theirs = '' if row['paper'] is None else f'{row["paper"]:.1f}'
        speed = [f'{row[key]:,.{digits}f}' if key in row else '' for key, digits in (('seconds', 1), ('tokens_per_second', 0))]
        cells = [row['name'], row.get('shots', ''), row['measure'], f'{100 * row["ours"]:.1f}', span, theirs]
        lines.append('| ' + ' | '.join(map(str, [*cells, row.get('examples', ''), *speed])) + ' |')
    return '\n'.join(lines) + '\n'
