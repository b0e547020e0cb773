"""Prompts in, samples out: a file of them, resumable, and what one step of decoding would take on devices that are not here."""

import contextlib
import dataclasses
import difflib
import glob
import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from etils.epath import Path
from jax.sharding import Mesh
from tqdm import tqdm

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.convert.fingerprint import fingerprint
from llama2_jax.convert.load import load_model, load_score_model, open_model, shape_of
from llama2_jax.data.sources import read_records
from llama2_jax.files import locate, read_json, write_atomically
from llama2_jax.mesh import MeshConfig, decoding_mesh, make_mesh
from llama2_jax.model import decode
from llama2_jax.model.engine import Engine, Request, Sample
from llama2_jax.model.llama import Compute
from llama2_jax.model.scorer import Scorer
from llama2_jax.runtime import barrier, is_main_process, say
from llama2_jax.stages.rows import growing, resume_rows
from llama2_jax.text.dialog import SPECIAL_TAGS_ERROR, encode_prompt, encode_question, has_special_tags
from llama2_jax.text.template import PromptFormat
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train import aot
from llama2_jax.train.workdir import differences

SAMPLING = {field.name for field in dataclasses.fields(Request)} - {'token_ids', 'answer'}
PROMPTS = ('prompt', 'messages', 'token_ids')


def open_engine(model: str | Path, batch_size: int = 32, int8: bool = False, own_template: bool = True) -> Engine:
    """An engine on all devices for a model of any format (`convert.load`), whose tokenizer knows how the model is prompted.

    Args:
      own_template: dialogs follow the model's own chat template, if it has one. Without it, as where answers are drawn to be
        trained on, they follow LLaMA 2's format, which all that is trained here follows.

    Raises:
      UserError: the model cannot be read.
    """
    source = open_model(model)
    mesh = decoding_mesh(source.config)
    with _room(mesh):
        parameters, tokenizer = load_model(model, dtype=Compute().on(mesh.devices.flat[0].platform).dtype)
    tokenizer.prompts = source.prompts if own_template else note_llama2(model, source.prompts)
    return Engine(parameters, tokenizer, mesh=mesh, batch_size=batch_size, int8=int8)


def note_llama2(model: str | Path, prompts: PromptFormat) -> PromptFormat:
    """LLaMA 2's format, in place of a model's own template; says so where that makes a difference."""
    if prompts.template:
        say(f"{model} has a chat template of its own; what is trained here follows LLaMA 2's chat format.")
    return dataclasses.replace(prompts, template='')


def open_scorer(model: str | Path, batch_size: int = 32) -> Scorer:
    """A scorer on all devices for a reward model of any format, with the shift that its config.json tells.

    Raises:
      UserError: the model cannot be read, or is a language model.
    """
    mesh = make_mesh(MeshConfig())
    with _room(mesh):
        parameters, tokenizer = load_score_model(model, dtype=Compute().on(mesh.devices.flat[0].platform).dtype)
    shift = open_model(model).provenance.get('scores', {}).get('shift', 0.0)
    return Scorer(parameters, tokenizer, mesh=mesh, batch_size=batch_size, shift=shift)


def _room(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Where to load: one device might not have room for the model as it is stored beside the model as it is used."""
    return jax.set_mesh(make_mesh(MeshConfig(), jax.devices('cpu')[:1]) if mesh.size == 1 else mesh)


def make_request(
    row: Mapping[str, Any], tokenizer: Tokenizer, defaults: Mapping[str, Any], where: str, chat: bool = False
) -> Request:
    """A request from a row {"prompt": text}, {"messages": […]} or {"token_ids": […]}, perhaps with sampling settings of its own.

    Args:
      row: other fields are left alone, but for misspelt settings.
      tokenizer: the model's.
      defaults: settings that the row does not have.
      where: what to call the row in errors.
      chat: a prompt is a user's message; otherwise, and if it is blank, plain text to continue. Messages are always a dialog.

    Raises:
      UserError: naming the row and the field.
    """
    given = [name for name in PROMPTS if name in row]
    if len(given) != 1:
        raise UserError(f'{where}: a row has one of {", ".join(PROMPTS)}, not {" and ".join(given) or "none of them"}.')
    for name in row.keys() - SAMPLING:
        if close := difflib.get_close_matches(name, SAMPLING, n=1, cutoff=0.8):
            raise UserError(f'{where}: unknown field {name!r}; did you mean {close[0]!r}?')
    settings = dict(defaults) | {name: row[name] for name in SAMPLING & row.keys()}
    for name, value in settings.items():
        settings[name] = _setting(name, value, where)
    prompt, answer = row[given[0]], given[0] == 'messages'
    if given[0] == 'messages':
        ids = encode_prompt(prompt, tokenizer, where)
    elif given[0] == 'prompt':
        if not isinstance(prompt, str):
            raise UserError(f'{where}: "prompt" is {prompt!r}, not a text.')
        answer = chat and bool(prompt.strip())
        ids = encode_question(prompt, tokenizer, answer, where)
    else:
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise UserError(f'{where}: "token_ids" is not a list of whole numbers.')
        ids = prompt
    try:
        return Request(ids or [tokenizer.bos_id], answer=answer, **settings)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def _setting(name: str, value: Any, where: str) -> Any:
    """A sampling setting of the type that a request has."""
    if name in ('stop', 'stop_token_ids'):
        items, kind = (value if isinstance(value, list | tuple) else [value]), (str if name == 'stop' else int)
        if all(type(item) is kind for item in items):
            return tuple(items)
    elif type(value) is int or (type(value) is float and name in ('temperature', 'top_p')):
        return value
    raise UserError(f'{where}: {name} is {value!r}, which it cannot be.')


def run(
    engine: Engine,
    prompts: str,
    output: str,
    defaults: Mapping[str, Any],
    settings: Mapping[str, Any],
    logprobs: bool = False,
    chat: bool | None = None,
) -> None:
    """Continues the prompts of a file; results are written as they come, in the order of the prompts.

    A line is {"id", "samples": [{"text", "token_ids", "stop_reason"}]}, with "logprobs" on demand; token ids are the new ones,
    EOS included. The same call again goes on where the last one stopped.

    Args:
      engine: of the model.
      prompts: a source of rows (`data.sources`), or the path of a .jsonl file.
      output: the .jsonl file to write.
      defaults: sampling settings of rows without their own; the seed of a row is made of that and its number.
      settings: what `output` depends on besides; another call with other settings is refused.
      logprobs: writes those too.
      chat: whether texts in "prompt" are users' messages; None: if the model says that it chats.

    Raises:
      UserError: a row that is not a prompt (all are looked at first), or an output of other settings.
    """
    rows = [(record.fields, record.where) for record in read_records(as_source(prompts))]
    chat = engine.tokenizer.prompts.chat if chat is None else chat
    say(engine.tokenizer.prompts.describe(chat))
    requests = [_request(engine, index, row, where, defaults, chat) for index, (row, where) in enumerate(rows)]
    path = Path(output)
    made_from = {**settings, **defaults, 'logprobs': logprobs, 'chat': chat, 'content of the prompts': rows_fingerprint(rows)}
    done = resume(path, made_from, [_name(index, row) for index, (row, _) in enumerate(rows)])
    if done:
        say(f'{output}: {done} of {len(rows)} are there already.')
    blocked = [_is_blocked(row, chat) for row, _ in rows]
    results = engine.generate(request for request, skip in zip(requests[done:], blocked[done:], strict=True) if not skip)
    tokens = 0
    bar = tqdm(total=len(rows), initial=done, unit='prompt', dynamic_ncols=True, disable=not is_main_process())
    with bar, growing(path) as add:
        for index in range(done, len(rows)):
            refused = [Sample(SPECIAL_TAGS_ERROR, [], [], 'stop')] * requests[index].num_samples
            samples = refused if blocked[index] else next(results)
            add({'id': _name(index, rows[index][0]), 'samples': [_record(sample, logprobs) for sample in samples]})
            tokens += sum(len(sample.token_ids) for sample in samples)
            bar.update()
            bar.set_postfix_str(f'{tokens / max(bar.format_dict["elapsed"], 1e-9):,.0f} tokens/s')


def _request(engine: Engine, index: int, row: Mapping[str, Any], where: str, defaults: Mapping[str, Any], chat: bool) -> Request:
    own_seed = {'seed': zlib.crc32(f'{defaults["seed"]} {index}'.encode())}
    request = make_request(row, engine.tokenizer, {**defaults, **own_seed}, where, chat)
    engine.check(request, where)
    return request


def _is_blocked(row: Mapping[str, Any], chat: bool) -> bool:
    """Whether a dialog holds the format's own tags, and so is not answered (recipe J)."""
    messages = [{'content': row['prompt']}] if chat and 'prompt' in row else row.get('messages', ())
    return has_special_tags(messages)


def _name(index: int, row: Mapping[str, Any]) -> Any:
    return row.get('id', index)


def as_source(rows: str) -> str:
    """A source of rows, or the path of a file of rows as one."""
    if re.match(r'(toy|rows|jsonl|arrayrecord|tfds):', rows):
        return rows
    return f'jsonl:{glob.escape(rows) if Path(rows).exists() else rows}'  # a file's own name may hold [ or *


def rows_fingerprint(rows: list[tuple[Any, str]]) -> int:
    """A number that changes with rows (content, where)."""
    return zlib.crc32(json.dumps([row for row, _ in rows], sort_keys=True, default=str).encode())


def _record(sample: Sample, logprobs: bool) -> dict[str, Any]:
    record = {'text': sample.text, 'token_ids': sample.token_ids, 'stop_reason': sample.stop_reason}
    return {**record, 'logprobs': sample.logprobs} if logprobs else record


def identity(model: str, int8: bool = False) -> dict[str, Any]:
    """What results depend on of a model: where it lies, what it is, and in which precision it is used."""
    return {'model': str(locate(model)), 'content of the model': fingerprint(model), 'int8': int8}


def check_settings(path: Path, settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Compares settings with those that were recorded for the results in `path`.

    Raises:
      UserError: they differ, naming the first one.
    """
    for field, ours, theirs in differences(settings, recorded):
        raise UserError(f'{path} holds results for {field}={theirs}, and this command has {field}={ours}: give another --output.')


def resume(path: Path, settings: Mapping[str, Any], names: list[Any]) -> int:
    """How many results are there already; a last line that was cut short goes. Every process comes to the same count.

    Args:
      path: of the results; their settings are in a file beside it.
      settings: what the results depend on.
      names: the ids of all results.

    Raises:
      UserError: the results are of other settings, or not in the order of `names`.
    """
    beside = path.with_name(path.name + '.settings')
    if not path.exists():
        barrier('no output yet')
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(beside, json.dumps(settings))
            write_atomically(path, '')
        barrier('output made')
        return 0
    if not beside.exists():
        raise UserError(f'{path} is there without {beside.name}, so what it was made from is not known: give another --output.')
    check_settings(path, settings, read_json(beside))
    rows = resume_rows(path)
    if [row.get('id') for row in rows] != names[: len(rows)]:
        raise UserError(f'{path} is damaged: its lines are not results of the prompts in their order; remove it to begin anew.')
    return len(rows)


def dry_run(model: str, topology: str | None, batch_size: int, length: int, int8: bool) -> str:
    """Compiles one step of decoding for the devices here, or for a TPU slice that need not be there; the report, for people.

    Args:
      model: a size, such as '7b', or any model.
      topology: such as 'v5p:2x2x4'; None: the devices here.
      batch_size: sequences at a time.
      length: places of the cache, all of which are read.
      int8: weights in eight bits.

    Raises:
      UserError: it does not fit.
    """
    config = shape_of(model)
    mesh = decoding_mesh(config, aot.topology_devices(topology) if topology else None)
    report, floor = compile_step(config, mesh, batch_size, length, int8)
    report.check()
    lines = [f'mesh             {" × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())}', str(report)]
    if report.program.seconds:
        ratio = report.program.seconds / floor
        lines.append(f'memory bound     {floor * 1e3:.3f} ms to read weights and cache once; predicted {ratio:.2f} times that')
    return '\n'.join(lines)


def compile_step(config: ModelConfig, mesh: Mesh, batch_size: int, length: int, int8: bool) -> tuple[aot.Report, float]:
    """The report on one step, and the seconds in which a chip's memory gives its weights and cache once (0 if unknown)."""
    device = mesh.devices.flat[0]
    dtype = Compute().on(device.platform).dtype
    with jax.set_mesh(mesh):
        weights = decode.abstract_weights(config, dtype, int8)
        cache = jax.eval_shape(lambda: decode.empty_cache(config, batch_size, length, dtype))
        rows = decode.abstract_rows(batch_size)
        uniform = jax.eval_shape(decode.uniform, rows)
        progress = jax.eval_shape(decode.beginning, cache, rows)
        step = jax.jit(lambda given, progress: decode.decode_token(*given, progress), donate_argnums=1)
        options = decode.compiler_options(device)
        compiled = aot.compile_step(step, (weights, cache, rows, uniform), progress, mesh, options)
    report = aot.analyse(compiled, mesh, batch_size, model_flops=0)
    held = [(leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(aot.on_mesh((weights, cache), mesh))]
    size = sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in held)
    return report, size / report.chip.bandwidth if report.chip else 0.0
