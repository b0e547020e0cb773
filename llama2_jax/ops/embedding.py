"""Token embedding: a gather forward, a scatter-add backward that sums in float32."""

from functools import partial

import jax
import jax.numpy as jnp

from llama2_jax.mesh import parameter_spec, spec


def embed(table_VD: jax.Array, tokens_BL: jax.Array, dtype: str) -> jax.Array:
    """Rows of the table at rest, [B, L, D] in `dtype`."""
    return _embed(table_VD, tokens_BL, dtype, table_VD.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table_VD, tokens_BL, dtype, vocabulary):
    local = partial(_lookup, dtype=dtype)
    table_spec = parameter_spec('table_VD')
    if table_spec is None:
        return local(table_VD, tokens_BL, vocabulary_axes=None, axes=None)
    local = partial(local, vocabulary_axes=table_spec[0], axes=table_spec[1])
    return jax.shard_map(local, in_specs=(table_spec, spec('BL')), out_specs=spec('BLD'), check_vma=False)(table_VD, tokens_BL)


def _forward(table_VD, tokens_BL, dtype, vocabulary):
    return _embed(table_VD, tokens_BL, dtype, vocabulary), tokens_BL


def _backward(dtype, vocabulary, tokens_BL, dx_BLD):
    table_spec = parameter_spec('table_VD')
    if table_spec is None:
        return _scatter(tokens_BL, dx_BLD, rows=vocabulary, vocabulary_axes=None, axes=None), None
    rows = vocabulary // jax.sharding.get_abstract_mesh().shape['tensor']
    local = partial(_scatter, rows=rows, vocabulary_axes=table_spec[0], axes=table_spec[1])
    sharded = jax.shard_map(local, in_specs=(spec('BL'), spec('BLD')), out_specs=table_spec, check_vma=False)
    return sharded(tokens_BL, dx_BLD), None


_embed.defvjp(_forward, _backward)


def _local_rows(tokens_BL, rows, axes):
    """Row numbers in this shard of the vocabulary, which `axes` cut; rows of other shards become `rows`, one past the end."""
    local = tokens_BL - (jax.lax.axis_index(axes) * rows if axes else 0)
    return jnp.where((local >= 0) & (local < rows), local, rows)


def _lookup(table_VD, tokens_BL, *, dtype, vocabulary_axes, axes):
    table_VD = table_VD.astype(dtype)
    if axes:
        table_VD = jax.lax.all_gather(table_VD, axes, axis=1, tiled=True)
    x_BLD = table_VD.at[_local_rows(tokens_BL, table_VD.shape[0], vocabulary_axes)].get(mode='fill', fill_value=0)
    return jax.lax.psum(x_BLD, vocabulary_axes) if vocabulary_axes else x_BLD


def _scatter(tokens_BL, dx_BLD, *, rows, vocabulary_axes, axes):
    ids_BL = _local_rows(tokens_BL, rows, vocabulary_axes)
    gradient_VD = jnp.zeros((rows, dx_BLD.shape[-1]), jnp.float32).at[ids_BL].add(dx_BLD.astype(jnp.float32), mode='drop')
    if not axes:
        return gradient_VD
    gradient_VD = jax.lax.psum(gradient_VD.astype(dx_BLD.dtype), 'replica')
    return jax.lax.psum_scatter(gradient_VD, axes, scatter_dimension=1, tiled=True).astype(jnp.float32)
