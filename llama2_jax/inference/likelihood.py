"""How likely a model finds given continuations; whatever they have in common is read once.

The choices of a question share its text, and the questions of a test share their examples. So questions are sorted, what a
batch of them begins with is read into the cache, and the rest lies packed in rows: of each question first what its choices share
(the trunk), then what each choice adds (a branch). A token sees the cache, the trunk before it and its own branch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama2_jax.inference import decode
from llama2_jax.inference.slots import Slots, in_common
from llama2_jax.mesh import replicate, reshard, spec
from llama2_jax.model.llama import rms_norm
from llama2_jax.ops.attention import attention_with_cache
from llama2_jax.ops.linear import linear

LENGTH = 512  # tokens in a packed row; twice as long where one question needs it
STEP = 128  # rows may be shorter by a multiple of it, where the last questions of a test need less
ROWS = 4  # on a device, at most: so many tokens keep its matrix units busy
SIZES = 32, 128  # of what one call asks of a row: log-probabilities, and places that they follow, which letters share
PADDING = -1

Choice = tuple[Sequence[int], Sequence[int]]  # the ids of a context, BOS included, and of a continuation of it


class Packed(NamedTuple):
    """Rows of questions, int32 [B, L] each.

    Attributes:
      tokens_BL: the questions' tokens without what the cache holds.
      positions_BL: of each in its sequence.
      question_BL: to which question of its row a token belongs; PADDING.
      branch_BL: to which of the question's branches; 0 in the trunk.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    question_BL: np.ndarray
    branch_BL: np.ndarray


def read_packed(weights: decode.Weights, cache: decode.Cache, packed: Packed, length_R: jax.Array) -> jax.Array:
    """Hidden states [B, L, D] after the final norm; `length_R`: how much of the cache a row sees. The cache stays as it is."""
    visible_RLL = _visible(reshard(packed.question_BL, 'RL'), reshard(packed.branch_BL, 'RL'))
    length_R = reshard(length_R, 'R')
    x_BLD, rope = decode.embed_inputs(weights, packed.tokens_BL, reshard(packed.positions_BL, 'BL'), cache)
    for block, cached in zip(weights.blocks, cache, strict=True):

        def attend(q_BLHK, k_BLGK, v_BLGK, cached=cached):
            new = decode.by_rows(k_BLGK), decode.by_rows(v_BLGK)
            return attention_with_cache(q_BLHK, *new, visible_RLL, *cached, length_R)

        x_BLD = block(x_BLD, rope, attend)
    return rms_norm(x_BLD, weights.norm_D, weights.config.norm_eps)


def _visible(question_RL, branch_RL):
    places_L = jnp.arange(question_RL.shape[1])
    causal_LL = places_L[:, None] >= places_L[None]
    same = question_RL[:, :, None] == question_RL[:, None]
    above = (branch_RL[:, None] == 0) | (branch_RL[:, :, None] == branch_RL[:, None])
    return same & above & causal_LL[None]


def pick(
    weights: decode.Weights, cache: decode.Cache, x_BLD: jax.Array, place_BL: jax.Array, after_BT: jax.Array, token_BT: jax.Array
) -> jax.Array:
    """Log-probabilities, float32 [B, T], of tokens [B, T] after some places of their rows.

    Args:
      weights, cache: of the model; the cache is not looked at.
      x_BLD: hidden states of all places.
      place_BL: int32, the places that are asked about.
      after_BT: int32, after which of those each token comes.
      token_BT: int32.
    """
    letters = [spec(letters) for letters in ('BLD', 'BL')]
    gather = jax.shard_map(_gather, in_specs=tuple(letters), out_specs=letters[0], check_vma=False)
    chosen_BLD = gather(x_BLD, reshard(place_BL, 'BL'))
    logits_BLV = linear('BLD,DV->BLV', chosen_BLD, weights.head_DV).astype(jnp.float32)
    in_specs = (spec('BLV'), spec('BL'), spec('BL'))
    logprobs = partial(_logprobs, axes=spec('V')[0])
    sharded = jax.shard_map(logprobs, in_specs=in_specs, out_specs=spec('BL'), check_vma=False)
    return replicate(sharded(logits_BLV, reshard(after_BT, 'BL'), reshard(token_BT, 'BL')))


def _gather(x_BLD, place_BL):
    return jnp.take_along_axis(x_BLD, place_BL[:, :, None], axis=1)


def _logprobs(logits_BLV, after_BT, token_BT, axes):
    """Log-probabilities over a vocabulary that mesh axes shard."""
    B, _, V = logits_BLV.shape
    own_BT = token_BT - jax.lax.axis_index(axes) * V
    logit_BT = logits_BLV[jnp.arange(B)[:, None], after_BT, jnp.clip(own_BT, 0, V - 1)]
    logit_BT = jax.lax.psum(jnp.where((own_BT >= 0) & (own_BT < V), logit_BT, 0), axes)
    top_BL = jax.lax.pmax(logits_BLV.max(axis=2), axes)
    total_BL = top_BL + jnp.log(jax.lax.psum(jnp.exp(logits_BLV - top_BL[:, :, None]).sum(axis=2), axes))
    return logit_BT - jnp.take_along_axis(total_BL, after_BT, axis=1)


@cache
def programs(device: jax.Device) -> tuple[Callable, Callable]:
    """`read_packed` and `pick` compiled for such devices."""
    options = decode.compiler_options(device)
    return tuple(jax.jit(program, compiler_options=options) for program in (read_packed, pick))


class _Tree:
    """A question: what its choices share, and what each adds to that."""

    def __init__(self, index: int, choices: Sequence[Choice]):
        self.index = index
        self.sequences = [np.array([*context, *ids], np.int32) for context, ids in choices]
        self.firsts = [len(context) for context, _ in choices]  # of each the first token that is asked for
        inputs = [sequence[:-1] for sequence in self.sequences]
        self.trunk = inputs[0][: min(in_common(inputs[0], other) for other in inputs)]
        self.branches = [tokens[len(self.trunk) :] for tokens in inputs]
        self.most_shared = min(len(self.trunk), min(self.firsts) - 1)  # the last token of a context must be read, not held

    def size(self, held: int) -> int:
        """Tokens in a row where the cache holds so many."""
        return len(self.trunk) - held + sum(map(len, self.branches))

    def targets(self, held: int, start: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each choice, the places in the row, in which it begins at `start`, after which its tokens come; and the tokens."""
        targets, end = [], start + len(self.trunk) - held
        for sequence, first, branch in zip(self.sequences, self.firsts, self.branches, strict=True):
            before = np.arange(first - 1, len(sequence) - 1)
            inside = before >= len(self.trunk)
            targets.append((np.where(inside, end + before - len(self.trunk), start + before - held), sequence[first:]))
            end += len(branch)
        return targets


def log_likelihoods(slots: Slots, device: jax.Device, questions: Iterable[Sequence[Choice]]) -> Iterator[tuple[int, list[float]]]:
    """For each question its number and, for each of its choices, the sum of its tokens' log-probabilities; not in order."""
    read, choose = programs(device)
    trees = sorted((_Tree(index, choices) for index, choices in enumerate(questions)), key=lambda tree: tree.trunk.tolist())
    for batch, held in _batches(trees, len(slots.held)):
        slots.hold(held)
        packed, targets = _pack_rows(batch, len(held), len(slots.held))
        x_BLD = slots.run(read, packed, np.full(len(slots.held), len(held), np.int32))
        sums = [[0.0] * len(tree.sequences) for tree in batch]
        for asked, owners in _rounds(targets):
            logprobs = np.asarray(slots.run(choose, x_BLD, *asked))
            for row, column, tree, choice in owners:
                sums[tree][choice] += float(logprobs[row, column])
        yield from zip([tree.index for tree in batch], sums, strict=True)


def _batches(trees: Sequence[_Tree], rows: int) -> Iterator[tuple[list[_Tree], np.ndarray]]:
    """Questions whose rest fits the rows together, and what they all begin with."""
    batch: list[_Tree] = []
    held = np.zeros(0, np.int32)
    for tree in trees:
        shared = tree.trunk[: tree.most_shared] if not batch else held[: min(in_common(held, tree.trunk), tree.most_shared)]
        if batch and not _places([other.size(len(shared)) for other in (*batch, tree)], rows, LENGTH):
            yield batch, held
            batch, shared = [], tree.trunk[: tree.most_shared]
        batch, held = [*batch, tree], shared
    if batch:
        yield batch, held


def _places(sizes: Sequence[int], rows: int, length: int) -> list[tuple[int, int]] | None:
    """Row and first place of each, the longest first, where it fits first; None where they do not fit."""
    used, places = [0] * rows, [(0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        row = next((row for row in range(rows) if used[row] + sizes[index] <= length), None)
        if row is None:
            return None
        places[index] = row, used[row]
        used[row] += sizes[index]
    return places


def _pack_rows(batch, held, rows):
    """The packed rows, and for every row its targets: (place, token, number in the batch, choice)."""
    sizes = [tree.size(held) for tree in batch]
    lengths = itertools.chain(range(STEP, LENGTH, STEP), (LENGTH << n for n in itertools.count()))
    length, places = next((length, places) for length in lengths if (places := _places(sizes, rows, length)))
    packed = Packed(*(np.full((rows, length), fill, np.int32) for fill in (0, 0, PADDING, 0)))
    targets = [[] for _ in range(rows)]
    for number, (tree, (row, start)) in enumerate(zip(batch, places, strict=True)):
        stop = start
        for branch, tokens in enumerate([tree.trunk[held:], *tree.branches]):
            line, stop = slice(stop, stop + len(tokens)), stop + len(tokens)
            packed.tokens_BL[row, line] = tokens
            packed.positions_BL[row, line] = np.arange(len(tokens)) + (len(tree.trunk) if branch else held)
            packed.question_BL[row, line], packed.branch_BL[row, line] = number, branch
        for choice, pairs in enumerate(tree.targets(held, start)):
            targets[row] += [(place, token, number, choice) for place, token in zip(*pairs, strict=True)]
    return packed, targets


def _rounds(targets):
    """What one call after the other is asked, as `pick` takes it, and (row, column, number, choice) of each answer."""
    longest = max(map(len, targets))
    for first in range(0, longest, _size(longest)):
        lines = [asked[first : first + _size(longest)] for asked in targets]
        found = [sorted({place for place, *_ in line}) for line in lines]
        places = np.zeros((len(lines), _size(max(map(len, found)))), np.int32)
        after, tokens = (np.zeros((len(lines), _size(longest)), np.int32) for _ in range(2))
        owners = []
        for row, line in enumerate(lines):
            places[row, : len(found[row])] = found[row]
            for column, (place, token, *owner) in enumerate(line):
                after[row, column], tokens[row, column] = found[row].index(place), token
                owners.append((row, column, *owner))
        yield (places, after, tokens), owners


def _size(count):
    return next((size for size in SIZES if size >= count), SIZES[-1])
