"""What the engine runs on the devices: weights laid out for decoding, a cache of keys and values, prefill and decode.

All of it runs under a mesh for decoding (`mesh.decoding_mesh`). The layers are those of training (`model.llama.Block`), and so
are the log-probabilities. Every layer has arrays of its own: none is cut out of a stack, and so copied, for each token.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import ModelConfig
from llama2_jax.mesh import parameter_letters, parameter_name, parameter_spec, replicate, reshard, spec
from llama2_jax.model.llama import Block, Llama, Rope, rms_norm
from llama2_jax.ops.attention import attention_with_cache
from llama2_jax.ops.embedding import embed
from llama2_jax.ops.linear import linear, quantize
from llama2_jax.ops.rope import rope_table
from llama2_jax.ops.sampling import sample

CHUNK = 64  # tokens a row decodes in one call at most; their keys and values then move to the cache together, by `kept`
STOP_IDS = 16  # token ids that may end a row: half for a model's own, half for a request's

KeysAndValues = tuple[jax.Array, jax.Array]  # [R, G, M, K] each
Cache = tuple[KeysAndValues, ...]  # of each layer; what lies beyond a row's length is never read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters in the compute dtype, matrices but the table perhaps in eight bits, cut for decoding."""

    table_VD: jax.Array
    blocks: tuple[Block, ...]
    norm_D: jax.Array
    head_DV: jax.Array
    config: ModelConfig = dataclasses.field(metadata={'static': True})


class Rows(NamedTuple):
    """What a call of `decode` is told of each row.

    Attributes:
      token_B: int32, the last token, which no layer has read yet.
      length_B: int32, places of its cache that are filled.
      live_B: bool; the other rows are not looked at.
      drawn_B: int32, tokens drawn before; a row's random numbers go by its seed, its sample and this count.
      limit_B: int32, tokens to draw in all.
      seed_B, sample_B: uint32.
      temperature_B, top_p_B, top_k_B: see `ops.sampling.sample`.
      stop_BL: int32, ids that end it, filled up with -1.
    """

    token_B: jax.Array
    length_B: jax.Array
    live_B: jax.Array
    drawn_B: jax.Array
    limit_B: jax.Array
    seed_B: jax.Array
    sample_B: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    stop_BL: jax.Array


def abstract_rows(rows: int) -> Rows:
    """Shapes and dtypes of what so many rows are told."""
    kinds = Rows(*[jnp.int32] * 2, bool, *[jnp.int32] * 2, *[jnp.uint32] * 2, *[jnp.float32] * 2, *[jnp.int32] * 2)
    shapes = Rows(*[(rows,)] * 10, (rows, STOP_IDS))
    return Rows(*map(jax.ShapeDtypeStruct, shapes, kinds))


class Progress(NamedTuple):
    """How far a call of `decode` has come; the rows go on together, `column` tokens up to now."""

    column: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    count_B: jax.Array
    tokens_BL: jax.Array
    logprobs_BL: jax.Array
    recent: Cache  # the columns' keys and values, which are not in the cache yet


def shard_for_decoding(model: Llama, mesh: Mesh, dtype: str, int8: bool = False) -> Weights:
    """Casts a model and moves it to where it decodes, parameter by parameter, from any mesh or the host.

    Args:
      model: its parameters.
      mesh: for decoding.
      dtype: the compute dtype.
      int8: rounds the matrices of the layers and the head to eight bits.
    """

    def move(name: str, array: jax.Array) -> jax.Array:
        array = array.astype(dtype)  # where it lies, so that fewer bytes move
        with jax.set_mesh(mesh):
            stacked = [None] * (array.ndim - len(parameter_letters(name)))
            return _finish(jax.device_put(array, NamedSharding(mesh, P(*stacked, *parameter_spec(name)))), name, int8)

    return _assemble(model, move)


def read_weights(
    config: ModelConfig, read: Callable[[str, int | None], np.ndarray], mesh: Mesh, dtype: str, int8: bool = False
) -> Weights:
    """`shard_for_decoding` of a model that is not in memory: reads, casts, moves and rounds one parameter after the other.

    Args:
      read: gives a parameter, or that of a layer, by its name.
    """

    def move(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array | tuple:
        stacked = leaf.ndim > len(parameter_letters(name))
        made = tuple(_one(read(name, layer), name) for layer in (range(config.layers) if stacked else (None,)))
        return made if stacked else made[0]

    def _one(array: np.ndarray, name: str) -> Any:
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, parameter_spec(name))
            moved = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].astype(dtype))
            return jax.block_until_ready(_finish(moved, name, int8))

    return _assemble(jax.eval_shape(lambda: Llama(config, jax.random.key(0))), move)


def abstract_weights(config: ModelConfig, dtype: str, int8: bool = False) -> Weights:
    """Shapes, dtypes and shardings of `shard_for_decoding` on the mesh for decoding that is set."""

    def shape(name: str, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(lambda x: _finish(x.astype(dtype), name, int8), array)

    return _assemble(jax.eval_shape(lambda: Llama(config, jax.random.key(0))), shape)


@partial(jax.jit, static_argnums=(1, 2))
def _finish(array, name, int8):
    """A parameter as it decodes; of a stack, a tuple of its layers."""
    letters = parameter_letters(name)
    if array.ndim > len(letters):
        return tuple(_finish(layer, name, int8) for layer in array)
    if not int8 or len(letters) == 1 or name == 'table_VD':
        return array
    return quantize(array, sums_D=name not in ('w_o_DHK', 'w_down_DF'))


def _assemble(model, finish):
    stacks = jax.tree_util.tree_map_with_path(lambda path, leaf: finish(parameter_name(path), leaf), model.blocks)
    blocks = tuple(
        jax.tree.map(lambda layers, index=index: layers[index], stacks, is_leaf=lambda leaf: isinstance(leaf, tuple))
        for index in range(model.config.layers)
    )
    table_VD, norm_D, head_DV = (finish(name, getattr(model, name).get_value()) for name in ('table_VD', 'norm_D', 'head_DV'))
    return Weights(table_VD, blocks, norm_D, head_DV, model.config)


def empty_cache(config: ModelConfig, rows: int, places: int, dtype: str) -> Cache:
    """A cache for `rows` sequences of up to `places` tokens: 2 × N × G × K × 2 bytes a token in bfloat16 (recipe A.2)."""
    shape = (rows, config.kv_heads, places, config.head_dim)
    return tuple(tuple(jnp.zeros(shape, dtype, out_sharding=spec('RGMK')) for _ in 'kv') for _ in range(config.layers))


@partial(jax.jit, static_argnames='places')
def resized(cache: Cache, places: int) -> Cache:
    """The cache with so many places: its first ones, or with room for more."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, max(places - x.shape[2], 0)), (0, 0)))[:, :, :places], cache)


@partial(jax.jit, donate_argnums=0)
def copied(cache: Cache, source_R: jax.Array, target_R: jax.Array, used_R: jax.Array) -> Cache:
    """Copies rows of the cache onto others of the same device, one after the other.

    Args:
      cache: is used up.
      source_R, target_R: int32, counted among the rows on each device; every device has as many.
      used_R: bool; the others are not copied.
    """

    def local(x_RGMK, source_R, target_R, used_R):
        def copy(index, x_RGMK):
            row = jnp.where(used_R[index], source_R[index], target_R[index])
            return x_RGMK.at[target_R[index]].set(x_RGMK[row])

        return jax.lax.fori_loop(0, source_R.shape[0], copy, x_RGMK)

    rows = [reshard(x, 'R') for x in (source_R, target_R, used_R)]
    in_specs = (spec('RGMK'), *[spec('R')] * 3)
    sharded = jax.shard_map(local, in_specs=in_specs, out_specs=spec('RGMK'), check_vma=False)
    return jax.tree.map(lambda x: sharded(x, *rows), cache)


def prefill(
    weights: Weights, cache: Cache, tokens_BL: jax.Array, slot_R: jax.Array, start_R: jax.Array, used_R: jax.Array, fresh: bool
) -> Cache:
    """Reads tokens into the cache.

    Args:
      weights: of the model.
      cache: is used up.
      tokens_BL: int32; what pads a row on the right is read too, and lies beyond its length.
      slot_R: int32, each row's place in the cache, counted among the rows on its device.
      start_R: int32, how many tokens are in the cache before.
      used_R: bool; the other rows are not written.
      fresh: every row begins at 0, so nothing of the cache needs to be looked at.
    """
    L = tokens_BL.shape[1]
    start_B, slot_R, start_R, used_R = reshard(start_R, 'B'), *(reshard(x, 'R') for x in (slot_R, start_R, used_R))
    causal_LL = jnp.tril(jnp.ones((L, L), bool))
    x_BLD, rope = embed_inputs(weights, tokens_BL, start_B[:, None] + jnp.arange(L)[None], cache)
    longer = []
    for block, cached in zip(weights.blocks, cache, strict=True):

        def attend(q_BLHK, k_BLGK, v_BLGK, cached=cached):
            new = by_rows(k_BLGK), by_rows(v_BLGK)
            seen = [x_RGMK[:, :, :0] if fresh else x_RGMK for x_RGMK in cached]
            out_BLHK = attention_with_cache(q_BLHK, *new, causal_LL, *seen, start_R, slot_R)
            longer.append(tuple(_write(*pair, start_R, used_R, slot_R) for pair in zip(cached, new, strict=True)))
            return out_BLHK

        x_BLD = block(x_BLD, rope, attend)
    return tuple(longer)


def decode(
    weights: Weights, cache: Cache, rows: Rows, steps: jax.Array, quota: jax.Array
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
    """Draws up to CHUNK tokens a row, in one loop on the devices.

    Args:
      weights: of the model.
      cache: of the tokens before; it is read for each token, so the shorter the better.
      rows: where each is.
      steps: int32, at most so many tokens.
      quota: int32; it also ends when so many of the live rows are done.

    Returns:
      The keys and values of CHUNK tokens, for `kept`; tokens [B, CHUNK] int32 and their log-probabilities [B, CHUNK] float32;
      how many of them are the row's [B].
    """

    def unfinished(progress: Progress) -> jax.Array:
        return (progress.column < steps) & (jnp.sum(progress.done_B & rows.live_B) < quota)

    progress = jax.lax.while_loop(
        unfinished, partial(decode_token, weights, cache, rows, uniform(rows)), first_progress(cache, rows)
    )
    return progress.recent, *(replicate(x) for x in (progress.tokens_BL, progress.logprobs_BL, progress.count_B))


@partial(jax.jit, donate_argnums=0)
def kept(cache: Cache, recent: Cache, rows: Rows) -> Cache:
    """The cache, which is used up and has CHUNK places beyond the longest row, with what `decode` has given for such rows."""
    start_R, live_R = reshard(rows.length_B, 'R'), reshard(rows.live_B, 'R')
    return jax.tree.map(lambda x, new: _write(x, new, start_R, live_R), cache, recent)


def compiler_options(device: jax.Device) -> dict[str, str]:
    """For programs that decode on such devices."""
    if device.platform != 'tpu':
        return {}
    # Left alone the compiler gives products with few rows to the vector unit, which is four times slower than the memory.
    options = {'xla_tpu_enable_dot_strength_reduction': 'false'}
    if device.device_kind in ('TPU v5 lite', 'TPU v5e'):  # half of the vector memory for reading weights: a step takes 11 % less
        options['xla_tpu_scoped_vmem_limit_kib'] = '65536'
    return options


@cache
def programs(device: jax.Device) -> tuple[Callable, Callable]:
    """`prefill` and `decode` compiled for such devices: the same ones for every engine of a process."""
    options = compiler_options(device)
    return (
        jax.jit(prefill, static_argnames='fresh', donate_argnums=1, compiler_options=options),
        jax.jit(decode, compiler_options=options),
    )


def first_progress(cache: Cache, rows: Rows) -> Progress:
    """No token drawn yet."""
    drawn_BL = (rows.token_B.shape[0], CHUNK)
    recent = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], CHUNK, x.shape[3]), x.dtype, out_sharding=spec('RGLK')), cache)
    return Progress(
        column=jnp.int32(0),
        token_B=reshard(rows.token_B, 'B'),
        done_B=reshard(~rows.live_B, 'B'),
        count_B=jnp.zeros(drawn_BL[:1], jnp.int32, out_sharding=spec('B')),
        tokens_BL=jnp.zeros(drawn_BL, jnp.int32, out_sharding=spec('BL')),
        logprobs_BL=jnp.zeros(drawn_BL, jnp.float32, out_sharding=spec('BL')),
        recent=recent,
    )


def uniform(rows: Rows) -> jax.Array:
    """Random numbers [B, CHUNK], float32 in [0, 1), each by nothing but its row's seed and sample and the count of tokens."""

    def draw(seed, sample, count):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), count))

    counts_BL = rows.drawn_B[:, None] + jnp.arange(CHUNK)[None]
    return reshard(jax.vmap(jax.vmap(draw, (None, None, 0)))(rows.seed_B, rows.sample_B, counts_BL), 'BL')


def decode_token(weights: Weights, cache: Cache, rows: Rows, uniform_BL: jax.Array, progress: Progress) -> Progress:
    """One token more in each row; `uniform_BL`: the random numbers of all columns."""
    column, length_R = progress.column, reshard(rows.length_B, 'R')
    positions_BL = reshard(rows.length_B, 'B')[:, None] + column
    visible_LL = (jnp.arange(CHUNK) <= column)[None]
    x_BLD, rope = embed_inputs(weights, progress.token_B[:, None], positions_BL, cache)
    recent = []
    for block, cached, before in zip(weights.blocks, cache, progress.recent, strict=True):

        def attend(q_BLHK, k_BLGK, v_BLGK, cached=cached, before=before):
            new = zip(before, (by_rows(k_BLGK), by_rows(v_BLGK)), strict=True)
            recent.append(tuple(jax.lax.dynamic_update_slice_in_dim(old, x, column, axis=2) for old, x in new))
            return attention_with_cache(q_BLHK, *recent[-1], visible_LL, *cached, length_R)

        x_BLD = block(x_BLD, rope, attend)
    x_BLD = rms_norm(x_BLD, weights.norm_D, weights.config.norm_eps)
    logits_BV = linear('BLD,DV->BLV', x_BLD, weights.head_DV)[:, 0].astype(jnp.float32)
    uniform_B = jax.lax.dynamic_index_in_dim(uniform_BL, column, axis=1, keepdims=False)
    token_B, logprob_B = _sample(logits_BV, uniform_B, rows.temperature_B, rows.top_p_B, rows.top_k_B)
    ended_B = jnp.any(token_B[:, None] == reshard(rows.stop_BL, 'BL'), axis=1)
    ended_B |= reshard(rows.drawn_B + column + 1 >= rows.limit_B, 'B')
    return Progress(
        column=column + 1,
        token_B=token_B,
        done_B=progress.done_B | ended_B,
        count_B=progress.count_B + ~progress.done_B,
        tokens_BL=jax.lax.dynamic_update_slice_in_dim(progress.tokens_BL, token_B[:, None], column, axis=1),
        logprobs_BL=jax.lax.dynamic_update_slice_in_dim(progress.logprobs_BL, logprob_B[:, None], column, axis=1),
        recent=tuple(recent),
    )


def embed_inputs(weights: Weights, tokens_BL: jax.Array, positions_BL: jax.Array, cache: Cache) -> tuple[jax.Array, Rope]:
    """Embedded tokens in the compute dtype, and the rotations of their positions."""
    rope = rope_table(positions_BL, weights.config.head_dim, weights.config.rope_theta)
    return embed(weights.table_VD, reshard(tokens_BL, 'BL'), cache[0][0].dtype.name), rope


def by_rows(x_BLGK: jax.Array) -> jax.Array:
    """Keys or values as the cache holds them: [R, G, L, K]."""
    return reshard(x_BLGK, 'RLGK').swapaxes(1, 2)


def _write(x_RGMK, new_RGLK, start_R, used_R, slot_R=None):
    """Puts new keys or values into the cache from `start` on, row by row; rows that are not used stay as they are."""

    def local(x_RGMK, new_RGLK, start_R, used_R, slot_R):
        def put(row, x_RGMK):
            place = (row if slot_R is None else slot_R[row], 0, start_R[row], 0)
            new = new_RGLK[row][None]
            old = jax.lax.dynamic_slice(x_RGMK, place, new.shape)
            return jax.lax.dynamic_update_slice(x_RGMK, jnp.where(used_R[row], new, old), place)

        return jax.lax.fori_loop(0, new_RGLK.shape[0], put, x_RGMK)

    row = spec('R')
    in_specs = (spec('RGMK'), spec('RGLK'), row, row, None if slot_R is None else row)
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec('RGMK'), check_vma=False)(
        x_RGMK, new_RGLK, start_R, used_R, slot_R
    )


def _sample(logits_BV, *settings):
    """`ops.sampling.sample` of logits that are cut by vocabulary: devices trade them, so that each has a share of whole rows."""
    axes = spec('V')[0]
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in axes)

    def local(logits_BV, *settings):
        if logits_BV.shape[0] % devices:  # too few rows to share
            return sample(jax.lax.all_gather(logits_BV, axes, axis=1, tiled=True), *settings)
        logits_BV = jax.lax.all_to_all(logits_BV, axes, split_axis=0, concat_axis=1, tiled=True)
        share = logits_BV.shape[0]
        mine = jax.lax.axis_index(axes) * share
        drawn = sample(logits_BV, *(jax.lax.dynamic_slice_in_dim(x, mine, share) for x in settings))
        return tuple(jax.lax.all_gather(x, axes, tiled=True) for x in drawn)

    in_specs, out_specs = (spec('BV'), *[spec('B')] * len(settings)), (spec('B'),) * 2
    sharded = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return sharded(logits_BV, *(reshard(x, 'B') for x in settings))
