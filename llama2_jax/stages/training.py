"""What all stages that train on batches of a data set share: their settings, the call of `fit`, and the dry run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from llama2_jax.config import SEED, Config, between, resumable
from llama2_jax.files import write_atomically
from llama2_jax.mesh import MeshConfig, make_mesh
from llama2_jax.model.llama import ComputeConfig
from llama2_jax.planning import aot
from llama2_jax.runtime import barrier, chip_of, is_main_process
from llama2_jax.runtime.hosts import DAY
from llama2_jax.text.printable import printable
from llama2_jax.train.devices import device_batches
from llama2_jax.train.loop import LoopConfig, fit
from llama2_jax.train.metrics import read_metrics
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama2_jax.train.step import Batch, State, init_state

DRY_STEPS = 1000  # length of the schedule in a dry run of a stage whose data decide it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Settings of every training stage.

    Attributes:
      optimizer: AdamW, clipping and the schedule.
      compute: Dtype, rematerialisation and attention kernel.
      mesh: Devices along each axis.
      loop: How often to log, evaluate and save, in steps.
      batch_size: Rows in the global batch: sequences, rows of whole dialogs, or pairs.
      length: Tokens in a row.
      accumulation: Microbatches that a batch is split into where memory is short.
      seed: Random seed.
      eval_batches: Held-out batches of each source that an evaluation reads; 0: all.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = resumable(MeshConfig())
    loop: LoopConfig = resumable(LoopConfig())
    batch_size: int = between(64, 1)
    length: int = between(4096, 1)
    accumulation: int = between(1, 1, resumable='anywhere')
    seed: int = SEED
    eval_batches: int = resumable(8)


class Data(Protocol):
    """`PretrainData`, `DialogData` or `PreferenceData`."""

    steps: int

    def train(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on, with their record_ids."""

    def describe(self, record_ids: np.ndarray) -> Sequence[str]:
        """Names of the records of a batch."""


def data_share() -> dict[str, Any]:
    """This process's share of the data, for the constructor of the data set."""
    # One process may have more to tokenise than another, so the barrier waits for a day.
    share = {'process_index': jax.process_index(), 'process_count': jax.process_count()}
    return share | {'barrier': partial(barrier, seconds=DAY)}


def write_example(path: Path, text: str) -> None:
    """Begins WORKDIR/samples.md with the first example of the run."""
    if is_main_process():
        write_atomically(path / 'samples.md', printable(text))


def first_state(config: TrainingConfig, steps: int, params: Any) -> State:
    """The state before the first of so many steps; the parameters are donated."""
    optimizer = make_optimizer(config.optimizer, steps)
    return jax.jit(partial(init_state, optimizer=optimizer), donate_argnums=0)(params)


def train_stage(
    config: TrainingConfig,
    path: Path,
    mesh: Mesh,
    data: Data,
    *,
    abstract: State,
    init: Callable[[], State],
    step: Callable[[State, Batch], tuple[State, Mapping[str, jax.Array]]],
    flops: float,
    evaluate: Callable[[State], Mapping[str, float]] | None,
    sample: Callable[[State], str] | None = None,
) -> State:
    """Trains on all batches of `data`, or resumes, and prints the last evaluation.

    Args:
      config: The stage's settings.
      path: The workdir, as `open_run` returned it.
      mesh: The mesh that is set.
      data: The data set.
      abstract, init, step, evaluate, sample: As in `fit`.
      flops: Model FLOPs of a batch.
    """
    chip = chip_of(jax.devices()[0])
    state = fit(
        path,
        config.loop,
        abstract_state=abstract,
        init=init,
        step=step,
        batches=partial(device_batches, data, mesh),
        steps=data.steps,
        describe=data.describe,
        evaluate=evaluate,
        sample=sample,
        flops_per_step=flops,
        peak_flops=chip and chip.peak_flops,
    )
    print_metrics(path)
    return state


def compile_stage(config: TrainingConfig, topology: str | None, program: Callable[[Mesh, ComputeConfig], tuple]) -> aot.Report:
    """Compiles a stage's step for the local devices, or for a TPU topology that need not be attached, and reports its cost.

    Args:
      config: The stage's settings.
      topology: A slice such as v5e:4x4, or None.
      program: Of the mesh and the resolved compute config: the step, an abstract state and batch, the tokens of a batch, and its
        model FLOPs; the mesh is set.

    Raises:
      UserError: There is no such slice, the mesh does not divide the config, or the step does not fit the chips.
    """
    mesh = make_mesh(config.mesh, aot.topology_devices(topology) if topology else None)
    with jax.set_mesh(mesh):
        step, state, batch, tokens, flops = program(mesh, config.compute.on(mesh.devices.flat[0].platform))
        return aot.dry_run(step, state, batch, mesh, tokens, flops)


def print_metrics(path: Path) -> None:
    """Prints the evaluation of the last step."""
    if not is_main_process():
        return
    last = read_metrics(path / 'metrics.jsonl')[-1]
    for name, value in last.items():
        if value is None or not name.startswith(('heldout/', 'toy/')) or name.endswith('/bits_per_byte'):
            continue
        text = f'{value:7.4f}' if name.endswith('/loss') else f'{value:7.1%}'
        bits = last.get(name.replace('/loss', '/bits_per_byte'))
        more = f' nats a token   {bits:6.3f} bits a byte' if bits and name.endswith('/loss') else ''
        print(printable(f'{name:<48} {text}{more}'), flush=True)
