"""Shows a run, or a tree of runs, as one HTML file: curves, tables, samples, settings.

python experiments/report.py --workdir=run
"""

from absl import flags
from common import tool

from llama2_jax.report.page import write_report
from llama2_jax.text.printable import printable

WORKDIR = flags.DEFINE_string('workdir', None, 'A workdir, or a directory with workdirs in it.', required=True)
OUTPUT = flags.DEFINE_string('output', '', 'The file to write; by default WORKDIR/report.html.')


def run() -> None:
    """Writes the file."""
    print(printable(f'The report is in {write_report(WORKDIR.value, OUTPUT.value)}.'))


if __name__ == '__main__':
    tool(run)
