"""The command line that every training stage shares: --config, --workdir, --set, --dry_run, --topology."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags, logging

import llama2_jax.memory  # noqa: F401 - before anything large is imported
from llama2_jax import runtime
from llama2_jax.config import UserError, nearest, override
from llama2_jax.files import check_writable
from llama2_jax.inputs import check_inputs
from llama2_jax.planning.aot import TOPOLOGIES
from llama2_jax.runtime.workdir import ResumeConfig, resuming
from llama2_jax.text.printable import printable

Presets = Mapping[str, Callable[[], Any]]


def stage(presets: Presets, run: Callable[[Any, str], Any], dry_run: Callable[[Any, str | None], Any] | None = None) -> None:
    """Runs a stage from the command line.

    Args:
      presets: name -> function returning the config.
      run: (config, workdir) does the work.
      dry_run: (config, topology) compiles without running and returns the report to print.
    """
    chosen = flags.DEFINE_string('config', 'tiny', 'Preset; their docstrings give command, hardware and expected result.')
    workdir = flags.DEFINE_string('workdir', None, 'Directory of the run; the same command resumes in it.')
    settings = flags.DEFINE_multi_string('set', [], 'path.to.field=value, changes the preset; may be repeated.')
    compile_only = flags.DEFINE_bool('dry_run', False, 'Compile only: print memory, FLOPs, collectives and predicted step time.')
    topology = flags.DEFINE_string('topology', None, 'With --dry_run: a TPU slice to compile for, such as v5p:8x8x8.')

    def main(argv: list[str]) -> None:
        with runtime.user_errors():
            if len(argv) > 1:
                raise UserError(f'Unknown argument {argv[1]!r}; settings are given as --set path.to.field=value.')
            if chosen.value not in presets:
                raise UserError(f'--config={chosen.value}: no such preset; {nearest(chosen.value, presets)}')
            names = {field.name for field in dataclasses.fields(ResumeConfig)}
            own = [setting for setting in settings.value if setting.partition('=')[0].strip() in names]
            resume = override(ResumeConfig(), own)
            config = override(presets[chosen.value](), [setting for setting in settings.value if setting not in own])
            if compiles_only(compile_only.value, topology.value):
                if not dry_run:
                    raise UserError('This stage has nothing to compile, so there is no --dry_run.')
                print(printable(str(dry_run(config, topology.value))))
                return
            if not workdir.value:
                raise UserError('--workdir=DIR is missing: name the directory of the run.')
            check_writable('--workdir', workdir.value, directory=True)
            runtime.start()
            check_inputs(config)
            with resuming(resume):
                run(config, workdir.value)

    quietly(main)


def compiles_only(dry_run: bool, topology: str | None) -> bool:
    """Whether the program only compiles; then JAX starts no TPU runtime.

    Raises:
      UserError: `--topology` is given without `--dry_run`, or without a value.
    """
    if topology is not None and not dry_run:
        raise UserError(f'--topology={topology} has no effect without --dry_run: give both to compile only, or neither to run.')
    if topology == '':
        raise UserError(f'--topology is empty: give {TOPOLOGIES}, or leave it out to compile for the devices here.')
    if dry_run:
        runtime.keep_libtpu_unloaded()
    return dry_run


def tool(run: Callable[[], None]) -> None:
    """Runs a tool, which has flags of its own and no presets."""

    def main(argv: list[str]) -> None:
        with runtime.user_errors():
            if len(argv) > 1:
                raise UserError(f'Unknown argument {argv[1]!r}; every setting is a --flag.')
            for flag in flags.FLAGS.get_key_flags_for_module(argv[0]):  # absl's bounds let NaN pass
                if isinstance(flag.value, float) and not math.isfinite(flag.value):
                    raise UserError(f'--{flag.name}={flag.value} is not a finite number.')
            runtime.start()
            run()

    quietly(main)


def quietly(main: Callable[[list[str]], None]) -> None:
    """Runs an absl program; third-party logging starts at WARNING unless --verbosity sets another level."""

    def quiet(argv: list[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)
        main(argv)

    app.run(quiet)
