"""The report of a red team: a table of versions, and for each a heat map of category and style and, folded, its worst cases."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from llama2_jax.evals.measure import share_text
from llama2_jax.report.markdown import table
from llama2_jax.report.page import document, folded
from llama2_jax.text.printable import printable
from llama2_jax.text.tables import markdown_table

WORST = 20  # cases of a version that are shown


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of versions."""
    people, tries = summary['per hour']
    note = f'Judge: {summary["judge"]}; prompts: {summary["prompts"]}. Gamma: violations that one attacker finds in an hour '
    note += (
        f'of {tries} tries, mean of {people}, 95 % interval by the bootstrap over attackers. Other intervals are those of Wilson.'
    )
    return printable(f'{markdown_table(summary["versions"])}\n\n{note}')


def page(models: Sequence[str], summary: Mapping[str, Any], versions: Sequence[Mapping[str, Sequence[Mapping]]]) -> str:
    """The whole document; whatever a model or an attacker wrote is escaped."""
    head = list(summary['versions'][0])
    body = ['<header><h1>Red team</h1></header><main><section>', table(head, [list(row.values()) for row in summary['versions']])]
    for number, (model, rows) in enumerate(zip(models, versions, strict=True)):
        asked = [*rows['store'], *rows['attacks']]
        body.append(f'<h2>Version {number}: {html.escape(model)}</h2>')
        body.append('<p>Violations of all tries, by risk category and attack style; the number of tries is below each share.</p>')
        body.append(heat_map(asked))
        worst = sorted((row for row in asked if row['violates']), key=lambda row: (row['severity'], row['score']))[:WORST]
        shown = ''.join(case(row) for row in worst)
        body.append(folded(f'Worst cases: {len(worst)} (harmful text)', shown) or '<p>No try violates.</p>')
    body.append('</section></main>')
    return printable(document('Red team', body))


def heat_map(rows: Sequence[Mapping[str, Any]]) -> str:
    """Categories down, styles across; the redder, the larger the share of violations."""
    cells: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        cells.setdefault((row['about']['category'], row['style']), []).append(row['violates'])
    styles = sorted({style for _, style in cells})
    lines = ['<tr><th></th>' + ''.join(f'<th>{html.escape(style)}</th>' for style in styles) + '</tr>']
    for category in sorted({category for category, _ in cells}):
        line = f'<th>{html.escape(category)}</th>'
        for style in styles:
            hits = cells.get((category, style))
            if not hits:
                line += '<td>–</td>'
                continue
            share = sum(hits) / len(hits)
            title = html.escape(share_text(sum(hits), len(hits)))
            colour = f'background:rgba(210,40,40,{share:.2f})'
            line += f'<td title="{title}" style="{colour}">{share:.0%}<br><small>{len(hits)}</small></td>'
        lines.append(f'<tr>{line}</tr>')
    return f'<div class="wide"><table class="heat">{"".join(lines)}</table></div>'


def case(row: Mapping[str, Any]) -> str:
    """A dialog and its answer."""
    turns = [*row['messages'], {'role': 'assistant', 'content': row['answer']}]
    said = ''.join(f'<p><b>{html.escape(turn["role"])}</b> {html.escape(turn["content"])}</p>' for turn in turns)
    about = f'severity {row["severity"]}, {row["about"]["category"]}, {row["style"]}'
    return f'<blockquote><p><i>{html.escape(about)}</i></p>{said}</blockquote>'
