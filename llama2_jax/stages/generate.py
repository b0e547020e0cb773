"""Prompts in, samples out: a file of results that an interrupted run resumes."""

import dataclasses
import difflib
import zlib
from collections.abc import Mapping
from typing import Any

from etils.epath import Path
from tqdm import tqdm

from llama2_jax.config import UserError
from llama2_jax.data.sources import as_source, read_records, rows_fingerprint
from llama2_jax.inference.engine import Engine, Request, Sample
from llama2_jax.runtime import is_main_process, log
from llama2_jax.runtime.jsonl import growing, resume
from llama2_jax.text.dialog import SPECIAL_TAGS_ERROR, encode_prompt, encode_question, has_special_tags
from llama2_jax.text.tokenizer import Tokenizer

SAMPLING = {field.name for field in dataclasses.fields(Request)} - {'token_ids', 'answer'}
PROMPTS = ('prompt', 'messages', 'token_ids')


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
    raise UserError(f'{where}: invalid value {value!r} for {name}.')


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
    log(engine.tokenizer.prompts.describe(chat))
    requests = [_request(engine, index, row, where, defaults, chat) for index, (row, where) in enumerate(rows)]
    path = Path(output)
    made_from = {**settings, **defaults, 'logprobs': logprobs, 'chat': chat, 'content of the prompts': rows_fingerprint(rows)}
    done = resume(path, made_from, [_name(index, row) for index, (row, _) in enumerate(rows)])
    if done:
        log(f'{output}: {done} of {len(rows)} are there already.')
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


def _record(sample: Sample, logprobs: bool) -> dict[str, Any]:
    record = {'text': sample.text, 'token_ids': sample.token_ids, 'stop_reason': sample.stop_reason}
    return {**record, 'logprobs': sample.logprobs} if logprobs else record
