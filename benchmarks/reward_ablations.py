"""Reward models in the toy world as the paper's Tables 7, 8, 28 and 29 compare them: margins, the auxiliary loss, both test sets.

python benchmarks/reward_ablations.py --init_from=sft/model --workdir=ablations

Five runs of a minute or two on two cores, each a toy preset of experiments/reward_model.py with a setting changed; run again, it
goes on where it stopped. Prints Markdown tables; plots and all figures of a model are in WORKDIR/RUN/judged.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags

from llama2_jax.evals import preference

_INIT_FROM = flags.DEFINE_string('init_from', None, 'The toy chat model.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the runs.', required=True)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the runs.')
_RUNS = flags.DEFINE_list('runs', [], 'Only these of them.')

EXPERIMENTS = Path(__file__).parents[1] / 'experiments'
HELPFUL, SAFETY = 'toy:preferences_heldout', 'toy:safety_preferences_heldout'
RUNS = {
    'margin none': ['--config=tiny_v1', '--set', 'margin=none'],
    'margin small': ['--config=tiny_v1'],
    'margin large': ['--config=tiny_v1', '--set', 'margin=large'],
    'safety': ['--config=tiny_safety'],
    'safety without auxiliary loss': ['--config=tiny_safety', '--set', 'safety_weight=0'],
}
BY_RATING = ('significantly', 'better', 'slightly', 'negligibly')


def command(script: str, *arguments: str) -> None:
    """Runs one of the command lines."""
    subprocess.run([sys.executable, str(EXPERIMENTS / script), *arguments], check=True)


def judged(name: str) -> dict[str, dict]:
    """Trains the model of a run and judges it on both test sets: source -> figures."""
    home = Path(_WORKDIR.value).absolute() / f'{name.replace(" ", "-")}-{_SEED.value}'
    start = ['--set', f'init_from={Path(_INIT_FROM.value).absolute()}', '--set', f'seed={_SEED.value}']
    command('reward_model.py', *RUNS[name], *start, f'--workdir={home}')
    model = home / 'model'
    command('evaluate.py', f'--reward_model={model}', f'--preferences={HELPFUL},{SAFETY}', f'--output={home / "judged"}')
    return json.loads((home / 'judged/preferences.json').read_text(encoding='utf-8'))[str(model)]


def cell(share: dict | None) -> str:
    """'81.2 (78–84)'."""
    return f'{100 * share["value"]:.1f} ({100 * share["low"]:.0f}–{100 * share["high"]:.0f})' if share else '–'


def main(_: list[str]) -> None:
    """Runs all, then prints a table for each test set, percent with 95 % intervals."""
    results = {name: judged(name) for name in _RUNS.value or RUNS}
    for source, safety in ((HELPFUL, ()), (SAFETY, preference.SAFETY)):
        heads = ('model', 'all', *BY_RATING, *safety)
        print(f'\n{source}\n\n| {" | ".join(heads)} |\n|{"---|" * len(heads)}')
        for name, found in results.items():
            figures = found[source]
            row = [figures['accuracy'], *(figures['by rating'].get(rating) for rating in BY_RATING), *map(figures.get, safety)]
            print(f'| {name} | {" | ".join(map(cell, row))} |')


if __name__ == '__main__':
    app.run(main)
