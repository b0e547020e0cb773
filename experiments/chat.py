"""Talks with a chat model: answers stream, turns are remembered, and /help lists the commands.

python experiments/chat.py --model=sft/model
python experiments/chat.py --model=Llama-2-7b-chat-hf --int8 --system='Answer in one sentence.' --temperature=0.6 --top_p=0.9
"""

from absl import flags
from common import tool

from llama2_jax.inference.open import open_engine
from llama2_jax.runtime import log
from llama2_jax.stages import chat

MODEL = flags.DEFINE_string('model', None, 'Model directory, Hugging Face or Meta directory, or .gguf file.', required=True)
SYSTEM = flags.DEFINE_string('system', '', 'System message.')
TEMPERATURE = flags.DEFINE_float('temperature', 0.6, 'Sampling temperature; 0: the most likely token each time.', lower_bound=0)
TOP_P = flags.DEFINE_float('top_p', 0.9, 'Nucleus sampling: probability mass to sample from.', lower_bound=0, upper_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 512, 'Maximum tokens of an answer.', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0)
INT8 = flags.DEFINE_bool('int8', False, 'Weights in eight bits: half the memory.')


def run() -> None:
    """Converses until the input ends."""
    settings = {name: flags.FLAGS[name].value for name in ('temperature', 'top_p', 'max_new_tokens', 'seed')}
    engine = open_engine(MODEL.value, batch_size=1, int8=INT8.value)
    log(engine.tokenizer.prompts.describe(chat=True))
    if not engine.tokenizer.prompts.chat:
        log(f'Warning: nothing says that {MODEL.value} was trained to chat; its answers may not end.')
    chat.converse(chat.Chat(engine, SYSTEM.value, **settings))


if __name__ == '__main__':
    tool(run)
