"""Four processes that lose one of them, again and again, end as if nothing had happened, bit for bit, and within 1e-5 as one.

python benchmarks/random_kills.py --kills=10           # about ten minutes on two cores

Each time the processes start or continue a small pretraining run, and one of them is killed at a random moment; the others must
end by themselves. Parameters, moments and loss trace must then be those of processes that were left alone.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

import program  # noqa: E402

_KILLS = flags.DEFINE_integer('kills', 10, 'How many.', lower_bound=0)
_STEPS = flags.DEFINE_integer('steps', 40, 'Of the run.', lower_bound=20)
_PROCESSES = flags.DEFINE_integer('processes', 4, 'With a device each.', lower_bound=2)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments and victims.')


def main(argv: list[str]) -> None:
    """Prints each kill, and at last whether the ends are the same."""
    del argv
    dice, home = random.Random(_SEED.value), Path(tempfile.mkdtemp())
    options = {'text': program.write_text(home / 'text.txt'), 'cache': str(home / 'cache'), 'steps': _STEPS.value}
    count = _PROCESSES.value
    program.finish(program.launch(home / 'one', 1, **options))
    program.finish(*program.launch_several(home / 'straight', count, 1, **options), seconds=1800)
    print(f'{_STEPS.value} steps undisturbed, on one device and in {count} processes', flush=True)
    for moment in sorted(dice.uniform(1, _STEPS.value - 6) for _ in range(_KILLS.value)):
        victim, start = dice.randrange(count), time.monotonic()
        # One that is killed before it has joined is waited for so long.
        processes = program.launch_several(home / 'run', count, 1, environment={'LLAMA2_JAX_TIMEOUT': '60'}, **options)
        program.kill_one(processes, victim, home / 'run', int(moment), dice.uniform(0, 0.2))
        done = len(program.trace(home / 'run'))
        print(f'process {victim} killed after step {done}; {time.monotonic() - start:.0f} s', flush=True)
    program.finish(*program.launch_several(home / 'run', count, 1, **options), seconds=1800)
    pairs = zip(program.final(home / 'run'), program.final(home / 'straight'), strict=True)
    same = program.trace(home / 'run') == program.trace(home / 'straight') and all(np.array_equal(a, b) for a, b in pairs)
    ends = zip(program.final(home / 'run'), program.final(home / 'one'), strict=True)
    losses = zip(program.trace(home / 'run'), program.trace(home / 'one'), strict=True)
    apart = max(float(np.abs(a - b).max()) for a, b in ends), max(abs(a['loss'] - b['loss']) for a, b in losses)
    print(f'{"bit for bit the same" if same else "NOT the same"}; from one process {apart[0]:.1e}, in the loss {apart[1]:.1e}')
    sys.exit(not same)


if __name__ == '__main__':
    app.run(main)
