"""Compiling a step without running it: does it fit, and how fast might it be? For TPUs this needs `libtpu`, but no TPU."""

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import UserError
from llama2_jax.runtime import Chip, chip_of, compiler_options
from llama2_jax.train.schedule import Program, read_program

TOPOLOGIES = 'a chip and its torus, such as v5e:16x16, v6e:8x8, v4:4x4x4 or v5p:4x8x8 (what is sold as v5p-512, counting cores)'
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step takes; bytes, FLOPs and seconds are those of one chip.

    Attributes:
      chips: in the mesh.
      kind: of device, as JAX names it.
      chip: its published figures; None where unknown.
      arguments: bytes of state and batch.
      temporaries: bytes of everything else on the device.
      host: bytes offloaded to the host.
      model_flops: without recomputation.
      tokens: of the whole step.
      program: FLOPs with recomputation, collectives, predicted seconds.
    """

    chips: int
    kind: str
    chip: Chip | None
    arguments: int
    temporaries: int
    host: int
    model_flops: float
    tokens: int
    program: Program

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s predicted, as a share of the chip's peak."""
        seconds = self.program.seconds
        return self.model_flops / seconds / self.chip.peak_flops if seconds and self.chip else None

    def check(self) -> None:
        """Raises a UserError if the chip has too little memory."""
        needed = self.arguments + self.temporaries
        if self.chip and needed > self.chip.memory:
            raise UserError(
                f'The step needs {needed / GB:.1f} GB on every {self.chip.name} chip, which has {self.chip.memory / GB:.1f} GB: '
                'use more chips, a smaller batch, accumulation, or keep less in compute.remat.'
            )

    def __str__(self) -> str:
        needed, program = self.arguments + self.temporaries, self.program
        limit = f' of {self.chip.memory / GB:.1f}' if self.chip else ''
        rows = [
            ('chips', f'{self.chips} × {self.kind}'),
            ('memory a chip', f'{needed / GB:.2f}{limit} GB'),
            ('  arguments', f'{self.arguments / GB:.2f} GB'),
            ('  temporaries', f'{self.temporaries / GB:.2f} GB'),
            ('  on the host', f'{self.host / GB:.2f} GB'),
            ('FLOPs a chip', f'{program.flops:.4g}, of these {self.model_flops:.4g} without recomputation'),
        ]
        for kind, total in sorted(program.collectives.items()):
            share = total.asynchronous / total.wire if total.wire else 0
            rows.append((kind, f'{total.count} a step, {total.payload / GB:.3f} GB, {share:.0%} asynchronous'))
        if program.seconds:
            rows.append(
                ('predicted step', f'{program.seconds:.3f} s, {program.waits:.3f} s of it waiting for the network or the host')
            )
            rows.append(('tokens/s a chip', f'{self.tokens / self.chips / program.seconds:,.0f}'))
        if self.mfu:
            rows.append(('MFU', f'{self.mfu:.1%}'))
        return '\n'.join(f'{name:<16} {value}' for name, value in rows)


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice that need not be there, such as 'v5p:4x8x8'.

    Raises:
      UserError: if libtpu is not installed, or knows no such slice.
    """
    # libtpu asks the cloud and the machine what it runs on, unless told; it reads these when it is loaded.
    for key, value in {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }.items():
        os.environ.setdefault(key, value)
    jax.config.update('jax_platforms', 'cpu')
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        if 'INVALID_ARGUMENT' in str(error):
            raise UserError(f'--topology={name} is no TPU slice; name {TOPOLOGIES}.') from None
        raise UserError(f'--topology={name} needs the TPU compiler: pip install libtpu ({str(error).splitlines()[0]}).') from None


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays as `jax.eval_shape` returns them, bound to the mesh's devices; what has no sharding is replicated."""

    def bind(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding is not None else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(bind, tree)


def compile_step(
    step: Any, state: Any, batch: Any, mesh: Mesh, options: Mapping[str, str] | None = None
) -> tuple[jax.stages.Compiled, str]:
    """Compiles a jitted (state, batch) -> … for the mesh's devices.

    Args:
      step: the jitted function.
      state, batch: abstract arrays, with shardings.
      mesh: of real or described devices; it must be set.
      options: of the compiler; by default those of a training step.

    Returns:
      The executable, and its text.

    Raises:
      UserError: if the compiler finds no room for it.
    """
    lowered = step.lower(on_mesh(state, mesh), on_mesh(batch, mesh))
    device = mesh.devices.flat[0]
    options = compiler_options(device) if options is None else options
    try:
        if device.platform != 'tpu':
            compiled = lowered.compile(compiler_options=options)
            return compiled, compiled.as_text()
        # `as_text` fails on programs with SparseCore operations, so the text is what the compiler leaves in a directory.
        with tempfile.TemporaryDirectory() as directory:
            compiled = lowered.compile(compiler_options={**options, 'xla_dump_to': directory})
            texts = Path(directory).glob('*after_codegen.txt')
            return compiled, max(texts, key=lambda path: path.stat().st_size).read_text()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        sizes = re.search(r'\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)', str(error))
        needed = f'needs {sizes[1]} of the {sizes[2]} of memory' if sizes else 'does not fit the memory'
        raise UserError(
            f'The step {needed} of a {device.device_kind} chip: use more chips, a smaller batch, accumulation, '
            'or keep less in compute.remat.'
        ) from None


def analyse(compiled: jax.stages.Compiled, text: str, mesh: Mesh, tokens: int, model_flops: float) -> Report:
    """The report on a compiled step: `tokens` it trains on and its model FLOPs, both of the whole mesh."""
    device, memory = mesh.devices.flat[0], compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # not donated: they need room beside the arguments
    return Report(
        chips=mesh.size,
        kind=device.device_kind,
        chip=chip_of(device),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + max(outputs, 0),
        host=memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        model_flops=model_flops / mesh.size,
        tokens=tokens,
        program=read_program(text, chip_of(device)),
    )


def dry_run(step: Any, state: Any, batch: Any, mesh: Mesh, tokens: int, model_flops: float) -> Report:
    """Compiles a step and reports on it; `str` of the result is the table for people.

    Raises:
      UserError: if it does not fit the chip.
    """
    report = analyse(*compile_step(step, state, batch, mesh), mesh, tokens, model_flops)
    report.check()
    return report
