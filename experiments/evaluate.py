"""Measures models: the paper's benchmarks beside the paper's figures, one model against another, or reward models.

python experiments/evaluate.py --model=run/model --tasks=mmlu,gsm8k --data_dir=benchmarks_data --output=eval
python experiments/evaluate.py --model=run/model --tasks=code --run_generated_code --data_dir=benchmarks_data --output=eval
python experiments/evaluate.py --model=run/model --tasks=paper --limit=100 --data_dir=benchmarks_data --output=eval
python experiments/evaluate.py --model=A --versus=B --prompts=jsonl:prompts.jsonl --judge=reward_model:rm-help/model --output=eval
python experiments/evaluate.py --reward_model=rm-help/model --preferences='jsonl:hh-rlhf/*.gz' --output=judged
python experiments/evaluate.py --reward_model=rm-help/model --score=in.jsonl --output=out.jsonl

A missing benchmark is skipped with a download hint; the same command resumes. Judges are reward_model:DIR,
model:DIR (a chat model that says which answer is better) and toy (the toy world's oracle). --preferences takes sources of
comparisons, separated by commas, and --reward_model may be repeated: each model is judged on each source. --score takes dialogs
that end with an answer; a line of its output is {"id", "score", "probability"}.
"""

from absl import flags
from common import tool

from llama2_jax.config import UserError
from llama2_jax.files import check_writable
from llama2_jax.stages import evaluate, pairwise, score

MODEL = flags.DEFINE_string('model', None, 'Model directory, Hugging Face or Meta directory, or .gguf file.')
TASKS = flags.DEFINE_list('tasks', [], 'Names of tasks and groups, separated by commas; a wrong one lists them.')
DATA_DIR = flags.DEFINE_string('data_dir', 'benchmarks_data', 'Folder of benchmarks, in their published formats.')
TFDS = flags.DEFINE_bool('tfds', False, 'Read missing sets through TensorFlow Datasets, which downloads them.')
OUTPUT = flags.DEFINE_string('output', None, 'Folder to write, or file with --score; the same command resumes.')
LIMIT = flags.DEFINE_integer('limit', 0, 'Examples of each task, spread over it; 0: all.', lower_bound=0)
SHOTS = flags.DEFINE_integer('shots', None, "Solved examples in a prompt; the paper's number by default.", lower_bound=0)
SAMPLES = flags.DEFINE_integer('samples', None, 'Samples of a question, for pass@k and maj@k.', lower_bound=1)
CHAT = flags.DEFINE_bool('chat', None, "Use the chat format; by default as the model's config says.")
RUN_GENERATED_CODE = flags.DEFINE_bool('run_generated_code', False, 'Run programs that the model writes, in a sandbox.')
TOXICITY = flags.DEFINE_string('toxicity', '', 'Directory of a toxicity classifier, for ToxiGen.')
TRUTH_JUDGE = flags.DEFINE_string('truth_judge', '', 'Model that judges whether answers to TruthfulQA are true.')
INFO_JUDGE = flags.DEFINE_string('info_judge', '', 'Model that judges whether answers to TruthfulQA are informative.')
SAFETY_JUDGE = flags.DEFINE_string(
    'safety_judge', '', 'Safety reward model that judges violations instead of the refusal classifier.'
)
VERSUS = flags.DEFINE_string('versus', None, 'A model to compare with, on --prompts, as --judge sees it.')
PROMPTS = flags.DEFINE_string('prompts', None, 'With --versus: a source of rows {"prompt": text} or {"messages": [...]}.')
JUDGE = flags.DEFINE_string('judge', None, 'With --versus: reward_model:DIR, model:DIR or toy.')
TEMPERATURE = flags.DEFINE_float('temperature', 0.6, 'With --versus: sampling temperature of the answers.', lower_bound=0)
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 1000, 'With --versus: maximum tokens of an answer.', lower_bound=1)
REWARD_MODEL = flags.DEFINE_multi_string('reward_model', [], 'Model directory of a reward model; may be repeated.')
PREFERENCES = flags.DEFINE_list('preferences', [], 'Sources of comparisons, such as toy:preferences_heldout.')
SCORE = flags.DEFINE_string('score', None, 'A .jsonl file of dialogs, or another source of them, to score.')
BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 32, 'Sequences at a time; no result depends on it.', lower_bound=1, upper_bound=2**16
)
INT8 = flags.DEFINE_bool('int8', False, 'Weights in eight bits: half the memory.')
SEED = flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0)


def given(*names: str) -> dict:
    """Flags of these names."""
    return {name: flags.FLAGS[name].value for name in names}


def run() -> None:
    """One of the measures."""
    if OUTPUT.value:
        check_writable('--output', OUTPUT.value, directory=not SCORE.value)
    if REWARD_MODEL.value:
        judge_reward_models()
        return
    if not MODEL.value or not OUTPUT.value or bool(TASKS.value) == bool(VERSUS.value):
        raise UserError('Give --model=DIR, --output=DIR and either --tasks=mmlu,… or --versus=DIR; or --reward_model=DIR.')
    common = given('model', 'output', 'limit', 'batch_size', 'int8', 'seed')
    if VERSUS.value:
        if not PROMPTS.value or not JUDGE.value:
            raise UserError('--versus needs --prompts=SOURCE and --judge=reward_model:DIR, model:DIR or toy.')
        pairwise.run(
            pairwise.PairwiseConfig(**common, **given('versus', 'prompts', 'judge', 'temperature', 'max_new_tokens', 'chat'))
        )
        return
    settings = given('data_dir', 'tfds', 'shots', 'samples', 'chat', 'run_generated_code')
    judges = given('toxicity', 'truth_judge', 'info_judge', 'safety_judge')
    evaluate.run(evaluate.EvaluateConfig(tasks=tuple(TASKS.value), **common, **settings, **judges))


def judge_reward_models() -> None:
    """On comparisons, or scores of a file."""
    if bool(PREFERENCES.value) == bool(SCORE.value):
        raise UserError('Give --reward_model and either --preferences or --score.')
    if PREFERENCES.value:
        sources = [source.strip() for source in PREFERENCES.value]
        score.evaluate(REWARD_MODEL.value, sources, OUTPUT.value, BATCH_SIZE.value)
        return
    if len(REWARD_MODEL.value) > 1 or not OUTPUT.value:
        raise UserError('--score takes one --reward_model, and --output=FILE.jsonl to write to.')
    score.score_file(REWARD_MODEL.value[0], SCORE.value, OUTPUT.value, BATCH_SIZE.value)


if __name__ == '__main__':
    tool(run)
