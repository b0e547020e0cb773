"""A round of rejection sampling and then PPO in the toy world, over several seeds: does the oracle agree each time?

python benchmarks/rlhf_seeds.py --init_from=sft/model --helpfulness=rm-help/model --safety=rm-safe/model --workdir=seeds

Every seed is `experiments/rlhf.py` with one version, about ten minutes; run again, it goes on where it stopped.
Prints each seed's helpfulness and harmlessness by the oracle, per cent, and in how many seeds a step raised them.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags

_INIT_FROM = flags.DEFINE_string('init_from', None, 'The toy chat model to begin with.', required=True)
_HELPFULNESS = flags.DEFINE_string('helpfulness', None, 'The helpfulness reward model.', required=True)
_SAFETY = flags.DEFINE_string('safety', None, 'The safety reward model.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the runs.', required=True)
_SEEDS = flags.DEFINE_multi_integer('seeds', [0, 1, 2, 3, 4], 'Of the runs.')

STAGES = {'SFT': 'SFT', 'rejection sampling': 'RLHF-v1 (no PPO)', 'PPO': 'RLHF-v1 (with PPO)'}
MEASURES = ('helpfulness', 'harmlessness', 'violations', 'false refusals')


def versions(seed: int) -> dict[str, dict[str, list[float]]]:
    """Of one seed: stage -> measure -> mean and half its 95 % interval."""
    home = Path(_WORKDIR.value).absolute() / str(seed)
    models = {'init_from': _INIT_FROM, 'rewards.helpfulness': _HELPFULNESS, 'rewards.safety': _SAFETY}
    given = [f'--set={name}={Path(flag.value).absolute()}' for name, flag in models.items()]
    script = Path(__file__).parents[1] / 'experiments/rlhf.py'
    command = [sys.executable, str(script), *given, '--set=versions=1', f'--set=seed={seed}', f'--workdir={home}']
    subprocess.run(command, check=True)
    return json.loads((home / 'versions.json').read_text(encoding='utf-8'))


def main(_: list[str]) -> None:
    """Runs all, then prints the table."""
    runs = {seed: versions(seed) for seed in _SEEDS.value}
    print(f'\n| seed | stage | {" | ".join(MEASURES)} |\n|{"---|" * (len(MEASURES) + 2)}')
    for seed, found in runs.items():
        for stage, name in STAGES.items():
            row = [f'{100 * mean:.1f} ± {100 * error:.1f}' for mean, error in (found[name][measure] for measure in MEASURES)]
            print(f'| {seed} | {stage} | {" | ".join(row)} |')
    for before, after in (('SFT', 'rejection sampling'), ('rejection sampling', 'PPO')):
        for measure in MEASURES[:2]:
            gains = [100 * (found[STAGES[after]][measure][0] - found[STAGES[before]][measure][0]) for found in runs.values()]
            raised = sum(gain > 0 for gain in gains)
            print(f'{after}: {measure} {sum(gains) / len(gains):+.1f} on average, raised in {raised} of {len(gains)} seeds')


if __name__ == '__main__':
    app.run(main)
