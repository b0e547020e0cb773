"""Collecting preferences (paper p10; recipe E.1): models' answers to each prompt at varied temperatures, for raters to compare.

The workdir gets

  answers.jsonl       each prompt with answers that differ, and which model gave each at which temperature: what raters see
  preferences.jsonl   what they say of every two; simulated raters where the prompts are of the toy world, elsewhere people
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from etils.epath import Path
from tqdm import tqdm

from llama2_jax import made_from
from llama2_jax.config import SEED, Config, LanguageModel, Names, UserError, between, resumable
from llama2_jax.data.mixing import check_toy
from llama2_jax.data.prompts import Prompt, different, read_prompt
from llama2_jax.data.sources import read_records
from llama2_jax.evals.multi_turn import usable
from llama2_jax.files import write_atomically
from llama2_jax.inference.engine import Engine
from llama2_jax.inference.open import open_engine
from llama2_jax.inputs import check_inputs, common_tokenizer
from llama2_jax.rl.rollout import sample_answers
from llama2_jax.runtime import barrier, is_main_process, log
from llama2_jax.runtime.jsonl import add_rows, resume_rows
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.toy import preferences
from llama2_jax.toy.oracle import Oracle

BLOCK = 64  # prompts that are answered and written together


@dataclasses.dataclass(frozen=True)
class CollectConfig(Config):
    """What is asked, who answers, and who rates.

    Attributes:
      models: Models that answer in turn, such as this week's and last week's; they share a tokenizer.
      prompts: Source of prompts {'messages'}.
      count: Number of different prompts; 0: all.
      samples: Answers to each prompt; truncated and repeated answers are dropped.
      temperatures: Temperatures that each model's answers take in turn.
      decode_batch: Answers sampled together.
      raters: Simulated raters of the toy world, who prefer by helpfulness, by safety, or by helpfulness with a bias for long and
        confident answers ('biased'). 'people': writes answers.jsonl only, for human annotators.
    """

    models: tuple[LanguageModel, ...] = ()
    prompts: Annotated[str, Names('source', 'prompts')] = ''
    count: int = 0
    samples: int = between(4, 2)
    temperatures: tuple[float, ...] = between((0.7, 1.0), 0, 100)
    max_new_tokens: int = between(512, 1)
    decode_batch: int = between(64, 1, resumable='anywhere')
    raters: Literal['people', 'helpfulness', 'safety', 'biased'] = resumable('people', 'alone')
    seed: int = SEED

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures:
            raise UserError('temperatures is empty: name at least one.')
        if self.raters != 'people' and self.prompts:
            check_toy(f'raters={self.raters}', self.prompts, 'give raters=people')


def run(config: CollectConfig, workdir: str) -> None:
    """Samples and rates in `workdir`, or resumes there.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir.
    """
    check_inputs(config, 'models', 'prompts')
    common_tokenizer({f'models[{i}]': model for i, model in enumerate(config.models)})
    path, begun = open_run(workdir, config, ('answers.jsonl',))
    models = made_from.of_models({f'models[{number}]': model for number, model in enumerate(config.models)})
    record_inputs(path, models | made_from.of_sources('prompts', [config.prompts]), begun)
    rows = sample(config, path / 'answers.jsonl')
    compared = sum(len(row['answers']) > 1 for row in rows)
    log(f'{path / "answers.jsonl"}: {len(rows):,} prompts, {compared:,} of them with answers that differ.')
    if config.raters != 'people':
        rated = rate(rows, config.raters, config.seed)
        if is_main_process():
            write_atomically(path / 'preferences.jsonl', ''.join(json.dumps(row) + '\n' for row in rated))
        barrier('preferences written')
        log(f'{path / "preferences.jsonl"}: {len(rated):,} pairs.')


def sample(config: CollectConfig, path: Path) -> list[dict[str, Any]]:
    """The rows of answers.jsonl, those that are not there yet sampled."""
    engines = {model: open_engine(model, config.decode_batch, own_template=False) for model in config.models}
    tokenizer = next(iter(engines.values())).tokenizer
    prompts = [read_prompt(record, tokenizer) for record in read_records(config.prompts)]
    prompts = different(prompts, config.seed)[: config.count or None]
    rows = resume_rows(path)
    for start in tqdm(range(len(rows), len(prompts), BLOCK), unit='block', dynamic_ncols=True, disable=not is_main_process()):
        new = sample_block(config, engines, prompts[start : start + BLOCK], f'{config.seed} {start}')
        add_rows(path, new)
        rows += new
    return rows


def sample_block(config: CollectConfig, engines: dict[str, Engine], prompts: Sequence[Prompt], seed: str) -> list[dict[str, Any]]:
    """Rows {'messages', 'is_safety', 'answers': [{'text', 'model', 'temperature'}]} of some prompts."""
    turns = itertools.islice(itertools.cycle(itertools.product(config.temperatures, config.models)), config.samples)
    rows: list[dict[str, Any]] = [
        {'messages': prompt.messages, 'is_safety': prompt.is_safety, 'answers': []} for prompt in prompts
    ]
    for number, (temperature, model) in enumerate(turns):
        samples = sample_answers(
            engines[model],
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=temperature,
            seed=f'{seed} {number}',
        )
        for row, (_, [drawn]) in zip(rows, samples, strict=True):
            text = usable(drawn)
            if text and all(text != answer['text'] for answer in row['answers']):
                row['answers'].append({'text': text, 'model': model, 'temperature': temperature})
    return rows


def rate(rows: Sequence[dict[str, Any]], raters: str, seed: int) -> list[preferences.Row]:
    """What the toy world's raters say of every two answers to a prompt."""
    oracle, rated = Oracle(), []
    for number, row in enumerate(rows):
        answers = [answer['text'] for answer in row['answers']]
        rated += preferences.rate(oracle, random.Random(f'{seed} {number}'), row['messages'], answers, raters)
    return rated
