"""What the workdirs of `make demo` add up to: a table of all stages, and the versions' answers to the same questions."""

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
from etils.epath import Path

from llama2_jax import toy
from llama2_jax.config import UserError
from llama2_jax.evals.measure import SCORES, interval, resampled, wilson
from llama2_jax.files import read_json, write_atomically
from llama2_jax.runtime import log
from llama2_jax.text.printable import printable
from llama2_jax.text.tables import markdown_table
from llama2_jax.train.metrics import read_metrics

VERSIONS = {'pretrain': 'base', 'sft': 'SFT', 'rs': 'rejection sampling', 'ppo': 'PPO'}
MEASURES = ('helpfulness', 'harmlessness', 'violations', 'false_refusals', 'correct', 'stops')  # of the task `toy`
KINDS = ('home', 'market_day', 'keep', 'explain', 'illicit', 'hateful', 'borderline')  # of the questions that are shown


def summarise(workdir: str | Path) -> None:
    """Prints the summary of a demo's directory, and writes its versions.json and summary.md, which the report shows.

    Raises:
      UserError: a stage has not been run.
    """
    home = Path(workdir)
    if missing := [name for name in VERSIONS if not (home / 'eval' / name / 'toy.json').exists()]:
        raise UserError(f'{home / "eval" / missing[0]}: the model {missing[0]} has not been evaluated; `make demo` does that.')
    rows = [{'version': title, **measures(home, name)} for name, title in VERSIONS.items()]
    table = as_table({'version': title, **intervals(home, name)} for name, title in VERSIONS.items())
    versions = f'llama2_jax {version("llama2_jax")}, JAX {jax.__version__}'
    made = f'One run, greedy answers; in brackets 95 % intervals over the prompts ({versions}).'
    text = '\n\n'.join([as_table(stages(home)), table, made, '\n\n'.join(transcripts(home))])
    write_atomically(home / 'versions.json', json.dumps(rows, indent=1) + '\n')
    write_atomically(home / 'summary.md', printable(text) + '\n')
    log(text)


def measures(home: Path, version: str) -> dict[str, float]:
    """What the oracle measured."""
    path = home / 'eval' / version / 'toy.json'
    found = read_json(path).get('measures', {})
    if missing := [name for name in MEASURES if not isinstance(found.get(name), float | int)]:
        raise UserError(f'{path} is damaged: it has no {missing[0]!r}. Remove it and evaluate the model again.')
    return {name: found[name] for name in MEASURES}


def intervals(home: Path, version: str) -> dict[str, str]:
    """What the oracle measured, for people: '62.8 % (60–66)' of a measure and its number of prompts."""
    found = {}
    for name, mean in measures(home, version).items():
        values = [record[name] for record in answers(home, version) if isinstance(record.get(name), float)]
        is_share = set(values) <= {0.0, 1.0} and name not in SCORES
        low, high = wilson(mean, len(values)) if is_share else interval(resampled(values, name))
        span = f'< {100 * high:.0f}' if is_share and mean == 0 else f'{100 * low:.0f}–{100 * high:.0f}'
        found[f'{name.replace("_", " ")}, n = {len(values)}'] = f'{mean:.1%} ({span})'
    return found


def answers(home: Path, version: str) -> list[dict[str, Any]]:
    """The graded answers of a version."""
    lines = (home / 'eval' / version / 'toy.jsonl').read_text(encoding='utf-8').splitlines()
    return [json.loads(line) for line in lines]


def stages(home: Path) -> Iterator[dict[str, str]]:
    """The headline of each stage, from its metrics.jsonl."""

    def last(stage: str, key: str) -> float:
        path = home / stage / 'metrics.jsonl'
        if not path.exists():
            raise UserError(f'{path} is missing: the stage {stage} has not been run; `make demo` does that.')
        found = [line[key] for line in read_metrics(path) if key in line]
        if not found:
            raise UserError(f'{path} has no {key!r}: the stage {stage} has not finished.')
        return found[-1]

    yield {'stage': 'pretraining', 'measure': 'held-out loss', 'value': f'{last("pretrain", "heldout/loss"):.3f} nats a token'}
    yield {'stage': 'SFT', 'measure': 'held-out questions answered exactly', 'value': f'{last("sft", "toy/learnable/exact"):.1%}'}
    for stage, title in (('rm-help', 'helpfulness'), ('rm-safe', 'safety'), ('rm-renewed', 'renewed helpfulness')):
        for rating in ('significantly', 'better', 'slightly', 'negligibly'):
            yield {
                'stage': f'{title} reward model',
                'measure': f'accuracy where raters said {rating}',
                'value': f'{last(stage, f"heldout/accuracy/{rating}"):.1%}',
            }
    yield {'stage': 'PPO', 'measure': 'KL from where it began', 'value': f'{last("ppo", "kl"):.2f} nats an answer'}


def transcripts(home: Path) -> Iterator[str]:
    """One held-out question of each kind, and what every version answers, in Markdown."""
    rows = list(toy.RECORDS['heldout']())
    texts = {title: [record['prediction'] for record in answers(home, name)] for name, title in VERSIONS.items()}
    for kind in KINDS:
        index = next(i for i, row in enumerate(rows) if row['category'] == kind and row['split'] in ('phrasings', 'safety'))
        lines = [f'- {title}: {" ".join(said[index].split()) or "(nothing)"}' for title, said in texts.items()]
        yield '\n'.join([f'**{rows[index]["messages"][-1]["content"]}**', '', *lines])


def as_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of the same columns as a table in Markdown; shares in per cent."""
    shown = ({name: f'{value:.1%}' if isinstance(value, float) else value for name, value in row.items()} for row in rows)
    return markdown_table(shown)
