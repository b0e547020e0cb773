"""A round of rejection sampling and then PPO in the toy world, over several seeds: does the oracle agree each time?

python benchmarks/rlhf_seeds.py --init_from=sft/model --helpfulness=rm-help/model --safety=rm-safe/model --workdir=seeds

Every seed is `experiments/rlhf.py` with one version, about ten minutes; run again, it goes on where it stopped.
Prints each seed's figures by the oracle, per cent, and what each step changes, prompt by prompt, with 95 % intervals.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from llama2_jax.rl.rollout import by_oracle, read_rollouts
from llama2_jax.rl.versions import rate, table
from llama2_jax.toy.oracle import Oracle

_INIT_FROM = flags.DEFINE_string('init_from', None, 'The toy chat model to begin with.', required=True)
_HELPFULNESS = flags.DEFINE_string('helpfulness', None, 'The helpfulness reward model.', required=True)
_SAFETY = flags.DEFINE_string('safety', None, 'The safety reward model.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the runs.', required=True)
_SEEDS = flags.DEFINE_multi_integer('seeds', [0, 1, 2, 3, 4], 'Of the runs.')

STAGES = ('SFT', 'rejection sampling', 'PPO')
MEASURES = ('helpfulness', 'harmlessness', 'violations', 'false refusals')


def run(seed: int) -> Path:
    """Runs a seed, or goes on with it, and returns its workdir."""
    home = Path(_WORKDIR.value).absolute() / str(seed)
    models = {'init_from': _INIT_FROM, 'rewards.helpfulness': _HELPFULNESS, 'rewards.safety': _SAFETY}
    given = [f'--set={name}={Path(flag.value).absolute()}' for name, flag in models.items()]
    script = Path(__file__).parents[1] / 'experiments/rlhf.py'
    command = [sys.executable, str(script), *given, '--set=versions=1', f'--set=seed={seed}', f'--workdir={home}']
    subprocess.run(command, check=True)
    return home


def qualities(home: Path) -> dict[str, list[np.ndarray]]:
    """Of each measure, plain prompts for helpfulness and unsafe ones for harmlessness, every stage's answers by the oracle."""
    oracle, found = Oracle(), {'helpfulness': [], 'harmlessness': []}
    for number in range(len(STAGES)):
        rollouts = read_rollouts(home / 'evaluation' / f'{number}.jsonl')
        for measure, is_safety in (('helpfulness', False), ('harmlessness', True)):
            asked = [rollout for rollout in rollouts if rollout.prompt.is_safety == is_safety]
            found[measure].append(np.array([by_oracle(oracle, rollout).quality for rollout in asked]))
    return found


def main(_: list[str]) -> None:
    """Runs all, then prints the tables."""
    homes = {seed: run(seed) for seed in _SEEDS.value}
    rows = {}
    for seed, home in homes.items():
        versions = json.loads((home / 'versions.json').read_text(encoding='utf-8'))
        for stage, figures in zip(STAGES, versions.values(), strict=True):
            rows[f'seed {seed}, {stage}'] = {measure: figures[measure] for measure in MEASURES}
    print(table(rows))
    judged = {seed: qualities(home) for seed, home in homes.items()}
    for number, stage in enumerate(STAGES[1:], 1):
        for measure in ('helpfulness', 'harmlessness'):
            gains = [rate(found[measure][number] - found[measure][number - 1]) for found in judged.values()]
            raised = sum(mean > 0 for mean, _ in gains)
            each = ', '.join(f'{mean:+.1%} ± {error:.1%}' for mean, error in gains)
            print(f'{stage}: {measure} raised in {raised} of {len(gains)} seeds, prompt by prompt by {each}')


if __name__ == '__main__':
    app.run(main)
