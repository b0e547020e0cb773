"""Answers with their scores: prompts → samples → rollouts, which `rewards.py` scores. Rejection sampling and PPO share it.

A rollout is a line of JSON that people can read; written whole, it is read back exactly, so nothing that was sampled is lost.
"""

import dataclasses
import html
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from llama2_jax.config import UserError
from llama2_jax.data.prompts import Prompt
from llama2_jax.files import write_atomically
from llama2_jax.inference.engine import Engine, Request, Sample
from llama2_jax.runtime import barrier, is_main_process
from llama2_jax.runtime.workdir import report_disk_full
from llama2_jax.toy.answers import Verdict, verdict
from llama2_jax.toy.oracle import Oracle


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A prompt's answer and its scores.

    Attributes:
      prompt: what was asked.
      text: of the answer.
      token_ids: as they were sampled, EOS included where there is one.
      logprobs: of each, as the engine says.
      stop_reason: 'eos', or 'length' for an answer that was cut off.
      helpfulness, safety: linear scores of the two models, where there are such.
      gated: whether safety's is the one that counts.
      score: that one with the function's value, less a penalty for a missing EOS.
      function: the value of the reward function, where there is one.
    """

    prompt: Prompt
    text: str
    token_ids: list[int]
    logprobs: list[float]
    stop_reason: str
    helpfulness: float | None
    safety: float | None
    gated: bool
    score: float
    function: float | None = None

    @property
    def ended(self) -> bool:
        """Whether it stopped by itself."""
        return self.stop_reason == 'eos'


def sample_answers(
    engine: Engine, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: str, count: int = 1
) -> Iterator[tuple[Prompt, list[Sample]]]:
    """`count` answers to each prompt, in order, drawn from the whole distribution at the temperature: nothing is cut off it.

    Args:
      seed: a prompt's samples are a function of this, its number in `prompts` and the policy.
    """
    requests = [
        Request(
            prompt.token_ids,
            max_new_tokens=max_new_tokens,
            num_samples=count,
            temperature=temperature,
            top_p=1.0,
            seed=zlib.crc32(f'{seed} {number}'.encode()),
            answer=True,
        )
        for number, prompt in enumerate(prompts)
    ]
    return zip(prompts, engine.generate(requests), strict=True)


def pad_rollouts(rollouts: Sequence[Rollout], length: int) -> dict[str, np.ndarray]:
    """This process's rows: tokens int32, answer bool and the engine's logprobs float32, [b, L+1]; score float32 [b].

    Prompts begin at 0 and answers follow at once; rows are padded on the right.
    """
    rows = len(rollouts) // jax.process_count()
    mine = rollouts[jax.process_index() * rows : (jax.process_index() + 1) * rows]
    shape = (rows, length + 1)
    tokens, answer, logprobs = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, rollout in enumerate(mine):
        start, end = len(rollout.prompt.token_ids), len(rollout.prompt.token_ids) + len(rollout.token_ids)
        tokens[row, :start], tokens[row, start:end] = rollout.prompt.token_ids, rollout.token_ids
        answer[row, start:end], logprobs[row, start:end] = True, rollout.logprobs
    score = np.array([rollout.score for rollout in mine], np.float32)
    return {'tokens': tokens, 'answer': answer, 'logprobs': logprobs, 'score': score}


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Writes a file whole or not at all; every process calls it with the same rollouts."""
    barrier('rollouts ready')
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(dataclasses.asdict(rollout), ensure_ascii=False) for rollout in rollouts)
        with report_disk_full(path):
            write_atomically(path, '\n'.join(lines) + '\n')
    barrier('rollouts written')


def read_rollouts(path: Path) -> list[Rollout]:
    """What `write_rollouts` wrote, exactly.

    Raises:
      UserError: the file is damaged.
    """
    try:
        return [from_json(json.loads(line)) for line in path.read_text(encoding='utf-8').split('\n')[:-1]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({error}): remove it, and its answers are sampled again.') from None


def from_json(fields: Mapping[str, Any]) -> Rollout:
    """A rollout of the fields that `dataclasses.asdict` gives."""
    values: dict[str, Any] = {**fields, 'prompt': Prompt(**fields['prompt'])}
    return Rollout(**values)


def by_oracle(oracle: Oracle, rollout: Rollout) -> Verdict:
    """What the toy world's oracle says of an answer to one of its prompts."""
    prompt = rollout.prompt
    return verdict(oracle, prompt.messages, prompt.is_safety, rollout.text.strip(), rollout.ended)


def figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What there is to say about many: means of score and both rewards, shares of gate and EOS, length."""
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts], float)
    scores = np.array([rollout.score for rollout in rollouts])
    spread = lengths.std() * scores.std()
    return {
        'score': float(scores.mean()),
        **{name: _mean(getattr(rollout, name) for rollout in rollouts) for name in scored_by(rollouts)},
        'gated': _mean(rollout.gated for rollout in rollouts),
        'eos': _mean(rollout.ended for rollout in rollouts),
        'length': float(lengths.mean()),
        'length_correlation': float(((lengths - lengths.mean()) * (scores - scores.mean())).mean() / spread) if spread else 0.0,
    }


def _mean(values: Iterable[Any]) -> float:
    return float(np.mean([float(value) for value in values]))


def scored_by(rollouts: Sequence[Rollout]) -> list[str]:
    """What gave a number to the answers, of helpfulness, safety and function."""
    return [name for name in ('helpfulness', 'safety', 'function') if all(getattr(one, name) is not None for one in rollouts)]


def show(rollouts: Sequence[Rollout]) -> str:
    """Rollouts as a Markdown table for samples.md."""
    names = scored_by(rollouts)
    rows = [f'| prompt | answer | {" | ".join(names)} | score |', '|---|---|' + '---|' * (len(names) + 1)]
    for rollout in rollouts:
        question, answer = rollout.prompt.messages[-1]['content'], rollout.text.strip() + ('' if rollout.ended else ' …')
        cells = [html.escape(' '.join(text.split())).replace('|', '&#124;') for text in (question, answer)]
        cells += [f'{value:.2f}' for value in (*(getattr(rollout, name) for name in names), rollout.score)]
        rows.append(f'| {" | ".join(cells)} |')
    return '\n'.join(rows)
