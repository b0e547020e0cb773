"""Measures models.

python experiments/evaluate.py --reward_model=rm-help/model --preferences='jsonl:hh-rlhf/*.gz' --output=judged
python experiments/evaluate.py --reward_model=rm-help/model --score=in.jsonl --output=out.jsonl

--preferences takes sources of comparisons, separated by commas, and --reward_model may be repeated: each model is judged on each
source. --score takes dialogs that end with an answer; a line of its output is {"id", "score", "probability"}.
"""

from absl import flags
from common import tool

from llama2_jax.config import UserError
from llama2_jax.stages import score

REWARD_MODEL = flags.DEFINE_multi_string('reward_model', [], 'Model directory of a reward model; may be repeated.')
PREFERENCES = flags.DEFINE_list('preferences', [], 'Sources of comparisons, such as toy:preferences_heldout.')
SCORE = flags.DEFINE_string('score', None, 'A .jsonl file of dialogs, or another source of them, to score.')
OUTPUT = flags.DEFINE_string('output', None, 'With --score the .jsonl file to write, else a directory for figures and plots.')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Sequences at a time.', lower_bound=1)


def run() -> None:
    """One of the measures."""
    if not REWARD_MODEL.value or bool(PREFERENCES.value) == bool(SCORE.value):
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
