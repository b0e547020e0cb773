"""Bad command lines, and what our programs make of them: python benchmarks/bad_input.py [--only=TEXT]

Every row is a command that cannot be carried out. A row is right if the command ends within its time with an exit code that is
not 0, without a traceback, with a sentence on stderr that names what is wrong, and leaves no more than an unused workdir behind.
Prints the rows that are wrong, and totals by program. Each command runs in a process of its own, forked after the libraries are
imported.
"""

import argparse
import collections
import dataclasses
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Iterator
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parents[1] / 'experiments'
STAGES = (
    *('train_tokenizer', 'pretrain', 'sft', 'reward_model', 'rejection_sampling', 'ppo', 'rlhf', 'ghost_attention'),
    *('context_distillation', 'collect_preferences'),
)
UNCOMPILED = ('train_tokenizer', 'rlhf', 'ghost_attention', 'context_distillation', 'collect_preferences')  # without --dry_run
SECONDS = 30  # a command that takes longer counts as one without an end


@dataclasses.dataclass(frozen=True)
class Row:
    """One command.

    Attributes:
      program: Name of the program in experiments/.
      arguments: Its arguments.
      named: Text that the sentence must hold: the flag, field, file or row that is wrong.
    """

    program: str
    arguments: tuple[str, ...]
    named: str = ''


def rows() -> Iterator[Row]:
    """All bad commands; the files that they name are made by `make_files`."""
    for stage in STAGES:
        yield from bad_stage(stage)
        yield from bad_fields(stage)
    yield from bad_sources()
    yield from bad_models()
    yield from bad_tools()


def setting(*assignments: str) -> list[str]:
    """The flags that make these assignments."""
    return [word for assignment in assignments for word in ('--set', assignment)]


def bad_stage(stage: str) -> Iterator[Row]:
    """What every stage refuses: flags, presets, settings, workdirs."""
    work = '--workdir=new'
    yield Row(stage, ('--config=tyni', work), 'tiny')
    yield Row(stage, ('--config=', work), '--config')
    yield Row(stage, (), '--workdir')
    yield Row(stage, ('--workdir=',), '--workdir')
    yield Row(stage, (work, 'stray'), 'stray')
    yield Row(stage, (work, '--wrokdir=x'), 'wrokdir')
    yield Row(stage, (work, '--set', 'nothing'), 'nothing')
    yield Row(stage, (work, '--set', '=1'), '--set')
    yield Row(stage, (work, '--set', 'sede=1'), 'sede')
    yield Row(stage, (work, '--set', 'seed.x=1'), 'seed')
    yield Row(stage, ('--workdir=file.txt',), 'file.txt')
    yield Row(stage, ('--workdir=file.txt/below',), 'file.txt')
    yield Row(stage, ('--workdir=dangling',), 'dangling')
    yield Row(stage, ('--workdir=/proc/x',), '/proc/x')
    yield Row(stage, ('--workdir=http://example.org/x',), 'http://example.org/x')
    yield Row(stage, (f'--workdir={"x" * 300}',), 'x' * 50)
    yield Row(stage, (work, '--topology=v5e:1x1'), '--topology')
    yield Row(stage, (work, '--dry_run', '--topology='), '--topology')
    yield Row(stage, (work, '--dry_run', '--topology=v9:1x1'), '' if stage in UNCOMPILED else 'v9')


def numbers(config: typing.Any, prefix: str = '') -> Iterator[tuple[str, type]]:
    """The dotted path and type of every number in a config."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f'{prefix}{field.name}.')
        elif hint in (int, float):
            yield prefix + field.name, hint


def bad_fields(stage: str) -> Iterator[Row]:
    """Numbers that no field takes."""
    config = presets(stage)['tiny']()
    for path, kind in numbers(config):
        if path.count('.') > 1:
            continue  # the same section stands in another stage
        values = ('x', '-2', str(2**80), 'nan') if kind is int else ('x', '-1', 'nan', 'inf')
        for value in values:
            if not (value == '-1' and path.endswith('missing_eos_penalty')):
                yield Row(stage, ('--workdir=new', '--set', f'{path}={value}'), path)


def presets(stage: str) -> dict:
    """The presets of a stage."""
    return runpy.run_path(str(EXPERIMENTS / f'{stage}.py'), run_name='presets')['PRESETS']


def bad_sources() -> Iterator[Row]:
    """Data that is not there, not of its kind, or damaged."""
    fields = {
        'train_tokenizer': 'source', 'pretrain': 'data.mixture', 'sft': 'data.mixture', 'reward_model': 'data.mixture',
        'rejection_sampling': 'prompts.mixture', 'ppo': 'prompts.mixture', 'context_distillation': 'prompts',
        'ghost_attention': 'dialogs', 'collect_preferences': 'prompts',
    }  # fmt: skip
    sources = {
        '': '', 'nope': 'nope', 'toy:': 'toy', 'toy:nope': 'nope', 'text:': 'text:', 'jsonl:absent*.jsonl': 'absent*.jsonl',
        'jsonl:cut.gz': 'cut.gz', 'jsonl:not_json.jsonl': 'not_json.jsonl', 'jsonl:array.jsonl': 'array.jsonl',
        'jsonl:deep.jsonl': 'deep.jsonl',
        'jsonl:empty.jsonl': 'empty.jsonl', 'arrayrecord:file.txt': 'file.txt', 'tfds:nope/nope': 'nope', 'jsonl:fifo': 'fifo',
        'jsonl:odd.jsonl': 'odd.jsonl', 'jsonl:dangling': 'dangling', 'jsonl:latin1.jsonl': 'latin1.jsonl',
        'jsonl:rows.jsonl:-1': '-1',
        'jsonl:rows.jsonl:nan': 'nan', 'jsonl:rows.jsonl@0': '@0',
        'gs://absent-bucket-of-nobody/x': 'gs', 'jsonl:/proc/self/mem': 'mem',
    }  # fmt: skip
    judged = ('rewards.helpfulness=reward', 'rewards.safety=reward')
    models = {
        'reward_model': ('init_from=model',), 'rejection_sampling': ('sample_from=model', 'sft.init_from=model', *judged),
        'ppo': ('init_from=model', *judged), 'context_distillation': ('model=model', 'safety=reward'),
    }  # fmt: skip
    for stage, field in fields.items():
        for source, named in sources.items():
            if source or stage in ('pretrain', 'train_tokenizer'):
                yield Row(stage, ('--workdir=new', *setting(f'{field}={source}', *models.get(stage, ()))), named)


def bad_models() -> Iterator[Row]:
    """Models that are not there, or are none."""
    models = ('nope', 'file.txt', 'fifo', 'empty', 'dangling', '7b', 'http://example.org/model', 'damaged', 'deep')
    fields = {
        'sft': ('init_from',), 'reward_model': ('init_from',),
        'rejection_sampling': ('sample_from', 'rewards.helpfulness', 'rewards.safety', 'sft.init_from'),
        'ppo': ('init_from', 'rewards.helpfulness', 'rewards.safety'),
        'rlhf': ('init_from', 'base', 'rewards.helpfulness', 'rewards.safety'),
        'ghost_attention': ('model',), 'context_distillation': ('model', 'safety'), 'collect_preferences': ('models',),
    }  # fmt: skip
    for stage, names in fields.items():
        for name in names:
            for model in models:
                yield Row(stage, ('--workdir=new', *setting(f'{name}={model}')), model)
    for model in models:
        yield Row('generate', (f'--model={model}', '--prompt=x'), model)
        yield Row('chat', (f'--model={model}',), model)
        yield Row('evaluate', (f'--model={model}', '--tasks=toy', '--output=out'), model)
        yield Row('evaluate', (f'--reward_model={model}', '--preferences=toy:preferences_heldout', '--output=out'), model)
        yield Row('convert', (f'--input={model}', '--output=out'), model)
        yield Row('report', (f'--workdir={model}',), model)


def bad_tools() -> Iterator[Row]:
    """Flags and files of the tools."""
    yield Row('generate', ('--prompt=x',), 'model')
    flags = (
        *(
            'max_new_tokens=0',
            'max_new_tokens=x',
            f'max_new_tokens={2**70}',
            'num_samples=-1',
            'top_k=-1',
            'seed=-1',
            f'seed={2**70}',
        ),
        *('temperature=-1', 'temperature=nan', 'temperature=inf', 'top_p=2', 'top_p=nan', 'batch_size=0', f'batch_size={2**70}'),
    )
    for flag in flags:
        yield Row('generate', ('--model=model', '--prompt=x', f'--{flag}'), flag.partition('=')[0])
    together = ('--model=model', '--prompts=jsonl:prompts.jsonl')
    yield Row('generate', together, '--output')
    yield Row('generate', (*together, '--output=out.jsonl', '--prompt=x'), '--prompt')
    for output in ('file.txt/below', '/proc/x', 'directory', 'dangling/x', 'http://example.org/x'):
        yield Row('generate', (*together, f'--output={output}'), output)
    for name in ('samples', 'tokens', 'prompt', 'both', 'misspelt', 'ids', 'vocabulary', 'surrogate', 'temperature', 'stop'):
        yield Row('generate', ('--model=model', f'--prompts=jsonl:bad_{name}.jsonl', '--output=out.jsonl'), f'bad_{name}.jsonl')
    evaluated = ('--model=model', '--output=out')
    yield Row('evaluate', (), '--model')
    for flag in ('tasks=nope', 'tasks=', 'limit=-1', 'shots=-1', 'samples=0', 'batch_size=0', 'seed=-1'):
        yield Row('evaluate', (*evaluated, '--tasks=toy', f'--{flag}'), flag.partition('=')[0])
    yield Row('evaluate', ('--model=model', '--tasks=toy'), '--output')
    for output in ('file.txt', 'file.txt/below', '/proc/x', 'http://example.org/x'):
        yield Row('evaluate', ('--model=model', '--tasks=toy', f'--output={output}'), output)
    yield Row('evaluate', (*evaluated, '--tasks=mmlu', '--data_dir=absent'), 'absent')
    yield Row('evaluate', (*evaluated, '--versus=model'), '--prompts')
    yield Row('evaluate', (*evaluated, '--versus=nope', '--prompts=toy:prompts', '--judge=toy'), 'nope')
    for judge in ('nope', 'model:', 'model:nope', 'reward_model:nope', 'reward_model:model'):
        yield Row(
            'evaluate', (*evaluated, '--versus=model', '--prompts=toy:prompts', f'--judge={judge}'), judge.partition(':')[0]
        )
    yield Row('convert', (), 'input')
    yield Row('convert', ('--input=model',), '--output')
    for output in ('', 'file.txt', 'directory', '/proc/x', 'file.txt/below', 'http://example.org/x'):
        yield Row('convert', ('--input=model', f'--output={output}'), output)
    yield Row('convert', ('--input=model', '--output=out', '--to=nope'), 'nope')
    yield Row('convert', ('--input=model', '--output=out', '--dtype=int4'), 'int4')
    yield Row('convert', ('--input=model', '--output=out', '--shards=3'), 'shards')
    yield Row('convert', ('--input=model', '--output=out', '--verify'), '--verify')
    yield Row('convert', ('--input=model', '--against=nope'), 'nope')
    yield Row('convert', (b'--input=\xff\xfe'.decode(errors='surrogateescape'), '--output=out'), '\\udcff')
    for flag in ('temperature=-1', 'temperature=nan', 'top_p=-0.1', 'max_new_tokens=0', 'seed=-1'):
        yield Row('chat', ('--model=model', f'--{flag}'), flag.partition('=')[0])
    for workdir in ('absent', 'empty', 'file.txt', 'run_list'):
        yield Row('report', (f'--workdir={workdir}',), workdir)
    yield Row('report', ('--workdir=run_nan', '--output=file.txt/below'), 'file.txt')
    yield Row('demo', ('--workdir=absent',), 'absent')
    yield Row('demo', ('--workdir=empty',), 'empty')


def make_files(folder: Path) -> None:
    """The files and directories that the rows name."""
    message = [{'role': 'user', 'content': 'Hello'}]
    text = {
        'file.txt': 'some text\n',
        'empty.jsonl': '',
        'rows.jsonl': json.dumps({'text': 'Hello'}) + '\n',
        'prompts.jsonl': json.dumps({'prompt': 'Hello'}) + '\n',
        'not_json.jsonl': '{"text": \n',
        'array.jsonl': '[1, 2]\n3\n',
        'deep.jsonl': '[' * 100_000 + ']' * 100_000 + '\n',
        'odd.jsonl': '{"colour": "green"}\n',
        'bad_samples.jsonl': json.dumps({'prompt': 'x', 'num_samples': 10**9}),
        'bad_tokens.jsonl': json.dumps({'prompt': 'x', 'max_new_tokens': 2**70}),
        'bad_prompt.jsonl': json.dumps({'prompt': 3}),
        'bad_both.jsonl': json.dumps({'prompt': 'x', 'messages': message}),
        'bad_misspelt.jsonl': json.dumps({'prompt': 'x', 'temprature': 0.5}),
        'bad_ids.jsonl': json.dumps({'token_ids': ['a']}),
        'bad_vocabulary.jsonl': json.dumps({'token_ids': [1, 2**40]}),
        'bad_surrogate.jsonl': '{"prompt": "\\ud800"}',
        'bad_temperature.jsonl': '{"prompt": "x", "temperature": NaN}',
        'bad_stop.jsonl': json.dumps({'prompt': 'x', 'stop': [3]}),
    }
    for name, content in text.items():
        (folder / name).write_text(content)
    (folder / 'latin1.jsonl').write_bytes('{"text": "é"}\n'.encode('latin-1'))
    (folder / 'cut.gz').write_bytes(bytes.fromhex('1f8b0800000000000003cb48'))
    os.mkfifo(folder / 'fifo')
    (folder / 'dangling').symlink_to('nothing-there')
    for name in ('empty', 'directory'):
        (folder / name).mkdir()
    (folder / 'directory' / 'x').write_text('x')
    for name, content in {'damaged': '{"model": {', 'deep': '[' * 100_000}.items():
        (folder / name).mkdir()
        (folder / name / 'config.json').write_text(content)
    for name, line in {'run_nan': '{"step": 1, "loss": NaN}', 'run_list': '[1]'}.items():
        (folder / name).mkdir()
        (folder / name / 'config.json').write_text('{}')
        (folder / name / 'metrics.jsonl').write_text(line + '\n')
    make_models(folder / 'model', folder / 'reward')


def make_models(path: Path, reward: Path) -> None:
    """A language model and a reward model of a few parameters, with a tokenizer of their own."""
    import jax

    from llama2_jax import toy
    from llama2_jax.checkpoints.directory import save_model
    from llama2_jax.config import ModelConfig
    from llama2_jax.model.llama import Llama
    from llama2_jax.model.reward import ScoreModel
    from llama2_jax.text.tokenizer import Tokenizer, train_tokenizer

    file = path.with_name('made.model')
    documents = (text for text, _ in zip(toy.documents(toy.GENRES[0]), range(300), strict=False))
    train_tokenizer(documents, file, 384)
    config = ModelConfig(vocab_size=384, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=512)
    for place, model in ((path, Llama(config, jax.random.key(0))), (reward, ScoreModel(config, jax.random.key(0)))):
        save_model(place, model, Tokenizer(file), {'stage': 'sft', 'parent': None, 'step': 1})


def run(row: Row, folder: Path) -> str:
    """What is wrong with how a program refuses a row; '' if nothing."""
    before = {path.name for path in folder.iterdir()}
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            be(row, folder, output.fileno())
        code = wait(child)
        output.seek(0)
        shown = output.read().decode(errors='replace')
    last = shown.strip().splitlines()[-1] if shown.strip() else ''
    left = [name for name in sorted({path.name for path in folder.iterdir()} - before) if clear(folder / name)]
    if code is None:
        return f'no end within {SECONDS} s'
    if 'Traceback' in shown:
        return f'traceback: {last[:200]}'
    if code == 0:
        return 'exit code 0'
    if code < 0:
        return f'killed by signal {-code}'
    if row.named and row.named not in shown:
        return f'does not name {row.named!r}: {last[:200]}'
    return f'left behind: {", ".join(left)}' if left else ''


def clear(path: Path) -> bool:
    """Removes what a command has left; returns whether that is more than an unused workdir."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return True
    unused = {file.name for file in path.iterdir()} <= {'config.json', '.lock'}
    shutil.rmtree(path)
    return not unused


def be(row: Row, folder: Path, output: int) -> None:
    """Becomes the program, and ends."""
    os.setsid()
    os.chdir(folder)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(os.devnull, os.O_WRONLY), 1), (output, 2)):
        os.dup2(source, target)
    program = str(EXPERIMENTS / f'{row.program}.py')
    sys.argv = [program, *row.arguments]
    sys.path.insert(0, str(EXPERIMENTS))
    code = 1
    try:
        runpy.run_path(program, run_name='__main__')
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int | None:
    """The exit code of a process, negative for a signal; None if it had to be ended."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    """Runs all rows and prints what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='Run only the rows whose command holds this text.')
    only = parser.parse_args().only
    os.environ['GLIBC_TUNABLES'] = os.environ.get('GLIBC_TUNABLES', '')  # set: the programs do not restart themselves
    wrong, total = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory(prefix='bad-input-') as name:
        folder = Path(name)
        if not os.fork():  # JAX starts threads when it is used, and threads do not survive a fork
            make_files(folder)
            os._exit(0)
        os.wait()
        sys.path.insert(0, str(EXPERIMENTS))
        for row in rows():
            command = ' '.join([row.program, *row.arguments]).encode(errors='backslashreplace').decode()
            if only not in command:
                continue
            total[row.program] += 1
            if fault := run(row, folder):
                wrong[row.program] += 1
                print(f'{command}\n    {fault}', flush=True)
    print()
    for program, count in total.items():
        print(f'{program:<22} {count - wrong[program]:4} of {count:4} right')
    print(f'{"all":<22} {total.total() - wrong.total():4} of {total.total():4} right')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
