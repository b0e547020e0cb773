"""Pretraining steps compiled for TPU slices that need not be there: memory, predicted step time and MFU, beside MaxText's.

python benchmarks/tpu_programs.py                      # every cell: about two minutes each on two cores
python benchmarks/tpu_programs.py --cells='70b v5p'    # those whose name holds this

A Markdown table. MaxText's figures are of its own tuned configs under the same compiler and reader. With --reader, a second
reader of the same programs (`hlo_stats.py`) is asked for the step time too.
"""

import importlib.util
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import MODELS
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.mesh import BATCH_AXES, make_mesh
from llama2_jax.model.llama import Compute
from llama2_jax.stages import pretrain
from llama2_jax.train import aot

_CELLS = flags.DEFINE_string('cells', '', 'Only cells whose name holds this.')
_READER = flags.DEFINE_string('reader', '../shared/tools/hlo_stats.py', 'A second reader of programs; skipped where absent.')


class Cell(NamedTuple):
    """A model on a slice, tokens a sequence, sequences a chip, and what layers keep; MaxText's GB a chip and seconds a step."""

    model: str
    topology: str
    length: int
    sequences: int
    remat: str
    peer_memory: str = ''
    peer_seconds: float = 0


CELLS = (
    Cell('7b', 'v5e:16x16', 2048, 4, 'q+k', '10.9', 3.23),
    Cell('7b', 'v5p:4x4x4', 4096, 4, 'q+k+attention+gate+up', '49.4', 2.88),
    Cell('13b', 'v5p:4x8x8', 4096, 4, 'q+k+attention+gate+up', '74.3', 5.48),
    Cell('70b', 'v5p:4x4x4', 4096, 2, 'k+v+attention', '57.8', 13.4),
    Cell('70b', 'v5p:4x8x8', 4096, 4, 'k+v+attention', '82.3', 25.7),
    Cell('70b', 'v5e:16x16', 2048, 2, 'offload', '14.4 + 6.7 host', 16.6),
    Cell('7b', 'v5e:16x16', 4096, 1, 'q+k+v+attention'),
    Cell('7b', 'v5p:4x4x4', 4096, 1, 'q+k+v+attention+gate+up'),
    Cell('13b', 'v5p:4x8x8', 4096, 1, 'q+k+v+attention+gate+up'),
    Cell('70b', 'v5p:8x8x8', 4096, 1, 'q+k+v+attention'),
    Cell('70b', 'v5e:16x16', 4096, 1, 'offload'),
)


def compile_cell(cell: Cell) -> tuple[aot.Report, str, float]:
    """The report on a cell's step, its text, and how many seconds it took to compile."""
    devices = aot.topology_devices(cell.topology)
    config = pretrain.PretrainConfig(
        model=MODELS[cell.model],
        data=DataConfig(mixture='toy:documents'),
        compute=Compute(remat=cell.remat),
        batch_size=cell.sequences * len(devices),
        length=cell.length,
    )
    mesh, tokens = make_mesh(config.mesh, devices), config.batch_size * config.length
    array = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32, sharding=NamedSharding(mesh, P(BATCH_AXES)))
    start = time.monotonic()
    with jax.set_mesh(mesh):
        state, _, step = pretrain.build(config, config.compute.on('tpu'))
        compiled = aot.compile_step(step, state, {'tokens': array, 'segment_ids': array}, mesh)
    flops = config.model.flops_per_token(config.length) * tokens
    return aot.analyse(compiled, mesh, tokens, flops), compiled.text, time.monotonic() - start


def second_reader(path: str):
    """The `analyze` of a reader's file; None where there is no such file."""
    try:
        spec = importlib.util.spec_from_file_location('hlo_stats', path)
        module = sys.modules['hlo_stats'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except FileNotFoundError:
        return None
    return module.analyze


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    analyze = second_reader(_READER.value)
    print(
        '| cell | tokens × sequences a chip | keeps | GB a chip | s a step (second reader) | MFU | MaxText GB, s | s to compile |'
    )
    print('|---|---|---|---|---|---|---|---|')
    for cell in CELLS:
        if _CELLS.value not in f'{cell.model} {cell.topology} {cell.length}':
            continue
        report, text, seconds = compile_cell(cell)
        report.check()
        memory = f'{(report.arguments + report.temporaries) / 1e9:.1f}' + (
            f' + {report.host / 1e9:.1f} host' if report.host else ''
        )
        second = f' ({analyze(text, report.chip.name)["pred_s"]:.2f})' if analyze else ''
        peer = f'{cell.peer_memory}, {cell.peer_seconds}' if cell.peer_seconds else ''
        print(
            f'| {cell.model} {cell.topology} | {cell.length} × {cell.sequences} | {cell.remat} | {memory} | '
            f'{report.program.seconds:.2f}{second} | {report.mfu:.1%} | {peer} | {seconds:.0f} |',
            flush=True,
        )


if __name__ == '__main__':
    app.run(main)
