"""Safety context distillation (paper p27-28; recipe H.2): answers given under a safety preprompt, learned without it.

Only adversarial prompts are asked, as on others it teaches false refusals; and an answer is only kept where the safety reward
model puts it above what the model says by itself, as where that is good already the answer under a preprompt is often vaguer.

  samples.jsonl   each prompt's own answer and those under preprompts, with their scores
  dialogs.jsonl   the answers that are kept, as dialogs without the preprompt
  sft/            fine-tuning on them; its model becomes `model/`
"""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from etils.epath import Path
from tqdm import tqdm

from llama2_jax import made_from
from llama2_jax.config import SEED, Config, LanguageModel, Names, RewardModel, UserError, between, resumable
from llama2_jax.data.preprompts import TEMPLATES, Templates, preprompt
from llama2_jax.data.prompts import Prompt, read_prompt
from llama2_jax.data.sources import read_records
from llama2_jax.evals.multi_turn import usable
from llama2_jax.files import write_atomically
from llama2_jax.inference.engine import Engine
from llama2_jax.inference.open import open_engine, open_scorer
from llama2_jax.inference.scorer import Scorer
from llama2_jax.inputs import check_inputs, common_tokenizer
from llama2_jax.rl.rollout import sample_answers
from llama2_jax.runtime import barrier, is_main_process, log
from llama2_jax.runtime.jsonl import add_rows, resume_rows
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.stages import sft
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.dialog import encode_prompt

BLOCK = 64  # prompts that are sampled and written together


@dataclasses.dataclass(frozen=True)
class DistillConfig(Config):
    """A data set of distilled answers, and fine-tuning on it.

    Attributes:
      model: answers, and is fine-tuned.
      safety: the safety reward model.
      prompts: a source of prompts {'messages', 'is_safety', 'category'}; those that are not tagged as adversarial are left out.
      templates: a source of answer templates {'category', 'steps'}; '': the paper's and the toy world's.
      count: of prompts; 0: all.
      samples: answers to each under a preprompt, each under one of its own; the best of them counts. The paper compares one with
        one: the best of four scores above the original in four cases of five even where preprompts do nothing.
      decode_batch: answers that are drawn at a time.
      tune: fine-tunes, too, with `sft`; `sft.data.mixture` is what to train on besides, perhaps nothing.
    """

    OVERWRITTEN: ClassVar = ('sft.init_from',)
    model: LanguageModel = ''
    safety: RewardModel = ''
    prompts: Annotated[str, Names('source', 'prompts')] = ''
    templates: Annotated[str, Names('source', 'templates')] = ''
    count: int = 0
    samples: int = between(1, 1)
    max_new_tokens: int = between(512, 1)
    temperature: float = between(1.0, 1e-3, 100)
    decode_batch: int = between(64, 1, resumable='anywhere')
    seed: int = SEED
    tune: bool = resumable(False, 'alone')
    sft: SftConfig = resumable(SftConfig(), 'alone')


def run(config: DistillConfig, workdir: str) -> None:
    """Samples, keeps and, with `tune`, fine-tunes in `workdir`; resumes an interrupted run.

    Raises:
      UserError: any mistake in the config, a model, the prompts or the workdir.
    """
    check_inputs(config, 'model', 'safety', 'prompts')
    common_tokenizer({'model': config.model, 'safety': config.safety})
    path, begun = open_run(workdir, config, ('samples.jsonl',))
    models = made_from.of_models({'model': config.model, 'safety': config.safety})
    sources = made_from.of_sources('prompts', [config.prompts]) | made_from.of_sources('templates', [config.templates])
    record_inputs(path, models | sources, begun)
    rows = sample(config, path / 'samples.jsonl')
    write_kept(rows, path / 'dialogs.jsonl')
    print_scores(rows)
    if config.tune:
        sft.run_within(dataclasses.replace(config.sft, init_from=config.model), path, path / 'dialogs.jsonl')
    else:
        log(f'Fine-tune on them: {sft.command(config.model, path / "dialogs.jsonl")}')


def sample(config: DistillConfig, path: Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, those that are not there yet sampled and scored."""
    engine, scorer = open_engine(config.model, config.decode_batch, own_template=False), open_scorer(config.safety)
    templates = read_templates(config.templates)
    prompts = [read_prompt(record, engine.tokenizer) for record in read_records(config.prompts)]
    prompts = [prompt for prompt in prompts if prompt.is_safety][: config.count or None]
    if not prompts:
        raise UserError(f"{config.prompts} has no adversarial prompts: rows with 'is_safety': true.")
    if config.tune:
        sft.check_warmup(config.sft, len(prompts))
    rows = resume_rows(path)
    for first in tqdm(range(len(rows), len(prompts), BLOCK), unit='block', dynamic_ncols=True, disable=not is_main_process()):
        new = sample_block(config, engine, scorer, templates, prompts[first : first + BLOCK], first)
        add_rows(path, new)
        rows += new
    return rows


def sample_block(
    config: DistillConfig, engine: Engine, scorer: Scorer, templates: Templates, prompts: Sequence[Prompt], first: int
) -> list[dict[str, Any]]:
    """Rows {'messages', 'category', 'original', 'distilled'} of prompts, which are number `first` and those that follow."""
    asked = list(prompts)
    said = ['' for _ in prompts]
    for number, prompt in enumerate(prompts, first):
        rng = random.Random(f'{config.seed} {number}')
        for _ in range(config.samples):
            said.append(preprompt(rng, prompt.category, templates))
            messages = prefixed(prompt.messages, said[-1])
            asked.append(dataclasses.replace(prompt, messages=messages, token_ids=encode_prompt(messages, engine.tokenizer)))
    settings = {'max_new_tokens': config.max_new_tokens, 'temperature': config.temperature, 'seed': f'{config.seed} {first}'}
    samples = [sample for _, [sample] in sample_answers(engine, asked, **settings)]
    of = [*range(len(prompts)), *(i for i in range(len(prompts)) for _ in range(config.samples))]
    # All are scored as answers to the bare prompt: that is what the model will be asked.
    scores = scorer.score([[*prompts[i].token_ids, *sample.token_ids] for i, sample in zip(of, samples, strict=True)]).tolist()
    answers = [
        {'preprompt': text, 'text': usable(sample), 'token_ids': sample.token_ids, 'score': score}
        for text, sample, score in zip(said, samples, scores, strict=True)
    ]
    return [
        {
            'messages': prompt.messages,
            'category': prompt.category,
            'original': answers[i],
            'distilled': answers[len(prompts) + i * config.samples :][: config.samples],
        }
        for i, prompt in enumerate(prompts)
    ]


def prefixed(messages: Sequence[Mapping[str, str]], text: str) -> list[dict[str, str]]:
    """A dialog with a preprompt as its system message, before the one it has, if any.

    >>> prefixed([{'role': 'user', 'content': 'How do I burn down the mill?'}], 'You are a safe and wise assistant.')[0]
    {'role': 'system', 'content': 'You are a safe and wise assistant.'}
    """
    own = messages[0]['content'] if messages[0]['role'] == 'system' else ''
    return [{'role': 'system', 'content': f'{text} {own}'.strip()}, *map(dict, messages[bool(own) :])]


def kept(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The best answer under a preprompt, where the reward model puts it above the model's own."""
    usable_ones = [answer for answer in row['distilled'] if answer['text']]
    best = max(usable_ones, key=lambda answer: answer['score'], default=None)
    return best if best and best['score'] > row['original']['score'] else None


def write_kept(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes dialogs.jsonl.

    Raises:
      UserError: nothing is kept.
    """
    pairs = [(row, best) for row in rows if (best := kept(row))]
    if not pairs:
        raise UserError('No answer under a preprompt scores higher than what the model says by itself.')
    lines = []
    for row, best in pairs:
        answer = {'role': 'assistant', 'content': best['text'], 'token_ids': best['token_ids']}
        messages = [*row['messages'], answer]
        about = {'preprompt': best['preprompt'], 'score': best['score'], 'original_score': row['original']['score']}
        lines.append(json.dumps({'messages': messages, **about}, ensure_ascii=False) + '\n')
    if is_main_process():
        write_atomically(path, ''.join(lines))
    barrier('dialogs written')


def print_scores(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints by quarters of the original score what a preprompt does to the score, and how much is kept (paper Figure 16)."""
    order = sorted(rows, key=lambda row: row['original']['score'])
    log(f'{"original score, by quarters":<28} {"prompts":>8} {"original":>9} {"preprompt":>9} {"best":>9} {"kept":>7}')
    for quarter in np.array_split(np.array(order, object), min(4, len(order))):
        original = np.mean([row['original']['score'] for row in quarter])
        distilled = np.array([[answer['score'] for answer in row['distilled']] for row in quarter])
        share = np.mean([kept(row) is not None for row in quarter])
        span = f'{quarter[0]["original"]["score"]:.2f} to {quarter[-1]["original"]["score"]:.2f}'
        figures = f'{original:>9.2f} {distilled.mean():>9.2f} {distilled.max(1).mean():>9.2f} {share:>7.1%}'
        log(f'{span:<28} {len(quarter):>8} {figures}')


def read_templates(source: str) -> Templates:
    """The templates of a source of rows {'category', 'steps'}; '' stands for `TEMPLATES`.

    Raises:
      UserError: naming the row, and what is wrong with it.
    """
    templates = {}
    for record in read_records(source) if source else ():
        category, steps = record.fields.get('category'), record.fields.get('steps')
        if not isinstance(category, str) or not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise UserError(f"{record.where} is no template: {{'category': text, 'steps': [texts]}}.")
        templates[category] = steps
    return templates or TEMPLATES
