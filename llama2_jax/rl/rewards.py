"""What answers are worth: one or two reward models, a function, or both; their numbers become one score (paper p15; recipe F.3).

A reward function is Python: `file.py:name`, called as `name(prompts, answers, rows)` with a list of each (the messages of the
prompt, the text of the answer, the other fields of the prompt's row), returns a number for each answer. `FUNCTIONS` has the
verifiable ones.
"""

import dataclasses
import hashlib
import importlib.util
import json
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from llama2_jax import made_from
from llama2_jax.config import Config, RewardModel, UserError, between, nearest, reason, resumable, shown
from llama2_jax.data.prompts import Prompt
from llama2_jax.evals.answers import extract_number
from llama2_jax.evals.judges import run_programs
from llama2_jax.evals.task import Example
from llama2_jax.evals.tasks.code import humaneval_program
from llama2_jax.inference.engine import Sample
from llama2_jax.inference.open import open_scorer
from llama2_jax.ops.returns import gate
from llama2_jax.rl.rollout import Rollout
from llama2_jax.runtime import is_main_process
from llama2_jax.runtime.hosts import gather
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.toy.answers import verdict
from llama2_jax.toy.oracle import Oracle

Messages = Sequence[Mapping[str, str]]
Function = Callable[[Sequence[Messages], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class RewardsConfig(Config):
    """Where scores come from: at least one of helpfulness, safety and function (paper p15; recipe F.3).

    Attributes:
      helpfulness, safety: Reward models. One alone is the score; of two, the gate says which one counts.
      function: `file.py:name`, or a name of `FUNCTIONS`; beside reward models its value is added to their score.
      function_seconds: Time that a call of the function may take, for `batch_size` answers.
      run_generated_code: Allows a function that runs programs of the policy, in the sandbox.
      threshold: Safety decides below this sigmoid of its score.
      missing_eos_penalty: Taken from the score of an answer that was cut off for its length; the paper has nothing of it.
      batch_size: Answers that are scored at a time.
    """

    helpfulness: RewardModel = ''
    safety: RewardModel = ''
    function: str = ''
    function_seconds: float = between(600.0, 1e-3, resumable='anywhere')
    run_generated_code: bool = resumable(False)
    threshold: float = between(0.15, 1e-6, 1 - 1e-6)
    missing_eos_penalty: float = 1.0
    batch_size: int = between(64, 1, resumable='anywhere')

    @property
    def models(self) -> dict[str, str]:
        """The reward models that are given, by option."""
        named = {'rewards.helpfulness': self.helpfulness, 'rewards.safety': self.safety}
        return {option: model for option, model in named.items() if model}

    @property
    def are_given(self) -> bool:
        """Whether anything is named that scores."""
        return bool(self.models or self.function)


def check(config: RewardsConfig) -> None:
    """Raises a UserError where nothing scores, or the function cannot be had."""
    if not config.are_given:
        raise UserError(
            'rewards.helpfulness is missing, and so are rewards.safety and rewards.function: give at least one of them, such as '
            '--set rewards.helpfulness=DIR or --set rewards.function=file.py:name.'
        )
    open_function(config)


def made_of(config: RewardsConfig) -> dict[str, str]:
    """Fingerprints of the models and of the function's file, for `record_inputs`."""
    found = made_from.of_models(config.models)
    file = config.function.rpartition(':')[0]
    if file:
        found[f'rewards.function={config.function}'] = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
    return found


class Scores(Protocol):
    """`inference.scorer.Scorer`, or something that stands in for one."""

    tokenizer: Tokenizer

    def score(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """A number for each row of token ids."""


class Rewards:
    """All that scores, together.

    Args:
      helpfulness, safety: Reward models or None; they score the very ids that the policy read and drew.
      config: How their scores become one.
      tokenizer: The policy's.
      function: A reward function or None.

    Raises:
      UserError: A model has another tokenizer than the policy.
    """

    def __init__(
        self,
        helpfulness: Scores | None,
        safety: Scores | None,
        config: RewardsConfig,
        tokenizer: Tokenizer,
        function: Function | None = None,
    ):
        self._models, self._config, self._function = (helpfulness, safety), config, function
        for name, model in (('helpfulness', helpfulness), ('safety', safety)):
            if model and model.tokenizer.model != tokenizer.model:
                raise UserError(f'rewards.{name}={getattr(config, name)} has another tokenizer than the policy.')

    def __call__(self, answers: Iterable[tuple[Prompt, Sample | Rollout]]) -> list[Rollout]:
        """Scores the answers."""
        answers = list(answers)
        rows = [[*prompt.token_ids, *sample.token_ids] for prompt, sample in answers]
        helpfulness, safety = (np.asarray(model.score(rows), np.float32) if model else None for model in self._models)
        function = np.asarray(self._call(self._function, answers), np.float32) if self._function else None
        if helpfulness is not None and safety is not None:
            tags = np.array([prompt.is_safety for prompt, _ in answers], bool)
            score, gated = (np.asarray(x) for x in gate(*map(jnp.asarray, (helpfulness, safety, tags)), self._config.threshold))
        else:
            [score] = [x for x in (helpfulness, safety) if x is not None] or [np.zeros(len(answers), np.float32)]
            gated = np.full(len(answers), safety is not None)
        cut = np.array([sample.stop_reason == 'length' for _, sample in answers])
        score = score + (0 if function is None else function) - np.float32(self._config.missing_eos_penalty) * cut
        columns = (
            [None] * len(answers) if column is None else column.tolist()
            for column in (helpfulness, safety, gated, score, function)
        )  # fmt: skip
        return [
            Rollout(prompt, sample.text, sample.token_ids, sample.logprobs, sample.stop_reason, *scores)
            for (prompt, sample), *scores in zip(answers, *columns, strict=True)
        ]

    def _call(self, function: Function, answers: Sequence[tuple[Prompt, Sample | Rollout]]) -> list[float]:
        """The function's numbers, computed by the main process for all: it may be slow, or not the same everywhere."""
        found: dict[str, Any] = {'scores': []}
        if is_main_process():
            try:
                for start in range(0, len(answers), self._config.batch_size):
                    found['scores'] += call(function, answers[start : start + self._config.batch_size], self._config)
            except UserError as error:
                found = {'error': str(error)}
        found = json.loads(gather(json.dumps(found))[0])
        if 'error' in found:
            raise UserError(found['error'])
        return found['scores']


def call(function: Function, answers: Sequence[tuple[Prompt, Sample | Rollout]], config: RewardsConfig) -> list[float]:
    """What a reward function says of answers.

    Raises:
      UserError: It raises an error, takes too long, or does not return a finite number for each answer.
    """
    label, outcome = f'rewards.function={config.function}', []
    prompts = [prompt.messages for prompt, _ in answers]
    texts = [sample.text.strip() for _, sample in answers]
    rows = [prompt.row for prompt, _ in answers]

    def work() -> None:
        try:
            outcome.append(function(prompts, texts, rows))
        except BaseException as error:  # also a SystemExit
            outcome.append(error)

    # In a thread of its own, as Python cannot end a call; a daemon, so that it does not hold up the end of the program.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(config.function_seconds)
    if not outcome:
        raise UserError(
            f'{label} has not returned within {config.function_seconds:g} s for {len(answers)} answers: make it faster, or set '
            'rewards.function_seconds or rewards.batch_size.'
        )
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    if isinstance(outcome[0], BaseException):
        frame = traceback.extract_tb(outcome[0].__traceback__)[-1]
        place = f'{Path(frame.filename).name}:{frame.lineno}'
        raise UserError(f'{label} raised {type(outcome[0]).__name__} at {place}: {reason(outcome[0])}.')
    try:
        scores = np.asarray(outcome[0], np.float64)
    except (TypeError, ValueError):
        raise UserError(f'{label} returned {shown(outcome[0])}, not a list of numbers.') from None
    if scores.shape != (len(answers),):
        raise UserError(f'{label} returned an array of shape {scores.shape} for {len(answers)} answers: return one number each.')
    if not np.isfinite(scores).all():
        number = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise UserError(
            f'{label} returned {scores[number]} for the answer to {answers[number][0].where}: {shown(texts[number])}.'
        )
    return scores.tolist()


def open_rewards(config: RewardsConfig, tokenizer: Tokenizer) -> Rewards:
    """The reward models on all devices and the function, for a policy with this tokenizer.

    Raises:
      UserError: A model or the function cannot be read, or a model has another tokenizer.
    """
    models = (open_scorer(model, config.batch_size) if model else None for model in (config.helpfulness, config.safety))
    return Rewards(*models, config, tokenizer, open_function(config))


def open_function(config: RewardsConfig) -> Function | None:
    """The reward function that is named, if one is. Its file is run, as a module.

    Raises:
      UserError: There is no such file or function, or the file cannot be run.
    """
    file, colon, name = config.function.rpartition(':')
    label = f'rewards.function={config.function}'
    if not colon:
        if config.function and config.function not in FUNCTIONS:
            raise UserError(
                f'{label}: give file.py:name, or one of {", ".join(FUNCTIONS)}; {nearest(config.function, FUNCTIONS)}'
            )
        if config.function == 'humaneval' and not config.run_generated_code:
            raise UserError(
                f'{label} runs programs that the policy wrote: allow that with --set rewards.run_generated_code=true.'
            )
        return FUNCTIONS.get(config.function)
    if not Path(file).is_file():
        raise UserError(f'{label}: there is no file {file}.')
    spec = importlib.util.spec_from_file_location(f'reward_{Path(file).stem}', file)
    if not spec or not spec.loader:
        raise UserError(f'{label}: {file} is no Python file: its name must end with .py.')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f'{label}: {file} cannot be run: {type(error).__name__}: {reason(error)}.') from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith('_')]
        raise UserError(f'{label}: {file} has no function {name!r}; {nearest(name, functions)}')
    return function


def gsm8k(prompts: Sequence[Messages], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 where an answer ends with the number of the row's 'answer', else 0.

    >>> gsm8k([[]] * 2, ['So 2 + 2 = 4. The answer is 4.', 'It is 5.'], [{'answer': '2 + 2 = 4\\n#### 4'}] * 2)
    [1.0, 0.0]
    """
    targets = [extract_number(str(_field(row, 'answer', 'gsm8k'))) for row in rows]
    return [float(target != '' and extract_number(answer) == target) for answer, target in zip(answers, targets, strict=True)]


def humaneval(prompts: Sequence[Messages], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 where the program of an answer passes the row's 'test' of its 'entry_point' in the sandbox, else 0."""
    for row in rows:
        for name in ('prompt', 'entry_point', 'test'):
            _field(row, name, 'humaneval')
    programs = [
        humaneval_program(Example(None, row['prompt'], '', data=row), answer) for answer, row in zip(answers, rows, strict=True)
    ]
    return [float(outcome == 'passed') for outcome in run_programs(programs)]


def toy(prompts: Sequence[Messages], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The quality of an answer to a prompt of the toy world, as its oracle says, from 0 to 1."""
    oracle = Oracle()
    return [
        verdict(oracle, prompt, row.get('is_safety', False), answer, True).quality
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]


def _field(row: Mapping[str, Any], name: str, function: str) -> Any:
    if name not in row:
        raise UserError(
            f'rewards.function={function} needs rows with {name!r}, and a prompt has only {", ".join(row) or "none"}.'
        )
    return row[name]


FUNCTIONS: dict[str, Function] = {'gsm8k': gsm8k, 'humaneval': humaneval, 'toy': toy}
