"""What a run is made from, for `runtime.workdir.record_inputs`: option and path or source -> fingerprint of the content."""

from collections.abc import Iterable, Mapping

from llama2_jax.checkpoints.fingerprint import fingerprint
from llama2_jax.data import sources
from llama2_jax.data.mixing import parse_mixture


def of_models(models: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints of the models that the options name; an option may name none."""
    return {f'{option}={model}': fingerprint(model) for option, model in models.items() if model}


def of_mixture(option: str, mixture: str) -> dict[str, str]:
    """Fingerprints of the rows of a mixture's sources."""
    return of_sources(option, (component.source for component in parse_mixture(mixture)))


def of_tuning(init_from: str, mixture: str) -> dict[str, str]:
    """Fingerprints of the inputs of fine-tuning: the model and the rows."""
    return of_models({'init_from': init_from}) | of_mixture('data.mixture', mixture)


def of_sources(option: str, names: Iterable[str]) -> dict[str, str]:
    """Fingerprints of the rows of sources; '' is none."""
    return {f'{option}={source}': sources.fingerprint(source) for source in names if source}
