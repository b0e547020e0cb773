"""What one step of decoding takes, compiled ahead of time for the local devices or for a TPU topology that is not attached."""

import math

import jax
from jax.sharding import Mesh

from llama2_jax.checkpoints.load import shape_of
from llama2_jax.config import ModelConfig
from llama2_jax.inference import decode
from llama2_jax.mesh import decoding_mesh
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.planning import aot


def dry_run(model: str, topology: str | None, batch_size: int, length: int, int8: bool) -> str:
    """Compiles one step of decoding for the local devices, or for a TPU topology that need not be attached; returns the report.

    Args:
      model: a size, such as '7b', or any model.
      topology: such as 'v5p:2x2x4'; None: the devices here.
      batch_size: sequences at a time.
      length: places of the cache, all of which are read.
      int8: weights in eight bits.

    Raises:
      UserError: it does not fit.
    """
    config = shape_of(model)
    mesh = decoding_mesh(config, aot.topology_devices(topology) if topology else None)
    report, floor = compile_step(config, mesh, batch_size, length, int8)
    report.check()
    lines = [f'mesh             {" × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())}', str(report)]
    if report.program.seconds:
        ratio = report.program.seconds / floor
        lines.append(f'memory bound     {floor * 1e3:.3f} ms to read weights and cache once; predicted {ratio:.2f} times that')
    return '\n'.join(lines)


def compile_step(config: ModelConfig, mesh: Mesh, batch_size: int, length: int, int8: bool) -> tuple[aot.Report, float]:
    """The report on one step, and the seconds in which a chip's memory gives its weights and cache once (0 if unknown)."""
    device = mesh.devices.flat[0]
    dtype = ComputeConfig().on(device.platform).dtype
    with jax.set_mesh(mesh):
        weights = decode.abstract_weights(config, dtype, int8)
        cache = jax.eval_shape(lambda: decode.empty_cache(config, batch_size, length, dtype))
        rows = decode.abstract_rows(batch_size)
        uniform = jax.eval_shape(decode.uniform, rows)
        progress = jax.eval_shape(decode.first_progress, cache, rows)
        step = jax.jit(lambda given, progress: decode.decode_token(*given, progress), donate_argnums=1)
        options = decode.compiler_options(device)
        compiled = aot.compile_step(step, (weights, cache, rows, uniform), progress, mesh, options)
    report = aot.analyse(compiled, mesh, batch_size, model_flops=0)
    held = [(leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(aot.on_mesh((weights, cache), mesh))]
    size = sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in held)
    return report, size / report.chip.bandwidth if report.chip else 0.0
