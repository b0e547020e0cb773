"""Continues prompts with a model: a few of the command line, or a file of them.

python experiments/generate.py --model=run/model --prompt='Once upon a time' --max_new_tokens=64 --temperature=0.8 --top_p=0.95
python experiments/generate.py --model=run/model --prompts=prompts.jsonl --output=out.jsonl --num_samples=8 --logprobs
python experiments/generate.py --model=7b --int8 --batch_size=1 --dry_run --topology=v5e:1x1

A line of the prompts is {"prompt": text}, {"messages": [{"role": "user", "content": text}, …]} or {"token_ids": [ids]}, perhaps
with an "id" and settings of its own such as "temperature". A prompt is a user's message if the model chats, as its
config.json, chat template or name says, and otherwise text to continue. A line of the output is
{"id", "samples": [{"text", "token_ids", "stop_reason"}]}.
"""

from absl import flags
from common import compiles_only, tool

from llama2_jax.checkpoints.fingerprint import identity
from llama2_jax.config import UserError
from llama2_jax.files import check_writable
from llama2_jax.inference import plan
from llama2_jax.inference.open import open_engine
from llama2_jax.runtime import log
from llama2_jax.stages import generate
from llama2_jax.text.printable import printable

MODEL = flags.DEFINE_string('model', None, 'Model directory, Hugging Face or Meta directory, or .gguf file.', required=True)
PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be repeated. Empty: a text from its beginning.')
PROMPTS = flags.DEFINE_string('prompts', None, 'A .jsonl file of prompts, or another source of rows.')
OUTPUT = flags.DEFINE_string('output', None, 'With --prompts: the .jsonl file to write; the same command resumes.')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'Maximum new tokens of a prompt.', lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Samples of each prompt.', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 0.6, 'Sampling temperature; 0: the most likely token each time.', lower_bound=0)
TOP_P = flags.DEFINE_float('top_p', 0.9, 'Nucleus sampling: probability mass to sample from.', lower_bound=0, upper_bound=1)
TOP_K = flags.DEFINE_integer('top_k', 0, 'Samples from this many tokens at most; 0: no limit.', lower_bound=0)
SEED = flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0)
STOP = flags.DEFINE_multi_string('stop', [], 'Text that ends a sample; may be repeated.')
CHAT = flags.DEFINE_bool('chat', None, "Prompts are users' messages; by default as the model's config says.")
LOGPROBS = flags.DEFINE_bool('logprobs', False, 'With --prompts: write the log-probability of every new token.')
BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 32, 'Sequences at a time; memory for their caches limits it.', lower_bound=1, upper_bound=2**16
)
INT8 = flags.DEFINE_bool('int8', False, 'Weights in eight bits: half the memory.')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Compile a step only; --model may be a size such as 70b.')
TOPOLOGY = flags.DEFINE_string('topology', None, 'With --dry_run: a TPU slice to compile for, such as v5p:2x2x4.')
LENGTH = flags.DEFINE_integer('length', 4096, 'With --dry_run: tokens in the cache of each sequence.', lower_bound=1)


def run() -> None:
    """Prints the continuations, or writes them to --output."""
    if compiles_only(DRY_RUN.value, TOPOLOGY.value):
        print(printable(plan.dry_run(MODEL.value, TOPOLOGY.value, BATCH_SIZE.value, LENGTH.value, INT8.value)))
        return
    if bool(PROMPTS.value) != bool(OUTPUT.value):
        raise UserError('--prompts and --output belong together: where the prompts are, and where results go.')
    if PROMPTS.value and PROMPT.value:
        raise UserError('--prompt and --prompts exclude each other.')
    if OUTPUT.value:
        check_writable('--output', OUTPUT.value, directory=False)
    names = ('max_new_tokens', 'num_samples', 'temperature', 'top_p', 'top_k', 'seed', 'stop')
    settings = {name: flags.FLAGS[name].value for name in names}
    engine = open_engine(MODEL.value, BATCH_SIZE.value, INT8.value)
    if PROMPTS.value:
        generate.run(engine, PROMPTS.value, OUTPUT.value, settings, identity(MODEL.value, INT8.value), LOGPROBS.value, CHAT.value)
        return
    prompts = PROMPT.value or ['']
    rows = [{'prompt': prompt} for prompt in prompts]
    chat = engine.tokenizer.prompts.chat if CHAT.value is None else CHAT.value
    log(engine.tokenizer.prompts.describe(chat))
    requests = [generate.make_request(row, engine.tokenizer, settings, f'--prompt={row["prompt"]!r}', chat) for row in rows]
    for prompt, request, samples in zip(prompts, requests, engine.generate(requests), strict=True):
        for sample in samples:
            print(printable(f'{prompt}\n{sample.text}' if request.answer else prompt + sample.text), end='\n\n', flush=True)


if __name__ == '__main__':
    tool(run)
