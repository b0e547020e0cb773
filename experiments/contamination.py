"""Finds samples of benchmarks in a training corpus, and says whether a model's scores show it (paper p75-76).

python experiments/contamination.py --corpus='text:corpus/*.txt' --tasks=mmlu,gsm8k --model=run/model --output=contamination

The model is evaluated first (as by evaluate.py; results in OUTPUT/evaluation), then the corpus is read once. The same command
resumes.
"""

from absl import flags
from common import tool

from llama2_jax.config import UserError
from llama2_jax.files import check_writable
from llama2_jax.stages import contamination
from llama2_jax.stages.evaluate import EvaluateConfig

MODEL = flags.DEFINE_string('model', None, 'Model directory, Hugging Face or Meta directory, or .gguf file.')
CORPUS = flags.DEFINE_string('corpus', None, 'Sources of the training documents, separated by commas.')
TASKS = flags.DEFINE_list('tasks', [], 'Names of tasks and groups, separated by commas; a wrong one lists them.')
DATA_DIR = flags.DEFINE_string('data_dir', 'benchmarks_data', 'Folder of benchmarks, in their published formats.')
OUTPUT = flags.DEFINE_string('output', None, 'Folder to write; the same command resumes.')
LIMIT = flags.DEFINE_integer('limit', 0, 'Examples of each task, spread over it; 0: all.', lower_bound=0)
RUN_GENERATED_CODE = flags.DEFINE_bool('run_generated_code', False, 'Run programs that the model writes, in a sandbox.')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Sequences at a time.', lower_bound=1, upper_bound=2**16)


def run() -> None:
    """The analysis."""
    if not (MODEL.value and CORPUS.value and TASKS.value and OUTPUT.value):
        raise UserError('Give --model=DIR, --corpus=SOURCE, --tasks=mmlu,… and --output=DIR.')
    check_writable('--output', OUTPUT.value, directory=True)
    config = EvaluateConfig(
        model=MODEL.value, tasks=tuple(TASKS.value), data_dir=DATA_DIR.value, output=OUTPUT.value, limit=LIMIT.value,
        run_generated_code=RUN_GENERATED_CODE.value, batch_size=BATCH_SIZE.value,
    )  # fmt: skip
    contamination.run(config, CORPUS.value)


if __name__ == '__main__':
    tool(run)
