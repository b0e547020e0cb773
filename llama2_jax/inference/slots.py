"""The rows of a cache and what they hold: prompts are read into them, copied between them, and continued."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama2_jax.config import UserError
from llama2_jax.inference import decode

PIECES = (32, 128, 384, 512)  # tokens of a prompt that one call reads; few sizes, for every one is a program
READ_TOGETHER = 2048  # tokens of all rows in one call, at most, but for one piece a device
FIRST_PLACES = 64  # of every row, to begin with
WORTH_COPYING = 16  # tokens that a prompt has in common with what another row holds


class Slots:
    """A cache whose rows keep what they hold until something else is put there.

    Args:
      weights: of the model, on `mesh`.
      mesh: for decoding.
      rows: of the cache; a multiple of `shards(mesh)`.

    Attributes:
      held: the tokens whose keys and values each row holds.
    """

    def __init__(self, weights: decode.Weights, mesh: Mesh, rows: int):
        self._weights, self._mesh = weights, mesh
        self._prefill, self._decode = decode.programs(mesh.devices.flat[0])
        self._rows_a_shard = rows // shards(mesh)
        # The last pieces and chunks may reach beyond the context; a multiple of 128, as TPUs like it.
        self._most_places = -(-(weights.config.context + PIECES[1]) // 128) * 128
        self._places = self._enough(0)
        self.held = [np.zeros(0, np.int32)] * rows
        with jax.set_mesh(mesh):
            self._cache = decode.empty_cache(weights.config, rows, self._places, weights.table_VD.dtype.name)

    def place(self, prompts: Sequence[np.ndarray], free: Sequence[int]) -> list[int]:
        """Puts each prompt into one of the free rows, and returns which.

        A prompt that begins with what some row holds starts from a copy of that row, and equal prompts are read once.
        """
        free, slots, copies, reads, repeats = list(free), [], [], [], []
        read: dict[bytes, int] = {}
        for prompt in prompts:
            first = read.get(prompt.tobytes())
            beside = [slot for slot in free if first is not None and self._shard(slot) == self._shard(first)]
            if beside:
                slot = beside[0]
                repeats.append((first, slot))
                self.held[slot] = prompt[:0]
            else:
                source, slot, shared = self._source(prompt, free)
                if source != slot:
                    copies.append((source, slot))
                reads.append((slot, shared, prompt))
                read[prompt.tobytes()] = slot
                self.held[slot] = prompt[:shared]
            free.remove(slot)
            slots.append(slot)
        self._copy(copies)
        self._read(reads)
        self._copy(repeats)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.held[slot] = prompt
        return slots

    def advance(self, rows: decode.Rows, steps: int, quota: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`decode`: tokens [B, CHUNK], their log-probabilities, and how many are each row's [B]; rows hold what they read."""
        longest = int(rows.length_B.max())
        # All of the cache is read for each token. A chunk is worth cutting it to what rows hold, one token is not.
        self._shorten(longest + decode.CHUNK - steps)
        with self._devices():
            recent, *drawn = self._decode(self._weights, self._cache, rows, np.int32(steps), np.int32(quota))
        self._reserve(longest + decode.CHUNK)
        with self._devices():
            self._cache = decode.kept(self._cache, recent, rows)
            tokens, logprobs, counts = (np.asarray(x) for x in drawn)
        for slot in np.flatnonzero(rows.live_B):
            read = [rows.token_B[slot : slot + 1], tokens[slot, : counts[slot] - 1]]
            self.held[slot] = np.concatenate([self.held[slot], *read])
        return tokens, logprobs, counts

    def hold(self, prompt: np.ndarray) -> None:
        """Puts one prompt into every row, of a cache that is no longer than that needs."""
        if any(not np.array_equal(held, prompt) for held in self.held):
            self.place([prompt] * len(self.held), range(len(self.held)))
        self._shorten(len(prompt))

    def run(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """`program(weights, cache, *arguments)`, which leaves the cache as it is."""
        with self._devices():
            return program(self._weights, self._cache, *arguments)

    def _source(self, prompt: np.ndarray, free: Sequence[int]) -> tuple[int, int, int]:
        """The row to start a prompt from, the free row it goes to, and how many tokens it saves."""
        common = [in_common(held, prompt) for held in self.held]
        own = max(free, key=lambda slot: common[slot])
        near = {self._shard(slot) for slot in free}
        best = max((slot for slot in range(len(common)) if self._shard(slot) in near), key=lambda slot: common[slot])
        if common[best] < common[own] + WORTH_COPYING:
            return own, own, common[own]
        beside = [slot for slot in free if self._shard(slot) == self._shard(best)]
        return best, min(beside, key=lambda slot: len(self.held[slot])), common[best]

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies rows, one pair (source, target) after the other."""
        if pairs:
            lines = self._lines([target for _, target in pairs])
            source, target = (self._own(lines, [pair[k] for pair in pairs]) for k in (0, 1))
            with self._devices():
                self._cache = decode.copied(self._cache, source, target, lines >= 0)

    def _read(self, prompts: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Reads prompts into their rows, from a token on: (row, first token, prompt)."""
        rest = [line for line in prompts if line[1] < len(line[2])]
        while rest:
            rest.sort(key=lambda line: line[1] - len(line[2]))  # the longest first
            rest = self._read_pieces(rest)

    def _read_pieces(self, rest):
        """One call: a piece of some prompts of similar length; returns what is left to read."""
        longest = len(rest[0][2]) - rest[0][1]
        size = next((size for size in PIECES if size >= longest), PIECES[-1])
        if any(start + size > self._most_places for _, start, _ in rest):
            size = min(size, PIECES[1])
        together = max(READ_TOGETHER // size // shards(self._mesh), 1)
        shorter = max((other for other in PIECES if other < size), default=0)
        now, counts = [], [0] * shards(self._mesh)
        for line in rest:
            if len(line[2]) - line[1] > shorter and counts[self._shard(line[0])] < together:
                counts[self._shard(line[0])] += 1
                now.append(line)
        lines = self._lines([slot for slot, _, _ in now])
        tokens, starts = np.zeros((len(lines), size), np.int32), np.zeros(len(lines), np.int32)
        for row, index in enumerate(lines):
            if index >= 0:
                _, starts[row], prompt = now[index]
                piece = prompt[starts[row] : starts[row] + size]
                tokens[row, : len(piece)] = piece
        self._reserve(int(starts.max()) + size)
        slots = self._own(lines, [slot for slot, _, _ in now])
        with self._devices():
            self._cache = self._prefill(self._weights, self._cache, tokens, slots, starts, lines >= 0, fresh=not starts.any())
        done = {slot for slot, _, _ in now}
        moved = [(slot, start + size * (slot in done), prompt) for slot, start, prompt in rest]
        return [line for line in moved if line[1] < len(line[2])]

    def _reserve(self, places: int) -> None:
        """Makes the cache longer where it is too short."""
        self._resize(max(self._places, self._enough(places)))

    def _shorten(self, places: int) -> None:
        """Cuts off what of the cache is beyond so many places: all of it is read for each token. Long rows have left it so."""
        self._resize(min(self._places, self._enough(places)))

    def _enough(self, places: int) -> int:
        """The next length of a cache; each is twice the one before, so that there are few."""
        enough = FIRST_PLACES
        while enough < places:
            enough *= 2
        return min(enough, self._most_places)

    def _resize(self, places: int) -> None:
        if places != self._places:
            self._places = places
            self.held = [held[:places] for held in self.held]
            with self._devices():
                self._cache = decode.resized(self._cache, places)

    def _shard(self, slot: int) -> int:
        return slot // self._rows_a_shard

    def _lines(self, slots: Sequence[int]) -> np.ndarray:
        """For every line of a batch that is cut over the shards, the index of the slot it is for, or -1."""
        of_shard = [[i for i, slot in enumerate(slots) if self._shard(slot) == shard] for shard in range(shards(self._mesh))]
        most = max(len(indices) for indices in of_shard)
        lines = np.full((len(of_shard), next(size for size in (1, 4, 16, 64, 256, most) if size >= most)), -1)
        for line, indices in zip(lines, of_shard, strict=True):
            line[: len(indices)] = indices
        return lines.reshape(-1)

    def _own(self, lines: np.ndarray, slots: Sequence[int]) -> np.ndarray:
        """The slot of each line, counted among those of its shard."""
        return np.array([slots[index] % self._rows_a_shard if index >= 0 else 0 for index in lines], np.int32)

    @contextlib.contextmanager
    def _devices(self) -> Iterator[None]:
        """Under the mesh; too little memory is said."""
        try:
            with jax.set_mesh(self._mesh):
                yield
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            raise UserError('The memory of the devices is too small: use a smaller batch_size, int8 or shorter texts.') from None


def shards(mesh: Mesh) -> int:
    """Into how many parts a mesh for decoding cuts the rows of a cache."""
    return mesh.shape['replica'] * mesh.shape['rows']


def in_common(held: np.ndarray, prompt: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(held), len(prompt))
    different = np.flatnonzero(held[:length] != prompt[:length])
    return int(different[0]) if len(different) else length
