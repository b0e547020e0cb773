"""The whole LLaMA 2 recipe in JAX. What scripts and notebooks use most is here, and is imported when it is first used."""

import importlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama2_jax.checkpoints.load import load_model
    from llama2_jax.inference.engine import Engine, Request
    from llama2_jax.inference.open import open_engine, open_scorer
    from llama2_jax.inference.scorer import Scorer

try:
    __version__ = _version('llama2_jax')
except PackageNotFoundError:  # a clone that is not installed
    __version__ = 'unknown'

_HOMES = {
    'load_model': 'checkpoints.load',
    'Engine': 'inference.engine',
    'Request': 'inference.engine',
    'open_engine': 'inference.open',
    'open_scorer': 'inference.open',
    'Scorer': 'inference.scorer',
}
__all__ = ['Engine', 'Request', 'Scorer', '__version__', 'load_model', 'open_engine', 'open_scorer']


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'llama2_jax.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
    return __all__
