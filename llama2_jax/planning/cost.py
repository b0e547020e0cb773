"""A step time, from replaying the schedule of an optimised XLA program; FLOPs and collectives counted on the way.

Instructions run in their order on a compute stream, with the cycles that the TPU compiler estimates for each, beside one stream
for the network and two for the host. A synchronous collective stops the computation; an asynchronous one runs from its start and
stops it at its end. Loops count as often as they turn. The result compares builds under one compiler; it is not a measurement.
"""

import collections
import dataclasses
import re

from llama2_jax.planning.hlo import Collective, Instruction, Module, called_by, kind_of
from llama2_jax.runtime import Chip

KERNEL_EFFICIENCY = 0.5  # of peak, for attention kernels, which the compiler does not price
HOST_BANDWIDTH = 50e9  # bytes/s a chip, each way
LATENCY = 2e-6  # seconds a collective
FREE = set(
    ['parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'partition-id', 'replica-id', 'after-all', 'opt-barrier']
)
COPIES = {'copy-start', 'slice-start', 'dynamic-slice-start', 'dynamic-update-slice-start', 'async-start'}


@dataclasses.dataclass
class Total:
    """Totals of one kind of collective: calls a step, bytes of full buffers, bytes on a chip's links, asynchronous bytes."""

    count: int = 0
    payload: float = 0
    wire: float = 0
    asynchronous: float = 0


@dataclasses.dataclass
class Program:
    """One execution, on one device.

    Attributes:
      flops: of matrix products and attention kernels, recomputation included.
      collectives: by kind.
      seconds: predicted; None where the compiler tells no cycles.
      waits: seconds of these spent waiting for asynchronous copies and collectives.
    """

    flops: float = 0
    collectives: dict[str, Total] = dataclasses.field(default_factory=lambda: collections.defaultdict(Total))
    seconds: float | None = None
    waits: float = 0


def read_program(text: str, chip: Chip | None = None) -> Program:
    """Counts, and for a chip with a clock times, the text of an optimised module."""
    replay = _Replay(Module(text), chip if chip and chip.clock else None)
    seconds = replay.run(replay.module.entry, 1)
    replay.program.seconds = seconds if replay.chip else None
    return replay.program


class _Streams:
    """How far each stream of a computation has come, in seconds, and when what was started in it ends."""

    def __init__(self):
        self.now = self.links = 0.0
        self.host = [0.0, 0.0]
        self.ends: dict[str, float] = {}
        self.deferred: dict[str, float] = {}
        self.channels: set[tuple[str, str]] = set()

    def end_of(self, i: Instruction) -> float:
        return max((self.ends.get(name, 0.0) for name in i.operands), default=0.0)

    def send(self, seconds: float) -> float:
        """The network is busy for so long, from when it is free; returns when it ends."""
        self.links = max(self.now, self.links) + seconds
        return self.links


class _Replay:
    def __init__(self, module: Module, chip: Chip | None):
        self.module, self.chip, self.program = module, chip, Program()

    def run(self, computation: str, times: int) -> float:
        """Seconds of one execution of a computation that runs `times` times a step."""
        streams = _Streams()
        for i in self.module.computations[computation]:
            if i.op in FREE:
                if i.op in ('get-tuple-element', 'bitcast') and streams.end_of(i):
                    streams.ends[i.name] = streams.end_of(i)
            elif i.op == 'while':
                turns = self.module.turns(computation, i)
                streams.now += self.run(called_by(i, 'body'), times * turns) * turns
            elif i.op == 'call':
                streams.now += self.run(called_by(i), times)
            elif i.op == 'conditional':
                branches = re.search(r'(?:branch_computations=\{|true_computation=)(.*?)(?:\}|, metadata|$)', i.rest)[1]
                streams.now += max(self.run(name, times) for name in re.findall(r'%([\w.\-]+)', branches))
            elif i.op.endswith('-done'):
                self.wait(streams, streams.end_of(i), times)
            elif i.op == 'async-update':
                started = streams.deferred.pop(i.operands[0], None)
                streams.ends[i.name] = streams.end_of(i) if started is None else streams.send(started)
            elif kind_of(i):
                end = streams.send(self.count(self.module.collective(computation, i), times, i.op.endswith('-start')))
                if i.op.endswith('-start'):
                    streams.ends[i.name] = end
                else:
                    self.wait(streams, end, times)
            elif i.op in COPIES:
                self.start_copy(streams, computation, i, times)
            else:
                if i.op == 'fusion':
                    self.communicate(streams, i, times)
                streams.now += self.compute(computation, i, times)
        return streams.now

    def wait(self, streams: _Streams, until: float, times: int) -> None:
        self.program.waits += max(until - streams.now, 0) * times
        streams.now = max(streams.now, until)

    def compute(self, computation: str, i: Instruction, times: int) -> float:
        """Counts the FLOPs of an instruction; returns its seconds."""
        kernel = self.module.kernel_flops(computation, i) if 'tpu_custom_call' in i.rest else 0
        self.program.flops += (self.module.dot_flops(computation, i) + kernel) * times
        if not self.chip:
            return 0
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
        return (int(cycles[1]) if cycles else 0) / self.chip.clock + kernel / (self.chip.peak_flops * KERNEL_EFFICIENCY)

    def count(self, collective: Collective, times: int, asynchronous: bool) -> float:
        """Adds a collective to the totals; returns its seconds on the links."""
        total = self.program.collectives[collective.kind]
        total.count += times
        total.payload += collective.payload * times
        total.wire += collective.wire * times
        total.asynchronous += collective.wire * times * asynchronous
        if not self.chip:
            return 0
        # A group no larger than one side of the largest torus runs along one axis; a larger one along all.
        one_axis = collective.kind == 'collective-permute' or collective.size <= (16 if self.chip.torus == 2 else 8)
        return collective.wire / (2 * self.chip.link * (1 if one_axis else self.chip.torus)) + LATENCY

    def start_copy(self, streams: _Streams, computation: str, i: Instruction, times: int) -> None:
        """An asynchronous copy, or a collective wrapped in an asynchronous call."""
        found, _ = self.module.inside(called_by(i) or '')
        if found:
            seconds = sum(self.count(collective, times, True) for collective in found)
            if any(name in self.module.named[computation] for name in i.operands):
                streams.ends[i.name] = streams.send(seconds)
            else:  # on a SparseCore, which begins when an update hands over its operands
                streams.deferred[i.name] = seconds
        elif self.chip:
            size, way = self.module.copied(computation, i)
            if way is None:
                streams.ends[i.name] = streams.now + 2 * size / self.chip.bandwidth
            else:
                streams.host[way] = max(streams.now, streams.host[way]) + size / HOST_BANDWIDTH
                streams.ends[i.name] = streams.host[way]

    def communicate(self, streams: _Streams, i: Instruction, times: int) -> None:
        """The collectives that a fusion holds, whole or a part of one."""
        found, role = self.module.inside(called_by(i))
        if role == 'step':
            streams.ends[i.name] = streams.end_of(i)
        elif role == 'done':
            self.wait(streams, streams.end_of(i), times)
        elif new := [c for c in found if role == 'start' or (c.kind, c.channel) not in streams.channels]:
            streams.channels |= {(c.kind, c.channel) for c in new}
            end = streams.send(sum(self.count(c, times, role == 'start') for c in new))
            if role == 'start':
                streams.ends[i.name] = end
            else:
                self.wait(streams, end, times)
