"""Attacks versions of a model, and says how often it gives in: violations, gamma, what was fixed, and where it is weakest.

python experiments/red_team.py --model=ppo/model --safety=rm-safe/model --workdir=red
python experiments/red_team.py --model=sft/model --model=ppo/model --safety=rm-safe/model --export --workdir=red
python experiments/red_team.py --model=llama2-7b-chat --prompts='jsonl:a/*.jsonl' --judge=reward_model:rm/model --workdir=red7b

The store of prompts has rows {"prompt" or "messages", "category", "style", "language"}; the last three are optional. Simulated
attackers rewrite the prompts in seven styles. --export writes the failures as prompts and preference pairs to train on.
"""

from absl import flags
from common import tool

from llama2_jax.config import UserError
from llama2_jax.files import check_writable
from llama2_jax.safety import red_team
from llama2_jax.safety.red_team import RedTeamConfig

MODEL = flags.DEFINE_multi_string('model', [], 'Target, of any format; repeat it for later versions, the oldest first.')
SAFETY = flags.DEFINE_string('safety', '', 'Safety reward model that guides the attackers; without it the judge does.')
PROMPTS = flags.DEFINE_string('prompts', 'toy:attacks', 'Source of the store of prompts.')
JUDGE = flags.DEFINE_string('judge', 'oracle', 'oracle (toy world), reward_model:DIR or model:DIR.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; the same command resumes in it.')
ATTACKERS = flags.DEFINE_integer('attackers', 8, 'Simulated people.')
HOURS = flags.DEFINE_integer('hours', 1, 'Hours that each works on each version.')
TRIES = flags.DEFINE_integer('tries', 30, 'Prompts that one sends in an hour.')
COUNT = flags.DEFINE_integer('count', 0, 'Prompts of the store, evenly spread; 0: all.')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 96, 'Maximum tokens of an answer.')
TEMPERATURE = flags.DEFINE_float('temperature', 0.1, "Temperature of the answers; 0.1 is that of the paper's safety evaluation.")
EXPORT = flags.DEFINE_bool('export', False, 'Write the failures of the last version to WORKDIR/export.')
SEED = flags.DEFINE_integer('seed', 0, 'Random seed.')


def run() -> None:
    """The attack."""
    if not MODEL.value or not WORKDIR.value:
        raise UserError('Give --model=DIR, once for each version, and --workdir=DIR.')
    check_writable('--workdir', WORKDIR.value, directory=True)
    names = (
        'safety',
        'prompts',
        'judge',
        'attackers',
        'hours',
        'tries',
        'count',
        'max_new_tokens',
        'temperature',
        'export',
        'seed',
    )
    settings = {name: flags.FLAGS[name].value for name in names}
    red_team.run(RedTeamConfig(models=tuple(MODEL.value), **settings), WORKDIR.value)


if __name__ == '__main__':
    tool(run)
