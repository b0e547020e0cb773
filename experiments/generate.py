"""Continues prompts with a model.

python experiments/generate.py --model=run/model --prompt='Once upon a time' --max_new_tokens=64 --temperature=0.8 --top_p=0.95
"""

import jax
from absl import flags
from common import tool

from llama2_jax.convert.load import load_model
from llama2_jax.mesh import MeshConfig, set_mesh
from llama2_jax.model.generate import generate
from llama2_jax.model.llama import Compute

MODEL = flags.DEFINE_string('model', None, 'Model directory.', required=True)
PROMPT = flags.DEFINE_multi_string('prompt', [''], 'Text to continue; may be repeated. Without it a text from its beginning.')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 64, 'At most so many new tokens a prompt.', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 0.6, '0 takes the most likely token each time.', lower_bound=0)
TOP_P = flags.DEFINE_float('top_p', 0.9, 'Share of the probability to draw from.', lower_bound=0, upper_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')


def run() -> None:
    """Prints each prompt with its continuation."""
    set_mesh(MeshConfig())
    model, tokenizer = load_model(MODEL.value)
    prompts = [tokenizer.encode(prompt, bos=True, eos=False) or [tokenizer.bos_id] for prompt in PROMPT.value]
    settings = {'temperature': TEMPERATURE.value, 'top_p': TOP_P.value, 'seed': SEED.value}
    dtype = Compute().on(jax.default_backend()).dtype
    rows = generate(model, prompts, MAX_NEW_TOKENS.value, eos_id=tokenizer.eos_id, dtype=dtype, **settings)
    for prompt, row in zip(prompts, rows, strict=True):
        print(tokenizer.decode(prompt + row), end='\n\n')


if __name__ == '__main__':
    tool(run)
