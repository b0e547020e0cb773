"""Where the time of a PPO iteration goes, and what generation loses against the engine alone.

python experiments/ppo.py --workdir=ppo
python benchmarks/ppo_phases.py --run=ppo

A Markdown table of the medians over the run's iterations but the first, from its metrics.jsonl. Then the engine draws answers to
the prompts of some of its iterations by itself, and both speeds are compared.
"""

import json
import statistics
import time
from pathlib import Path

from absl import app, flags

from llama2_jax.inference.open import open_engine
from llama2_jax.rl.rollout import read_rollouts, sample_answers
from llama2_jax.train.metrics import read_metrics

_RUN = flags.DEFINE_string('run', None, 'Workdir of the run.', required=True)
_BATCHES = flags.DEFINE_integer('batches', 4, 'Batches that the engine draws by itself, after one to warm up.')

PHASES = ('reshard', 'generate', 'score', 'prepare', 'update')


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    path = Path(_RUN.value)
    config = json.loads((path / 'config.json').read_text())
    lines = [line for line in read_metrics(path / 'metrics.jsonl') if 'seconds/generate' in line][1:]
    print("| phase | seconds | share | answers' tokens/s |\n|---|---|---|---|")
    seconds = {phase: statistics.median(line[f'seconds/{phase}'] for line in lines) for phase in PHASES}
    for phase, time_ in seconds.items():
        speed = statistics.median(line[f'tokens_per_second/{phase}'] for line in lines)
        print(f'| {phase} | {time_:.2f} | {time_ / sum(seconds.values()):.0%} | {speed:,.0f} |')
    engine = open_engine(path / 'model', config['decode_batch'])
    settings = {name: config[name] for name in ('max_new_tokens', 'temperature')}
    speeds = []
    for file in sorted((path / 'rollouts').glob('*.jsonl'))[: _BATCHES.value + 1]:
        prompts = [rollout.prompt for rollout in read_rollouts(file)]
        began = time.perf_counter()
        tokens = sum(len(sample.token_ids) for _, [sample] in sample_answers(engine, prompts, seed=file.stem, **settings))
        speeds.append(tokens / (time.perf_counter() - began))
    alone = statistics.median(speeds[1:])
    within = statistics.median(
        line['length'] * config['batch_size'] / (line['seconds/reshard'] + line['seconds/generate']) for line in lines
    )
    print(f'\nThe engine alone: {alone:,.0f} tokens/s; within the run, resharding included: {within:,.0f}, {within / alone:.0%}.')


if __name__ == '__main__':
    app.run(main)
