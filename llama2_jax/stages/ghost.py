"""Ghost Attention (paper p16-17; recipe G): a data set of dialogs in which the last answer obeys what only the first turn says.

Dialogs are sampled with the instructions before every question. The data set has them in the system message only, and only the
last answer is trained, because the model would not have given the others without being told each time.
"""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

from etils.epath import Path
from tqdm import tqdm

from llama2_jax import made_from
from llama2_jax.config import SEED, Config, LanguageModel, Names, UserError, between, resumable
from llama2_jax.data.constraints import QUESTIONS, parse_list, read_constraints
from llama2_jax.data.instructions import Kinds, draw, word
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.data.sources import as_source, fingerprint
from llama2_jax.evals.ghost import TURNS, Grader, Talk, find_grader, obeyed, recall
from llama2_jax.evals.multi_turn import multi_turn_rollout
from llama2_jax.files import write_atomically
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.inference.open import open_engine
from llama2_jax.inputs import check_inputs
from llama2_jax.runtime import barrier, is_main_process, log
from llama2_jax.runtime.jsonl import add_rows, resume_rows
from llama2_jax.runtime.workdir import open_run, record_inputs
from llama2_jax.stages import sft
from llama2_jax.stages.sft import SftConfig
from llama2_jax.text.dialog import encode_prompt


@dataclasses.dataclass(frozen=True)
class GhostConfig(Config):
    """A data set for Ghost Attention, and fine-tuning on it.

    Attributes:
      model: Chat model that samples the answers and is then fine-tuned.
      dialogs: Source of dialogs; only their questions are used.
      constraints: `toy`, a source of rows {'kind', 'values'} (`data.constraints`), or '': the model is asked for hobbies,
        languages and public figures.
      grader: Decides whether an answer obeys: toy, mentions, or your own function as module:function.
      samples: Answers sampled at a turn until the grader accepts one; if it accepts none, the dialog ends. With 1 nothing is
        graded.
      count: Maximum number of dialogs to sample; 0: all of the source.
      cuts: Training dialogs made of each one: itself, and itself cut after fewer turns. Each trains its last answer.
      turns: Maximum turns of a dialog; the number is sampled from 2 on, each doubling as often as the one before.
      most: Maximum number of instructions in force together.
      terse_share: Share of the final system messages in the short wording; all are long while sampling.
      max_new_tokens, temperature, top_p: Sampling settings of the answers.
      batch_size: Dialogs sampled together.
      int8: Samples with weights in eight bits.
      seed: Random seed.
      tune: Fine-tunes as well, with `sft`; `sft.data.mixture` names data to train on besides, or nothing.
      judged: Number of the source's last dialogs that measure recall before and after fine-tuning.
    """

    OVERWRITTEN: ClassVar = ('sft.init_from',)
    model: LanguageModel = ''
    dialogs: Annotated[str, Names('source', 'dialogs')] = ''
    constraints: Annotated[str, Names('source', 'constraints', ('toy',))] = ''
    grader: str = 'mentions'
    samples: int = between(1, 1)
    count: int = 0
    cuts: int = between(1, 1, resumable='alone')
    turns: int = between(20, 2)
    most: int = between(3, 1)
    terse_share: float = between(0.5, 0, 1)
    max_new_tokens: int = between(512, 1)
    temperature: float = between(1.0, 0, 100)
    top_p: float = between(0.9, 0, 1)
    batch_size: int = between(32, 1, resumable='anywhere')
    int8: bool = False
    seed: int = SEED
    tune: bool = resumable(False, 'alone')
    judged: int = resumable(100, 'alone')
    sft: SftConfig = resumable(SftConfig(), 'alone')

    def __post_init__(self) -> None:
        super().__post_init__()
        find_grader(self.grader)


def run(config: GhostConfig, workdir: str) -> None:
    """Writes or resumes WORKDIR/samples.jsonl, and dialogs.jsonl; with `tune` also model/ and recall.json.

    Raises:
      UserError: any mistake in the config, the model, the dialogs or the constraints.
    """
    check_inputs(config, 'model', 'dialogs')
    path, begun = open_run(workdir, config, ('samples.jsonl',))
    talks, judged = read_questions(config)
    if config.tune:
        sft.check_warmup(config.sft, len(talks) * config.cuts)
    constraints = '' if config.constraints == 'toy' else config.constraints
    sources = made_from.of_sources('dialogs', [config.dialogs]) | made_from.of_sources('constraints', [constraints])
    inputs, asked = made_from.of_models({'model': config.model}) | sources, path / 'constraints.jsonl'
    record_inputs(path, inputs | of_asked(asked), begun)
    engine = open_engine(config.model, config.batch_size, config.int8, own_template=False)
    kinds = open_constraints(config, engine, asked)
    if not begun:  # the model may just have been asked for its constraints
        record_inputs(path, inputs | of_asked(asked), begun)
    rows = sample(config, engine, kinds, talks, path / 'samples.jsonl')
    write_cuts(config, rows, path / 'dialogs.jsonl')
    if not config.tune:
        log(f'Fine-tune on them: {sft.command(config.model, path / "dialogs.jsonl")}')
        return
    sft.run_within(dataclasses.replace(config.sft, init_from=config.model), path, path / 'dialogs.jsonl')
    if judged and not (path / 'recall.json').exists():
        models = {'before': config.model, 'after': path / 'model'}
        figures = {name: measure(config, model, kinds, judged) for name, model in models.items()}
        if is_main_process():
            write_atomically(path / 'recall.json', json.dumps(figures, indent=2) + '\n')
        print_recall(figures)


def read_questions(config: GhostConfig) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """What users say in the dialogs to sample, and in those to measure recall in, which are the last of the source.

    Raises:
      UserError: there are too few.
    """
    rows = [dialog for _, dialog in read_dialogs(config.dialogs) if dialog]
    texts = [tuple(message['content'] for message in dialog if message['role'] == 'user') for dialog in rows]
    texts = [text for text in texts if len(text) > 1]
    judged = texts[len(texts) - config.judged :] if config.tune else []
    talks = texts[: len(texts) - len(judged)][: config.count or None]
    if not talks:
        kept = f'{len(judged)} are kept to judge by'
        raise UserError(f'{config.dialogs} has {len(texts)} dialogs of two turns or more; {kept}.')
    return talks, judged


def of_asked(file: Path) -> dict[str, str]:
    """The fingerprint of the constraints that the model was asked for, which people may change until dialogs are sampled."""
    return {file.name: fingerprint(as_source(str(file)))} if file.exists() else {}


def open_constraints(config: GhostConfig, engine: Engine, path: Path) -> Kinds:
    """The kinds of instructions; those that the model is asked for are kept in a file, to be read and changed.

    Raises:
      UserError: they cannot be read, or the model gives no lists.
    """
    if config.constraints:
        return read_constraints(config.constraints)
    if not path.exists():
        prompts = [encode_prompt([{'role': 'user', 'content': text}], engine.tokenizer) for text in QUESTIONS.values()]
        requests = [Request(prompt, max_new_tokens=config.max_new_tokens, temperature=0.0, answer=True) for prompt in prompts]
        rows = []
        for (kind, question), [sample] in zip(QUESTIONS.items(), engine.generate(requests), strict=True):
            values = parse_list(sample.text)
            if len(values) < 2:
                raise UserError(f'{config.model} answers {question!r} with no list: give --set constraints=jsonl:FILE.')
            rows.append({'kind': kind, 'values': values})
        add_rows(path, rows)
        barrier('constraints written')
    return read_constraints(f'jsonl:{path}')


def sample(config: GhostConfig, engine: Engine, kinds: Kinds, talks: list[tuple[str, ...]], path: Path) -> list[dict[str, Any]]:
    """The rows {'id', 'instructions', 'messages'} of samples.jsonl, those that are not there yet sampled."""
    rows, grader = resume_rows(path), find_grader(config.grader)
    done = rows[-1]['id'] + 1 if rows else 0
    with tqdm(total=len(talks), initial=done, unit='dialog', dynamic_ncols=True, disable=not is_main_process()) as bar:
        for first in range(done, len(talks), config.batch_size):
            plans = [plan(config, kinds, talks[i], i) for i in range(first, min(first + config.batch_size, len(talks)))]
            new = sample_dialogs(config, engine, grader, plans)
            add_rows(path, new)
            rows += new
            bar.update(len(plans))
    return rows


def write_cuts(config: GhostConfig, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the dialogs to train on: those that were sampled, and the same ones cut after fewer turns.

    Raises:
      UserError: there are none.
    """
    if not rows:
        raise UserError(
            f'Every dialog yielded fewer than two valid answers: raise samples, or check what {config.model} answers.'
        )
    lines = []
    for row in rows:
        turns = len(row['messages']) // 2
        rng = random.Random(f'{config.seed} {row["id"]} cuts')
        shorter = rng.sample(range(1, turns), min(config.cuts - 1, turns - 1))
        lines += [json.dumps({**row, 'messages': cut(row['messages'], count)}, ensure_ascii=False) for count in (*shorter, turns)]
    if is_main_process():
        write_atomically(path, '\n'.join(lines) + '\n')
    barrier('dialogs written')
    answers = sum(len(row['messages']) // 2 for row in rows)
    log(f'{len(rows):,} dialogs with {answers:,} answers were sampled; {len(lines):,} dialogs to train on are in {path}.')


def cut(messages: Sequence[Mapping[str, Any]], turns: int) -> list[dict[str, Any]]:
    """The first turns of a dialog, of which every answer but the last one is read, not learned.

    The last one is learned as the ids that were drawn. The others are read as text, as the model read them while sampling.

    >>> messages = [{'role': 'assistant', 'content': text, 'token_ids': [i], 'weight': 0} for i, text in enumerate('abc')]
    >>> cut([{'role': 'user', 'content': 'Hi'}, *messages], 1)  # doctest: +NORMALIZE_WHITESPACE
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'a', 'weight': 0},
     {'role': 'assistant', 'content': 'b', 'token_ids': [1]}]
    """
    *before, last = messages[: 1 + 2 * turns]
    return [*(_without(message, 'token_ids') for message in before), _without(last, 'weight')]


def _without(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != name}


class Plan(NamedTuple):
    """A dialog to be sampled.

    Attributes:
      name: its number, of which its draws are made.
      talk: the final system message, the instructions, and as many questions as it is to have.
      said: the instructions as they stand before every question while sampling.
    """

    name: int
    talk: Talk
    said: str


def plan(config: GhostConfig, kinds: Kinds, questions: tuple[str, ...], name: int, turns: int = 0) -> Plan:
    """Draws what is to be said in a dialog; `turns`: so many, or by chance."""
    rng = random.Random(f'{config.seed} {name}')
    given = draw(kinds, rng, rng.randint(1, min(config.most, len(kinds))))
    said = word(kinds, rng, given, terse=False)
    final = word(kinds, rng, given, terse=True) if rng.random() < config.terse_share else said
    most = min(config.turns, len(questions))
    turns = turns or min(int(2 * (most / 2 + 0.5) ** rng.random()), most)
    return Plan(name, Talk(final, given, questions[:turns]), said)


def sample_dialogs(config: GhostConfig, engine: Engine, grader: Grader, plans: list[Plan]) -> list[dict[str, Any]]:
    """The rows of some dialogs; without those in which not even two answers would do."""
    answers = multi_turn_rollout(
        engine,
        [[f'{plan.said} {question}' for question in plan.talk.questions] for plan in plans],
        names=[plan.name for plan in plans],
        accept=lambda i, text: config.samples == 1 or all(grader(given, text) for given in plans[i].talk.instructions),
        tries=config.samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    return [
        {
            'id': plan.name,
            'instructions': [dataclasses.asdict(instruction) for instruction in plan.talk.instructions],
            'messages': ghost_dialog(plan.talk, given),
        }
        for plan, given in zip(plans, answers, strict=True)
        if len(given) > 1
    ]


def ghost_dialog(talk: Talk, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The dialog with instructions in the first turn alone; every answer is read, not learned, until `cut` makes one the last.

    >>> answer = {'role': 'assistant', 'content': 'Sea!', 'token_ids': [7, 2]}
    >>> ghost_dialog(Talk('End: Sea.', (), ('Hi',)), [answer])  # doctest: +NORMALIZE_WHITESPACE
    [{'role': 'system', 'content': 'End: Sea.'}, {'role': 'user', 'content': 'Hi'},
     {'role': 'assistant', 'content': 'Sea!', 'token_ids': [7, 2], 'weight': 0}]
    """
    messages: list[dict[str, Any]] = [{'role': 'system', 'content': talk.system}]
    for question, answer in zip(talk.questions, answers, strict=False):
        messages += [{'role': 'user', 'content': question}, {**answer, 'weight': 0}]
    return messages


def measure(config: GhostConfig, model: str | Path, kinds: Kinds, questions: list[tuple[str, ...]]) -> dict[int, float]:
    """Recall by turn of a model in the dialogs kept to judge by, the instructions in the system message alone."""
    talks = [plan(config, kinds, text, -1 - i, turns=config.turns).talk for i, text in enumerate(questions)]
    engine = open_engine(model, config.batch_size, config.int8, own_template=False)
    return recall(obeyed(engine, talks, find_grader(config.grader), config.max_new_tokens))


def print_recall(figures: Mapping[str, Mapping[int, float]]) -> None:
    """Prints recall at the paper's turns, as its Table 30."""
    log(f'{"instructions recalled at turn":<32}' + ''.join(f'{turn:>8}' for turn in TURNS))
    for name, by_turn in figures.items():
        log(f'{name:<32}' + ''.join(f'{by_turn[turn]:>8.1%}' if turn in by_turn else f'{"–":>8}' for turn in TURNS))
