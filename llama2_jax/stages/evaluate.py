"""A model in, the paper's tables out: tasks one after the other, each resumable, and a table beside the paper's row."""

import dataclasses
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils.epath import Path
from tqdm import tqdm

from llama2_jax.checkpoints.fingerprint import fingerprint, identity
from llama2_jax.checkpoints.load import open_model
from llama2_jax.config import Config, UserError, between
from llama2_jax.data import sources
from llama2_jax.evals import report
from llama2_jax.evals.files import Files, Missing
from llama2_jax.evals.judges import WANTED, Helper, make_helpers
from llama2_jax.evals.measure import by_group, counts, means, shares, spread
from llama2_jax.evals.paper import size_of
from llama2_jax.evals.prompter import Prompter
from llama2_jax.evals.task import Example, Task
from llama2_jax.evals.tasks import TASKS, expand
from llama2_jax.files import locate, make_directory, read_json, write_atomically
from llama2_jax.inference.open import open_engine
from llama2_jax.runtime import barrier, is_main_process, log
from llama2_jax.runtime.jsonl import check_settings, growing, resume_rows
from llama2_jax.text.printable import printable

GRADERS = 2  # counts up with every change of what graders or results mean: older results are not continued
Loaded = tuple[Files, list[Example]]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Config):
    """What to measure, and how.

    Attributes:
      model: Model of any format.
      tasks: Names of tasks and groups (`evals.tasks`).
      data_dir: Folder of the benchmarks.
      output: Folder for the results.
      limit: Examples of each task, spread over it; 0: all.
      shots: Solved examples in the prompt; None: the paper's number.
      samples: Samples of each question of a sampling task; None: the task's number.
      chat: Whether to use the chat format; None: as the model's config says.
      tfds: Reads sets that are missing in data_dir through TensorFlow Datasets.
      run_generated_code: Runs generated programs in the sandbox.
      toxicity, truth_judge, info_judge, safety_judge: Directories of classifiers and judges (`evals.judges`).
    """

    model: str
    tasks: tuple[str, ...]
    data_dir: str
    output: str
    limit: int = 0
    shots: int | None = None
    samples: int | None = None
    chat: bool | None = None
    tfds: bool = False
    run_generated_code: bool = False
    toxicity: str = ''
    truth_judge: str = ''
    info_judge: str = ''
    safety_judge: str = ''
    batch_size: int = between(32, 1)
    int8: bool = False
    seed: int = 0


def run(config: EvaluateConfig) -> None:
    """Measures, or continues; writes TASK.jsonl and TASK.json for each task, and summary.json and table.md for all.

    Raises:
      UserError: any mistake; a task that was named, and not only its group, could not be run; or none could.
    """
    names = expand(config.tasks)
    source = open_model(config.model)
    chat = source.prompts.chat if config.chat is None else config.chat
    path = make_directory(config.output)
    judges = {'true': config.truth_judge, 'informative': config.info_judge, 'violates': config.safety_judge}
    tasks = [adapted(TASKS[name], config, chat) for name in names]
    needed = {helper for task in tasks for helper in task.helpers}
    helpers = make_helpers(needed, config.data_dir, config.run_generated_code, config.toxicity, judges)
    found, skipped = load_all(tasks, config, helpers)
    engine = open_engine(config.model, config.batch_size, config.int8)
    log(source.prompts.describe(chat))
    model = identity(config.model, config.int8)
    results = {
        task.name: run_task(task, config, model, Prompter(engine, chat, config.seed), helpers, path, loaded)
        for task, loaded in found
    }
    finish(config, results, skipped, report.rows(results, size := size_of(engine.config), chat), size, chat)
    if named := [name for name in config.tasks if name in skipped]:
        raise UserError(f'{", ".join(named)} could not be run, see above; the other tasks were.')


def load_all(
    tasks: Sequence[Task], config: EvaluateConfig, helpers: Mapping[str, Helper]
) -> tuple[list[tuple[Task, Loaded]], dict[str, str]]:
    """The examples of every task, and why tasks are left out; before a model is loaded.

    Raises:
      UserError: a file holds rows that are none of its benchmark's; or no task can be run.
    """
    found, skipped = [], {}
    for task in tasks:
        lacking = [WANTED[helper] for helper in task.requires if helper not in helpers]
        try:
            if lacking:
                raise Missing('; '.join(lacking))
            found.append((task, load(task, config)))
        except Missing as error:
            skipped[task.name] = str(error) if lacking else f'{error}; download it from {task.home}'
            log(f'{task.name} is left out: {skipped[task.name]}')
    if not found:
        raise UserError(f'No task could be run: {"; ".join(f"{name}: {why}" for name, why in skipped.items())}.')
    return found, skipped


def load(task: Task, config: EvaluateConfig) -> Loaded:
    """The examples of a task, and the files they come from."""
    files = Files(config.data_dir, config.tfds)
    examples = spread(task.examples(files), config.limit)
    for note in files.notes:
        log(f'Note: {task.name}: {note}.')
    return files, examples


def adapted(task: Task, config: EvaluateConfig, chat: bool = False) -> Task:
    """The task with the shots and samples that were asked for.

    Raises:
      UserError: The task has fewer solved examples.
    """
    usual = task.chat_shots if chat and task.chat_shots is not None else task.shots
    shots = usual if config.shots is None else config.shots
    if task.max_shots is not None and shots > task.max_shots:
        raise UserError(f'--shots={shots}: {task.name} has at most {task.max_shots} solved examples. Evaluate it by itself.')
    decoding = task.decoding
    if decoding and config.samples and decoding.temperature:
        decoding = dataclasses.replace(decoding, samples=config.samples)
    return dataclasses.replace(task, shots=shots, decoding=decoding)


def judges_of(config: EvaluateConfig, task: Task) -> dict[str, str]:
    """The judges of a task that are models, with what they are; grades depend on them."""
    judges = {'true': config.truth_judge, 'informative': config.info_judge, 'violates': config.safety_judge}
    found = {name: f'{judge} ({fingerprint(judge)})' for name, judge in judges.items() if judge and name in task.helpers}
    if config.toxicity and 'toxic' in task.helpers:
        found['toxic'] = f'{config.toxicity} ({sources.fingerprint(f"text:{config.toxicity}/*")})'
    return found


def run_task(
    task: Task,
    config: EvaluateConfig,
    model: dict[str, Any],
    prompter: Prompter,
    helpers: Mapping[str, Helper],
    path: Path,
    loaded: Loaded | None = None,
) -> dict[str, Any]:
    """Outputs of the model, as far as they are not there yet, grades of them, and means; `model` is its `identity`."""
    files, examples = loaded or load(task, config)
    settings = {
        **model, 'judges': judges_of(config, task), 'chat': prompter.chat, 'shots': task.shots,
        'decoding': task.decoding and dataclasses.asdict(task.decoding), 'seed': config.seed, 'files': list(files.used),
        'graders': GRADERS, 'limit': config.limit, 'examples': zlib.crc32(repr(examples).encode()),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    result = path / f'{task.name}.json'
    if result.exists():
        done = read_json(result)
        check_settings(result, settings, done.get('settings', {}))
        log(f'{task.name}: the results are there already.')
        return done
    log(f'{task.name}: {len(examples):,} examples of {", ".join(files.used) or "the toy world"}.')
    began = time.monotonic()
    outputs, tokens = collect(task, settings, prompter, examples, path / f'{task.name}.outputs.jsonl')
    seconds = time.monotonic() - began
    records = grade(task, examples, outputs, helpers)
    if prompter.cut:
        log(f'{task.name}: {prompter.cut:,} prompts were too long for the context and were cut on the left.')
    figures = means(records)
    headline = task.headline(figures)
    summary = {
        'task': task.name,
        'measures': figures,
        'counts': counts(records),
        'shares': shares(records),
        'groups': by_group(records),
        'group_counts': by_group(records, counts),
        'values': [record[headline] for record in records if headline in record],
        'examples': len(records),
        'shots': task.shots,
        'cut': prompter.cut,
        'seconds': seconds,
        'tokens_per_second': tokens / max(seconds, 1e-9),
        'settings': settings,
    }
    if is_main_process():
        write_atomically(
            path / f'{task.name}.jsonl', ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
        )
        write_atomically(result, json.dumps(summary, indent=1))
        (path / f'{task.name}.outputs.jsonl').unlink()
    barrier(f'{task.name} done')
    return summary


def collect(task: Task, settings: dict, prompter: Prompter, examples: Sequence[Example], path: Path) -> tuple[list[dict], int]:
    """The output for each example {'index', 'outputs', 'prompt_hash'}, and how many tokens were read and written for it now.

    They are written as they come, in no order; the same call again goes on.
    """
    rows = resume_rows(path)
    if rows:
        check_settings(path, settings, rows[0])
    found = {row['index']: row for row in rows[1:]}
    todo = {index: example for index, example in enumerate(examples) if index not in found}
    tokens = 0
    bar = tqdm(total=len(examples), initial=len(found), desc=task.name, dynamic_ncols=True, disable=not is_main_process())
    with bar, growing(path) as add:
        if not rows:
            add(settings)
        for output in prompter.ask(task, todo):
            line = {'index': output.index, 'prompt_hash': output.prompt_hash, 'outputs': output.outputs}
            found[output.index] = line
            tokens += output.tokens
            add(line)
            bar.update()
            bar.set_postfix_str(f'{tokens / max(bar.format_dict["elapsed"], 1e-9):,.0f} tokens/s', refresh=False)
    return [found[index] for index in range(len(examples))], tokens


def grade(task: Task, examples: Sequence[Example], outputs: Sequence[dict], helpers: Mapping[str, Helper]) -> list[dict]:
    """The records: prediction, target, measures and outputs of each example."""
    given: list[dict[str, list]] = [{} for _ in examples]
    for name, question in task.helpers.items():
        if name in helpers:
            pairs = [(number, sample['text']) for number, output in enumerate(outputs) for sample in output['outputs']]
            for answers in given:
                answers[name] = []
            replies = helpers[name]([question(examples[number], text) for number, text in pairs])
            for (number, _), reply in zip(pairs, replies, strict=True):
                given[number][name].append(reply)
    return [
        {'index': index, 'group': example.group, 'target': example.target}
        | task.grade(example, output['outputs'], answers)
        | {'prompt_hash': output['prompt_hash'], 'outputs': output['outputs']}
        for index, (example, output, answers) in enumerate(zip(examples, outputs, given, strict=True))
    ]


def finish(config: EvaluateConfig, results: dict, skipped: dict, table: list[dict], size: str | None, chat: bool) -> None:
    """Writes summary.json and table.md, and prints the table."""
    text = report.markdown(table, size, chat)
    log('\n' + text)
    if is_main_process():
        summary = {'model': str(locate(config.model)), 'chat': chat, 'size': size, 'skipped': skipped, 'table': table}
        write_atomically(Path(config.output) / 'summary.json', json.dumps(summary, indent=1))
        lines = [f'\n{name} is left out: {why}.\n' for name, why in skipped.items()]
        write_atomically(Path(config.output) / 'table.md', printable(text + ''.join(lines)))
