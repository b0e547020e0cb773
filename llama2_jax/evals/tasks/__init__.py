"""Every task by its name, and the paper's groups of them (Table 3)."""

from collections.abc import Iterable

from llama2_jax.config import UserError, nearest
from llama2_jax.evals.task import Task
from llama2_jax.evals.tasks import code, commonsense, exams, mathematics, mmlu, questions, safety
from llama2_jax.toy import task

FAMILIES = (mmlu, mathematics, code, commonsense, questions, exams, safety, task)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}
PAPER: dict[str, tuple[str, ...]] = {  # Table 3; groups of several are means
    'code': ('humaneval', 'mbpp'),
    'commonsense': ('piqa', 'siqa', 'hellaswag', 'winogrande', 'arc_easy', 'arc_challenge', 'openbookqa', 'commonsenseqa'),
    'world': ('naturalquestions', 'triviaqa'),
    'reading': ('squad', 'quac', 'boolq'),
    'math': ('gsm8k', 'math'),
    'mmlu': ('mmlu',),
    'bbh': ('bbh',),
    'agieval': ('agieval',),
}
SAFETY = ('truthfulqa', 'truthfulqa_mc', 'toxigen', 'bold', 'xstest', 'borderline', 'advbench')
GROUPS: dict[str, tuple[str, ...]] = {
    **PAPER,
    'safety': (*SAFETY, 'toy_attacks', 'toy_borderline'),
    'paper': (*(name for members in PAPER.values() for name in members), *SAFETY),
}


def expand(names: Iterable[str]) -> list[str]:
    """The tasks that names of tasks and groups stand for, each once.

    Raises:
      UserError: no such task or group.
    """
    found: dict[str, None] = {}
    for name in names:
        if name in TASKS:
            found[name] = None
        elif name in GROUPS:
            found |= dict.fromkeys(GROUPS[name])
        else:
            raise UserError(f'--tasks: there is no task {name!r}; {nearest(name, [*TASKS, *GROUPS])}')
    return list(found)
