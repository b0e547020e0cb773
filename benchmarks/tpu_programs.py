"""The tables of docs/hardware.md: programs compiled for TPU slices, their memory and predicted step time.

python benchmarks/tpu_programs.py                         # compiles every cell: one to four minutes each on two cores
python benchmarks/tpu_programs.py --cells='sft'           # compiles the cells whose name holds this
python benchmarks/tpu_programs.py --cells=none --markdown # writes the tables from results that are there

Results are kept by cell and libtpu, with their date, in tpu_programs.json beside this file. --markdown writes those of the newest
libtpu into the tables, and below each table how another one's differ. With --reader, a second reader of the same programs
(`hlo_stats.py`) must agree on the step time.
"""

import datetime
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from llama2_jax.config import MODELS, UserError, override
from llama2_jax.inference.plan import compile_step
from llama2_jax.mesh import decoding_mesh
from llama2_jax.planning import aot
from llama2_jax.rl import plan as ppo_plan
from llama2_jax.stages import dpo, reward, sft
from llama2_jax.stages import pretrain as pretraining
from llama2_jax.text.tables import markdown_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'experiments'))
import dpo as dpo_presets  # noqa: E402
import ppo as ppo_presets  # noqa: E402
import pretrain as pretrain_presets  # noqa: E402
import reward_model as reward_presets  # noqa: E402
import sft as sft_presets  # noqa: E402

_CELLS = flags.DEFINE_string('cells', '', 'Only the cell of this name, or cells whose name holds this.')
_MARKDOWN = flags.DEFINE_bool('markdown', False, 'Write the tables of docs/hardware.md.')
_READER = flags.DEFINE_string('reader', '', 'A second reader of programs, whose step times must be the same.')

RESULTS = Path(__file__).with_suffix('.json')
PAGE = ROOT / 'docs' / 'hardware.md'
Figures = dict[str, Any]
Results = Mapping[str, Mapping[str, Figures]]  # cell -> compiler -> figures


class Cell(NamedTuple):
    """A program on a slice.

    Attributes:
      table: The table that it belongs to, and the program.
      preset: The preset; for decoding the size.
      topology: The slice.
      settings: Changes to the preset, as `--set` takes them.
      peer: Seconds of MaxText 0.2.5 for the same cell, and a note. They were measured once, elsewhere, with its own tuned configs
        and jax 0.12.0.1 + libtpu 0.0.50.1 unless the note names another; nothing here compiles MaxText.
    """

    table: str
    preset: str
    topology: str
    settings: tuple[str, ...] = ()
    peer: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        """The key of its results."""
        return ' '.join((self.table, self.preset, self.topology, *self.settings))


def pretrain_cell(preset: str, topology: str, batch: int, length: int, remat: str, peer: tuple[float, str] | None = None) -> Cell:
    """A pretraining cell that differs from its preset in batch, length and what a layer keeps."""
    return Cell('pretrain', preset, topology, (f'batch_size={batch}', f'length={length}', f'compute.remat={remat}'), peer)


CELLS = (
    Cell('sft', 'llama2_7b', 'v5e:4x4'),
    Cell('pretrain', 'llama2_7b', 'v5e:16x16'),
    pretrain_cell('llama2_7b', 'v5e:16x16', 1024, 2048, 'q+k', (3.208, '')),
    pretrain_cell('llama2_70b', 'v5e:16x16', 512, 2048, 'offload', (16.47, '')),
    pretrain_cell('llama2_7b', 'v5p:4x4x4', 256, 4096, 'q+k+attention+gate+up', (2.748, '')),
    Cell('reward_model', 'llama2_7b_helpfulness', 'v5e:16x16'),
    Cell('ppo', 'llama2_7b', 'v5e:16x16'),
    Cell('sft', 'lora_7b', 'v5e:2x2'),
    Cell('sft', 'lora_7b_int8', 'v5e:1x1'),
    Cell('decode', '7b', 'v5e:1x1', ('int8', 'batch_size=1')),
    Cell('decode', '70b', 'v5p:2x2x4', ('batch_size=64',)),
    Cell('pretrain', 'llama2_70b', 'v5p:4x8x8', (), (25.52, '')),
    Cell('sft', 'llama2_13b', 'v5e:4x8'),
    Cell('sft', 'llama2_34b', 'v5p:4x4x4'),
    Cell('sft', 'llama2_70b', 'v5p:4x4x4'),
    Cell('reward_model', 'llama2_13b_helpfulness', 'v5e:16x16'),
    Cell('reward_model', 'llama2_34b_helpfulness', 'v5p:4x8x8'),
    Cell('reward_model', 'llama2_70b_helpfulness', 'v5p:8x8x8'),
    Cell('dpo', 'llama2_7b', 'v5e:8x8'),
    Cell('dpo', 'llama2_13b', 'v5e:8x8'),
    Cell('dpo', 'llama2_34b', 'v5p:4x4x4'),
    Cell('dpo', 'llama2_70b', 'v5p:4x4x4'),
    Cell('ppo', 'llama2_70b', 'v5p:8x8x8'),
    Cell('ppo', 'llama2_13b', 'v5e:16x16'),
    Cell('ppo', 'llama2_34b', 'v5p:4x8x8'),
    Cell('pretrain', 'llama2_13b', 'v5p:4x8x8', (), (5.48, 'libtpu 0.0.52')),
    Cell('pretrain', 'llama2_34b', 'v5p:4x8x8'),
    pretrain_cell('llama2_70b', 'v5p:4x4x4', 128, 4096, 'k+v+attention', (13.26, 'no SparseCore')),
    pretrain_cell('llama2_7b', 'v5e:16x16', 256, 4096, 'q+k+v+attention'),
    pretrain_cell('llama2_70b', 'v5e:16x16', 256, 4096, 'offload'),
    pretrain_cell('llama2_7b', 'v5p:4x4x4', 64, 4096, 'q+k+v+attention+gate+up'),
    pretrain_cell('llama2_13b', 'v5p:4x8x8', 256, 4096, 'q+k+v+attention+gate+up'),
    pretrain_cell('llama2_70b', 'v5p:8x8x8', 512, 4096, 'q+k+v+attention'),
)


def compile_cell(cell: Cell) -> Figures:
    """Compiles a cell; a program that does not fit gives {'refused': the reason}."""
    stages = {
        'pretrain': (pretrain_presets, pretraining),
        'sft': (sft_presets, sft),
        'reward_model': (reward_presets, reward),
        'dpo': (dpo_presets, dpo),
    }
    versions = {'compiler': aot.compiler_of(aot.topology_devices(cell.topology)[0]), 'date': f'{datetime.date.today()}'}
    start = time.monotonic()
    try:
        if cell.table == 'decode':
            figures = decoding(cell)
        elif cell.table == 'ppo':
            plan = ppo_plan.dry_run(override(ppo_presets.PRESETS[cell.preset](), cell.settings), cell.topology)
            figures = iteration(plan)
        else:
            presets, stage = stages[cell.table]
            config = override(presets.PRESETS[cell.preset](), cell.settings)
            report = stage.dry_run(config, cell.topology)
            figures = {'keeps': config.compute.remat, 'batch_size': config.batch_size, 'length': config.length, **of_step(report)}
    except UserError as error:
        figures = {'refused': str(error)}
    return figures | versions | {'compile_seconds': round(time.monotonic() - start)}


def of_step(report: aot.Report) -> Figures:
    """Memory, seconds and MFU of a step."""
    return {
        'chips': report.chips, 'memory': report.memory, 'host': report.host, 'seconds': report.program.seconds, 'mfu': report.mfu
    }  # fmt: skip


def decoding(cell: Cell) -> Figures:
    """A step of decoding with 4,096 places of cache for each sequence."""
    int8, batch_size = 'int8' in cell.settings, int(cell.settings[-1].removeprefix('batch_size='))
    model = MODELS[cell.preset]
    report, bound = compile_step(model, decoding_mesh(model, aot.topology_devices(cell.topology)), batch_size, 4096, int8)
    report.check()
    return of_step(report) | {'batch_size': batch_size, 'int8': int8, 'bound': bound}


def iteration(plan: ppo_plan.Plan) -> Figures:
    """Memory and seconds of an iteration of PPO."""
    phases = {phase.name: {'needs': phase.needs, 'seconds': phase.times * phase.report.program.seconds} for phase in plan.phases}
    seconds = sum(phase['seconds'] for phase in phases.values())
    return {'chips': plan.phases[0].report.chips, 'memory': plan.peak, 'held': plan.held, 'phases': phases, 'seconds': seconds}


# Tables: the columns of a row, given a cell and its figures.


def memory(figures: Figures) -> str:
    """GB a chip, and what is in host memory."""
    return f'{figures["memory"] / 1e9:.1f}' + (f' + {figures["host"] / 1e9:.1f} host' if figures.get('host') else '')


def trained_row(cell: Cell, figures: Figures) -> Mapping[str, str]:
    """Columns of a training step."""
    rows = figures['batch_size'] / figures['chips']
    return {
        'preset': f'`{cell.preset}`',
        'slice': cell.topology,
        'tokens × rows a chip': f'{figures["length"]:,} × {rows:g}',
        'keeps': f'`{figures["keeps"]}`',
        'GB a chip': memory(figures),
        'predicted s a step': f'{figures["seconds"]:.2f}',
        'MFU': f'{figures["mfu"]:.1%}',
    }


def pretrain_row(cell: Cell, figures: Figures) -> Mapping[str, str]:
    """Columns of a pretraining step."""
    if not cell.peer:
        return {**trained_row(cell, figures), 'MaxText, s': '', 'less time': ''}
    seconds, note = cell.peer
    less = f'{1 - figures["seconds"] / seconds:.1%}'
    return {**trained_row(cell, figures), 'MaxText, s': f'{seconds:.2f}' + (f' ({note})' if note else ''), 'less time': less}


def decode_row(cell: Cell, figures: Figures) -> Mapping[str, str]:
    """Columns of a step of decoding."""
    return {
        'model': cell.preset.upper(),
        'slice': cell.topology,
        'weights': 'int8' if figures['int8'] else 'bfloat16',
        'sequences': f'{figures["batch_size"]}',
        'GB a chip': memory(figures),
        'predicted ms a token': f'{figures["seconds"] * 1e3:.1f}',
        'bound, ms': f'{figures["bound"] * 1e3:.1f}',
        'times the bound': f'{figures["seconds"] / figures["bound"]:.2f}',
    }


def ppo_row(cell: Cell, figures: Figures) -> Mapping[str, str]:
    """Columns of an iteration."""
    phases = {name: f'{x["seconds"]:.1f} s, + {x["needs"] / 1e9:.1f} GB' for name, x in figures['phases'].items()}
    return {
        'preset': f'`{cell.preset}`',
        'slice': cell.topology,
        'GB a chip': memory(figures),
        'held all the time': f'{sum(figures["held"].values()) / 1e9:.1f} GB',
        **phases,
        'an iteration': f'{figures["seconds"]:.0f} s',
    }


TABLES: dict[str, Callable[[Cell, Figures], Mapping[str, str]]] = {
    'pretrain': pretrain_row,
    'sft': trained_row,
    'reward_model': trained_row,
    'dpo': trained_row,
    'decode': decode_row,
    'ppo': ppo_row,
}


def table(name: str, results: Results) -> str:
    """The rows of a table as Markdown, the compiler and dates of its figures, and how another compiler's differ."""
    newest, *others = sorted({compiler for figures in results.values() for compiler in figures}, key=version, reverse=True)
    cells = [(cell, results[cell.name][newest]) for cell in CELLS if cell.table == name and newest in results.get(cell.name, ())]
    rows = [TABLES[name](cell, figures) for cell, figures in cells if 'refused' not in figures]
    lines = [markdown_table(rows)]
    dates = sorted({figures['date'] for _, figures in cells})
    lines += ['', f'Compiled with {newest}, {" to ".join(sorted({dates[0], dates[-1]}))}.']
    lines += filter(None, (compared(cells, results, newest, other) for other in others))
    lines += [f'Does not fit: `{cell.preset}` on {cell.topology}: {one["refused"]}' for cell, one in cells if 'refused' in one]
    return '\n'.join(lines)


def version(compiler: str) -> tuple[int, ...]:
    """The numbers of 'libtpu 0.0.50.1'."""
    return tuple(int(number) for number in compiler.split()[-1].split('.'))


def compared(cells: Sequence[tuple[Cell, Figures]], results: Results, newest: str, other: str) -> str:
    """How the cells differ under another compiler; '' if none was compiled with it."""
    both = [(cell, ours, results[cell.name][other]) for cell, ours in cells if other in results[cell.name]]
    refused = [f'`{cell.preset}` on {cell.topology}' for cell, _, theirs in both if 'refused' in theirs]
    both = [(cell, ours, theirs) for cell, ours, theirs in both if not {'refused'} & (ours.keys() | theirs.keys())]
    if not both:
        return ''
    seconds = max(abs(theirs['seconds'] / ours['seconds'] - 1) for _, ours, theirs in both)
    gigabytes = max(abs(theirs['memory'] - ours['memory']) / 1e9 for _, ours, theirs in both)
    text = f'{other} differs by at most {seconds:.1%} in time and {gigabytes:.1f} GB ({len(both)} of {len(cells)} cells).'
    return text + (f' It refuses {", ".join(refused)}.' if refused else '')


def write_page(results: Results) -> None:
    """Puts the tables between their markers."""
    page = PAGE.read_text()
    for name in TABLES:
        if any(cell.table == name and cell.name in results for cell in CELLS):
            begin, end = f'<!-- {name}: written by benchmarks/tpu_programs.py -->\n', '<!-- end -->'
            before, _, rest = page.partition(begin)
            _, found, after = rest.partition(end)
            if not found:
                raise UserError(f'{PAGE} has no place for the table {name}: put "{begin}{end}" there.')
            page = f'{before}{begin}{table(name, results)}\n{end}{after}'
    PAGE.write_text(page)


def check_second_reader(path: str) -> None:
    """Has every program that is compiled read by another reader, too."""
    spec = importlib.util.spec_from_file_location('hlo_stats', path)
    module = sys.modules['hlo_stats'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read = aot.read_program

    def both(text: str, chip: Any) -> Any:
        ours, theirs = read(text, chip), module.analyze(text, chip.name)['pred_s']
        if abs(ours.seconds / theirs - 1) > 1e-3:
            raise UserError(f'The second reader predicts {theirs:.4f} s, this one {ours.seconds:.4f} s.')
        return ours

    aot.read_program = both


def main(argv: list[str]) -> None:
    """Compiles the cells, keeps their figures and writes the tables."""
    del argv
    if _READER.value:
        check_second_reader(_READER.value)
    exact = [cell for cell in CELLS if cell.name == _CELLS.value]
    for cell in exact or [cell for cell in CELLS if _CELLS.value in cell.name]:
        figures = compile_cell(cell)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results.setdefault(cell.name, {})[figures.pop('compiler')] = figures
        RESULTS.write_text(json.dumps(results, indent=1) + '\n')
        print(cell.name, figures, sep='\n  ', flush=True)
    if _MARKDOWN.value:
        write_page(json.loads(RESULTS.read_text()))


if __name__ == '__main__':
    app.run(main)
