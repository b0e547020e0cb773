"""Sums up what `make demo` has made: a table of all stages, and every version's answers to the same questions.

python experiments/demo.py --workdir=demo
"""

from absl import flags
from common import tool

from llama2_jax.stages.demo import summarise

WORKDIR = flags.DEFINE_string('workdir', 'demo', 'The directory of the demo.')

if __name__ == '__main__':
    tool(lambda: summarise(WORKDIR.value))
