"""The command line that every training stage shares: --config, --workdir, --set, --dry_run, --topology."""

from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags, logging

from llama2_jax import runtime
from llama2_jax.config import UserError, nearest, override

CONFIG = flags.DEFINE_string('config', 'tiny', 'Preset; their docstrings give command, hardware and expected result.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; the same command run again continues in it.')
SET = flags.DEFINE_multi_string('set', [], 'path.to.field=value, changes the preset; may be repeated.')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Compile only: print memory, FLOPs, collectives and predicted step time.')
TOPOLOGY = flags.DEFINE_string('topology', None, 'With --dry_run: a TPU that need not be there, such as v5p:8x8x8.')

Presets = Mapping[str, Callable[[], Any]]


def stage(presets: Presets, run: Callable[[Any, str], Any], dry_run: Callable[[Any, str | None], Any] | None = None) -> None:
    """Runs a stage from the command line.

    Args:
      presets: name -> function returning the config.
      run: (config, workdir) does the work.
      dry_run: (config, topology) compiles without running and returns the report to print.
    """

    def main(argv: list[str]) -> None:
        with runtime.user_errors():
            if len(argv) > 1:
                raise UserError(f'Unknown argument {argv[1]!r}; settings are given as --set path.to.field=value.')
            if CONFIG.value not in presets:
                raise UserError(f'--config={CONFIG.value}: no such preset; {nearest(CONFIG.value, presets)}')
            config = override(presets[CONFIG.value](), SET.value)
            if DRY_RUN.value or TOPOLOGY.value:
                if not dry_run:
                    raise UserError('This stage has nothing to compile, so there is no --dry_run.')
                print(dry_run(config, TOPOLOGY.value))
                return
            if not WORKDIR.value:
                raise UserError('--workdir=DIR is missing: where the run is to live.')
            runtime.start()
            run(config, WORKDIR.value)

    quietly(main)


def tool(run: Callable[[], None]) -> None:
    """Runs a tool, which has flags of its own and no presets."""

    def main(argv: list[str]) -> None:
        with runtime.user_errors():
            if len(argv) > 1:
                raise UserError(f'Unknown argument {argv[1]!r}; every setting is a --flag.')
            runtime.start()
            run()

    quietly(main)


def quietly(main: Callable[[list[str]], None]) -> None:
    """Runs an absl program; libraries speak from warnings on, unless --verbosity says otherwise."""

    def quiet(argv: list[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)
        main(argv)

    app.run(quiet)
