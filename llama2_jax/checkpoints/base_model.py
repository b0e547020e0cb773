"""The model that adapters are trained beside: as it is, or in eight bits where a chip is too small for it."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from llama2_jax.checkpoints.load import load_model
from llama2_jax.mesh import MeshConfig, make_mesh
from llama2_jax.model.llama import Llama
from llama2_jax.model.lora import Adapters, LoraConfig, merge, to_int8


def load_base_model(path: str, lora: LoraConfig, dtype: str, context: int, mesh: Mesh) -> Llama:
    """The model on the mesh that is set; it is rounded on the host, and only the result moves."""
    if not lora.int8:
        return load_model(path, dtype, context)[0]
    with jax.set_mesh(_host_mesh()):
        rounded = to_int8(load_model(path, dtype, context)[0])
    return _moved(rounded, mesh)


def merge_on_host(path: str, adapters: Adapters, lora: LoraConfig, dtype: str, context: int) -> Llama:
    """The model as it was before it was rounded, with the adapters in it."""
    host = _host_mesh()
    with jax.set_mesh(host):
        return merge(load_model(path, dtype, context)[0], _moved(adapters, host), lora)


def _host_mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices('cpu')[:1])


def _moved(tree: Any, mesh: Mesh) -> Any:
    """The arrays on another mesh with the same axes."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), tree)
