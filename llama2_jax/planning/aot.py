"""Compiling a step without running it: does it fit, and how fast might it be? For TPUs this needs `libtpu`, but no TPU."""

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from packaging.requirements import Requirement

from llama2_jax.config import UserError
from llama2_jax.planning.cost import Program, read_program
from llama2_jax.planning.hlo import read_memory
from llama2_jax.runtime import Chip, chip_of, compiler_options

TOPOLOGIES = 'a chip and its torus, such as v5e:16x16, v6e:8x8, v4:4x4x4 or v5p:4x8x8 (what is sold as v5p-512, counting cores)'
TOPOLOGY = re.compile(r'(?P<chip>v\d\w?|tpu7x):(?P<torus>[1-9]\d*x[1-9]\d*(x[1-9]\d*)?)')
GB = 1e9


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      text: The optimised module.
      arguments: Bytes of its arguments on one device.
      temporaries: Bytes of everything else that it allocates on one device, results that do not reuse an argument included.
      host: Bytes in host memory, per device.
    """

    text: str
    arguments: int
    temporaries: int
    host: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Resources that one step takes; bytes, FLOPs and seconds are those of one chip.

    Attributes:
      chips: Number of chips in the mesh.
      kind: The kind of device, as JAX names it.
      chip: The chip's published figures; None where unknown.
      compiler: Name and version of the compiler, and a warning where pods use another one.
      arguments: Bytes of state and batch.
      temporaries: Bytes of everything else on the device.
      host: Bytes offloaded to the host.
      model_flops: without recomputation.
      tokens: of the whole step.
      program: FLOPs with recomputation, collectives, predicted seconds.
    """

    chips: int
    kind: str
    chip: Chip | None
    compiler: str
    arguments: int
    temporaries: int
    host: int
    model_flops: float
    tokens: int
    program: Program

    @property
    def memory(self) -> int:
        """Bytes of device memory."""
        return self.arguments + self.temporaries

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s predicted, as a share of the chip's peak."""
        seconds = self.program.seconds
        return self.model_flops / seconds / self.chip.peak_flops if seconds and self.chip else None

    def check(self) -> None:
        """Raises a UserError if the chip has too little memory."""
        if self.chip and self.memory > self.chip.memory:
            needed, limit = self.memory / GB, self.chip.memory / GB
            raise UserError(
                f'The step needs {needed:.1f} GB on every {self.chip.name} chip, which has {limit:.1f} GB: '
                'use more chips, a smaller batch, accumulation, or keep less in compute.remat.'
            )

    def __str__(self) -> str:
        program = self.program
        limit = f' of {self.chip.memory / GB:.1f}' if self.chip else ''
        rows = [
            ('chips', f'{self.chips} × {self.kind}'),
            ('compiler', self.compiler),
            ('memory a chip', f'{self.memory / GB:.2f}{limit} GB'),
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
    """The devices of a TPU topology that need not be attached, such as 'v5p:4x8x8'.

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
    match = TOPOLOGY.fullmatch(name)
    if not match:  # libtpu divides by sizes of 0
        raise UserError(f'--topology={name!r} is not a TPU slice; give {TOPOLOGIES}.')
    sizes = [int(size) for size in match['torus'].split('x')]
    # Unless told, it takes hosts of 2 × 2 chips; and of a v4 chip, the two cores that JAX drives as one device.
    options = {'chips_per_host_bounds': (min(sizes[0], 2), min(sizes[1], 2), 1)}
    if match['chip'] == 'v4':
        options['chip_config_name'] = 'megacore'
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        if 'INVALID_ARGUMENT' in str(error):
            raise UserError(f'--topology={name} is not a TPU slice; give {TOPOLOGIES}.') from None
        raise UserError(f'--topology={name} needs the TPU compiler: pip install libtpu ({str(error).splitlines()[0]}).') from None


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays as `jax.eval_shape` returns them, bound to the mesh's devices; what has no sharding is replicated."""

    def bind(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding is not None else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(bind, tree)


def compile_step(step: Any, state: Any, batch: Any, mesh: Mesh, options: Mapping[str, str] | None = None) -> Compiled:
    """Compiles a jitted (state, batch) -> … for the mesh's devices.

    Args:
      step: The jitted function.
      state, batch: Abstract arrays, with shardings.
      mesh: Of real or described devices; it must be set.
      options: Compiler options; by default those of a training step.

    Raises:
      UserError: The compiler finds that it does not fit the device memory.
    """
    return compile_lowered(step.lower(on_mesh(state, mesh), on_mesh(batch, mesh)), mesh, options)


def compile_lowered(lowered: jax.stages.Lowered, mesh: Mesh, options: Mapping[str, str] | None = None) -> Compiled:
    """Compiles a lowered program for the mesh's devices; arguments and errors as of `compile_step`."""
    device = mesh.devices.flat[0]
    options = compiler_options(device) if options is None else options
    try:
        if device.platform != 'tpu':
            compiled = lowered.compile(compiler_options=options)
            memory = compiled.memory_analysis()
            outputs = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)  # those that reuse no argument
            return Compiled(compiled.as_text(), memory.argument_size_in_bytes, memory.temp_size_in_bytes + outputs, 0)
        # `as_text` fails on programs with SparseCore operations, and `memory_analysis` of some versions counts temporaries twice
        # or host buffers as the device's. So both are read from the files that the compiler writes.
        with tempfile.TemporaryDirectory() as directory:
            compiled = lowered.compile(compiler_options={**options, 'xla_dump_to': directory})
            arguments = compiled.memory_analysis().argument_size_in_bytes
            device_bytes, host = read_memory(_dumped(directory, 'memory-usage-report.txt'))
            return Compiled(_dumped(directory, 'after_codegen.txt'), arguments, device_bytes - arguments, host)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        sizes = re.search(r'\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)', str(error))
        needed = f'needs {sizes[1]} of the {sizes[2]} of memory' if sizes else 'does not fit the memory'
        raise UserError(
            f'The step {needed} of a {device.device_kind} chip: use more chips, a smaller batch, accumulation, '
            'or keep less in compute.remat.'
        ) from None


def _dumped(directory: str, ending: str) -> str:
    """The text that the compiler has left of the program; of small ones beside it there is less."""
    return max(Path(directory).glob(f'*{ending}'), key=lambda path: path.stat().st_size).read_text()


def analyse(compiled: Compiled, mesh: Mesh, tokens: int, model_flops: float) -> Report:
    """The report on a compiled step: `tokens` it trains on and its model FLOPs, both of the whole mesh."""
    device = mesh.devices.flat[0]
    return Report(
        chips=mesh.size,
        kind=device.device_kind,
        chip=chip_of(device),
        compiler=compiler_of(device),
        arguments=compiled.arguments,
        temporaries=compiled.temporaries,
        host=compiled.host,
        model_flops=model_flops / mesh.size,
        tokens=tokens,
        program=read_program(compiled.text, chip_of(device)),
    )


def compiler_of(device: jax.Device) -> str:
    """Name and version of the compiler for a device; for TPUs with a warning unless it is the one that jax[tpu] installs."""
    if device.platform != 'tpu':
        return f'jaxlib {metadata.version("jaxlib")}'
    used = metadata.version('libtpu')
    wanted = next(r for r in map(Requirement, metadata.requires('jax')) if r.name == 'libtpu')
    if wanted.specifier.contains(used, prereleases=True):
        return f'libtpu {used}'
    jax_tpu = f'jax[tpu]=={jax.__version__}'
    return f'libtpu {used}, but {jax_tpu} installs libtpu{wanted.specifier}: on a pod these figures will differ'


def dry_run(step: Any, state: Any, batch: Any, mesh: Mesh, tokens: int, model_flops: float) -> Report:
    """Compiles a step and reports on it; `str` of the result is the table for people.

    Raises:
      UserError: if it does not fit the chip.
    """
    report = analyse(compile_step(step, state, batch, mesh), mesh, tokens, model_flops)
    report.check()
    return report
