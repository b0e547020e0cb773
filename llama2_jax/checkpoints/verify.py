"""What was written for PyTorch, read by PyTorch: does transformers compute what we do?"""

from pathlib import Path

import jax
import numpy as np

from llama2_jax.checkpoints.formats.torchfile import import_torch
from llama2_jax.checkpoints.load import load_model, load_score_model
from llama2_jax.checkpoints.source import Source
from llama2_jax.config import UserError

TOKENS = 64


def against_transformers(source: Source, exported: str | Path) -> float:
    """The largest difference of logits, or of scores of a reward model, float32, over TOKENS random tokens.

    Args:
      source: the model as we read it.
      exported: the Hugging Face directory that was written of it; transformers loads it.

    Raises:
      UserError: PyTorch or transformers is not installed.
    """
    torch = import_torch()
    try:
        import transformers
    except ImportError:
        raise UserError("--verify needs transformers: pip install -e '.[torch]'.") from None
    size = min(TOKENS, source.config.context)
    tokens = np.random.default_rng(0).integers(source.config.vocab_size, size=(1, size)).astype(np.int32)
    is_language_model = source.head == 'head_DV'
    kind = transformers.AutoModelForCausalLM if is_language_model else transformers.AutoModelForSequenceClassification
    theirs = kind.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    found = found[..., : source.config.vocab_size]  # without the rows that pad the vocabulary
    if is_language_model:
        model, _ = load_model(source.path, 'float32')
        ours = jax.jit(lambda model: model.logits(model(tokens)))(model)
    else:
        model, _ = load_score_model(source.path, 'float32')
        ours = jax.jit(lambda model: model(tokens)[:, -1:])(model)
    return float(np.abs(np.asarray(ours) - found).max())
