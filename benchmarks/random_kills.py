"""A run of several processes that loses one of them, again and again, ends as if nothing had happened, bit for bit.

python benchmarks/random_kills.py --kills=10           # about ten minutes on two cores

Each time one, two or four processes with four devices together start or continue a small pretraining run, and one of them is
killed at a random moment; the others must end by themselves, and the last ones finish it. Parameters, moments and loss trace
must then be those of one process that was left alone.
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
_STEPS = flags.DEFINE_integer('steps', 80, 'Of the run.', lower_bound=20)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments and victims.')


def main(argv: list[str]) -> None:
    """Prints each kill, and at last whether the ends are the same."""
    del argv
    dice, home = random.Random(_SEED.value), Path(tempfile.mkdtemp())
    options = {'text': program.write_text(home / 'text.txt'), 'cache': str(home / 'cache'), 'steps': _STEPS.value}
    program.finish(program.launch(home / 'straight', 4, **options))
    print(f'{_STEPS.value} steps undisturbed', flush=True)
    moments = sorted(dice.uniform(1, _STEPS.value - 6) for _ in range(_KILLS.value))
    for moment in moments:
        count = dice.choice([1, 2, 4])
        victim, start = dice.randrange(count), time.monotonic()
        processes = program.launch_several(home / 'run', count, 4 // count, **options)
        program.kill_one(processes, victim, home / 'run', int(moment), dice.uniform(0, 0.2))
        done = len(program.trace(home / 'run'))
        print(f'process {victim} of {count} killed after step {done}; {time.monotonic() - start:.0f} s', flush=True)
    program.finish(*program.launch_several(home / 'run', 2, 2, **options))
    pairs = zip(program.final(home / 'run'), program.final(home / 'straight'), strict=True)
    same = program.trace(home / 'run') == program.trace(home / 'straight') and all(np.array_equal(a, b) for a, b in pairs)
    print('bit for bit the same' if same else 'NOT the same')
    sys.exit(not same)


if __name__ == '__main__':
    app.run(main)
