"""One table between our parameters and those of `transformers.LlamaForCausalLM`, for tests.

Both sides spell axes in letters, so a parameter is transposed by letters: ours follow its name's suffix, theirs stand here.
"""

from functools import partial

import jax
import numpy as np

from llama2_jax.config import ModelConfig
from llama2_jax.mesh import parameter_letters, parameter_name
from llama2_jax.model.llama import Llama

# Our name without its letters -> their name, their letters (torch's Linear holds [out, in]).
OUTSIDE = {
    'table': ('model.embed_tokens.weight', 'VD'),
    'norm': ('model.norm.weight', 'D'),
    'head': ('lm_head.weight', 'VD'),
}
INSIDE = {
    'attention_norm': ('model.layers.{}.input_layernorm.weight', 'D'),
    'w_q': ('model.layers.{}.self_attn.q_proj.weight', 'HKD'),
    'w_k': ('model.layers.{}.self_attn.k_proj.weight', 'GKD'),
    'w_v': ('model.layers.{}.self_attn.v_proj.weight', 'GKD'),
    'w_o': ('model.layers.{}.self_attn.o_proj.weight', 'DHK'),
    'ffn_norm': ('model.layers.{}.post_attention_layernorm.weight', 'D'),
    'w_gate': ('model.layers.{}.mlp.gate_proj.weight', 'FD'),
    'w_up': ('model.layers.{}.mlp.up_proj.weight', 'FD'),
    'w_down': ('model.layers.{}.mlp.down_proj.weight', 'DF'),
}


def _entry(path):
    """Their name, their letters and our letters of the parameter at a path of our tree."""
    name = parameter_name(path)
    letters = parameter_letters(name)
    table = INSIDE if any(getattr(key, 'name', None) == 'blocks' for key in path) else OUTSIDE
    theirs, their_letters = table[name.removesuffix('_' + letters)]
    assert sorted(letters) == sorted(their_letters), name
    return theirs, their_letters, letters


def _matrix(array, letters, their_letters):
    """Transposed to their letters, and the axes of heads flattened, as they store it."""
    array = np.asarray(array).transpose([letters.index(letter) for letter in their_letters])
    return array if array.ndim == 1 else array.reshape(_matrix_shape(array.shape, their_letters))


def _matrix_shape(shape, their_letters):
    sizes = dict(zip(their_letters, shape, strict=True))
    sizes['K'] = sizes.get('K', 1)
    rows = [sizes[letter] for letter in their_letters if letter not in 'HGK']
    return [rows[0], -1] if their_letters[0] not in 'HG' else [-1, rows[0]]


def to_theirs(tree: Llama) -> dict[str, np.ndarray]:
    """Parameters, or gradients in their place, by their names."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        theirs, their_letters, letters = _entry(path)
        stacked = '{}' in theirs
        for layer, array in enumerate(leaf if stacked else [leaf]):
            out[theirs.format(layer)] = _matrix(array, letters, their_letters)
    return out


def from_theirs(config: ModelConfig, weights: dict[str, np.ndarray]) -> Llama:
    """A model with their weights; where `lm_head.weight` is missing, the head is the embedding."""
    weights = {'lm_head.weight': weights['model.embed_tokens.weight'], **weights}

    def leaf(path, shape):
        theirs, their_letters, letters = _entry(path)
        sizes = dict(zip(letters, shape.shape[-len(letters) :], strict=True))

        def one(array):
            array = np.asarray(array, np.float32).reshape([sizes[letter] for letter in their_letters])
            return array.transpose([their_letters.index(letter) for letter in letters])

        if '{}' not in theirs:
            return jax.numpy.asarray(one(weights[theirs]))
        return jax.numpy.stack([one(weights[theirs.format(layer)]) for layer in range(config.layers)])

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(partial(Llama, config), jax.random.key(0)))


def random_pair(config: ModelConfig, seed: int = 0):
    """The same random weights as our model and as theirs; norm scales are random too, or nothing would see them swapped."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    ours = jax.tree.map(
        lambda leaf: leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), Llama(config, jax.random.key(seed))
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            attn_implementation='eager',
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    theirs.load_state_dict({name: torch.tensor(array) for name, array in to_theirs(ours).items()})
    return ours, theirs.eval()
