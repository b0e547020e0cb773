"""Measures the main programs on the TPUs or GPUs of this machine, beside what a dry run predicts for them.

python benchmarks/on_device.py                     # about a quarter of an hour; --size=1b chooses a size yourself

Fifty training steps of the largest model whose step fits, decoding, scoring, and two iterations of PPO of the largest model whose
plan fits (at most 1.1B: its models are written to a temporary folder). Weights and tokens are random. Writes on_device.json and
prints the rows for the table "Measured" of docs/hardware.md.
"""

import dataclasses
import datetime
import json
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from llama2_jax import runtime, toy
from llama2_jax.checkpoints.directory import save_model
from llama2_jax.config import MODELS, ModelConfig, UserError
from llama2_jax.data.prompts import PromptConfig
from llama2_jax.inference import plan
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.inference.scorer import Scorer
from llama2_jax.mesh import decoding_mesh, set_mesh
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.model.reward import ScoreModel
from llama2_jax.planning.aot import Report
from llama2_jax.rl import plan as ppo_plan
from llama2_jax.rl import ppo
from llama2_jax.rl.ppo import PPOConfig
from llama2_jax.rl.rewards import RewardsConfig
from llama2_jax.runtime import chip_of
from llama2_jax.stages import pretrain
from llama2_jax.stages.pretrain import PretrainConfig
from llama2_jax.text.tables import markdown_table
from llama2_jax.text.tokenizer import Tokenizer, train_tokenizer
from llama2_jax.train.devices import to_mesh
from llama2_jax.train.metrics import read_metrics

SIZES = {  # from the largest on
    **{name: MODELS[name] for name in ('70b', '34b', '13b', '7b')},
    '1b': ModelConfig(dim=2048, layers=22, heads=32, kv_heads=4, head_dim=64, hidden=5632, context=2048),  # TinyLlama's
    '100m': ModelConfig(dim=768, layers=12, heads=12, kv_heads=12, head_dim=64, hidden=2048, context=2048),
    'tiny': MODELS['tiny'],
}

_SIZE = flags.DEFINE_enum('size', None, list(SIZES), 'Model size; by default the largest that fits.')
_STEPS = flags.DEFINE_integer('steps', 50, 'Training steps that are timed.', lower_bound=2)
_OUTPUT = flags.DEFINE_string('output', 'on_device.json', 'File for the results.')

Row = dict[str, Any]


def peak_memory() -> float | None:
    """GB that the fullest device has held since the program began; None where devices do not say."""
    peaks = [(device.memory_stats() or {}).get('peak_bytes_in_use') for device in jax.local_devices()]
    return max(peaks) / 1e9 if all(peaks) else None


def training_config(size: str) -> PretrainConfig:
    """A step of one row a device, recomputing everything."""
    model = SIZES[size]
    remat = 'none' if size == 'tiny' else 'full'
    batch_size = jax.device_count() * (8 if size == 'tiny' else 1)
    return PretrainConfig(model=model, compute=ComputeConfig(remat=remat), batch_size=batch_size, length=model.context)


def largest() -> tuple[str, Report]:
    """The largest size whose training step fits these devices, and what the dry run says of it."""
    known = chip_of(jax.devices()[0])
    for size in [_SIZE.value] if _SIZE.value else list(SIZES) if known else ['tiny']:
        try:
            return size, pretrain.dry_run(training_config(size), None)
        except UserError as error:
            print(f'{size}: {error}', flush=True)
    raise UserError('No size fits these devices.')


def train(size: str, predicted: Report) -> Row:
    """Training steps on random tokens."""
    config = training_config(size)
    mesh = set_mesh(config.mesh)
    _, init, step = pretrain.build(config, config.compute.on(jax.default_backend()))
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, (config.batch_size, config.length + 1), np.int32)
    batch = to_mesh({'tokens': tokens, 'segment_ids': np.ones_like(tokens)}, mesh)
    state, times = init(), []
    for _ in range(_STEPS.value + 2):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])  # the first two compile and warm up
    chip = chip_of(jax.devices()[0])
    flops = pretrain.flops(config) / seconds / jax.device_count()
    return {
        'program': f'training step, {size}',
        'shape': f'{config.batch_size} × {config.length:,}',
        'seconds': seconds,
        'predicted_seconds': predicted.program.seconds,
        'tokens_per_second': tokens[:, 1:].size / seconds,
        'mfu': flops / chip.peak_flops if chip else None,
        'peak_gb': peak_memory(),
        'predicted_gb': predicted.memory / 1e9,
        'loss': float(metrics['loss']),
    }


def decode(size: str, model: Llama, tokenizer: Tokenizer) -> Row:
    """Greedy continuations of random prompts."""
    config, batch_size = model.config, 64
    prompt, new = config.context // 4, config.context // 4
    engine = Engine(model, tokenizer, batch_size=batch_size)
    rng = np.random.default_rng(1)
    requests = [
        Request(rng.integers(3, config.vocab_size, prompt).tolist(), max_new_tokens=new, temperature=0.0)
        for _ in range(batch_size)
    ]
    engine.generate(requests)  # compiles
    began = time.perf_counter()
    tokens = sum(len(sample.token_ids) for [sample] in engine.generate(requests))
    seconds = time.perf_counter() - began
    report, _ = plan.compile_step(config, decoding_mesh(config), batch_size, prompt + new, False)
    return {
        'program': f'decoding, {size}',
        'shape': f'{batch_size} × {prompt:,} + {new:,}',
        'seconds': seconds,
        'predicted_seconds': report.program.seconds and report.program.seconds * new,
        'tokens_per_second': tokens / seconds,
        'peak_gb': peak_memory(),
        'predicted_gb': report.memory / 1e9,
    }


def score(size: str, config: ModelConfig, tokenizer: Tokenizer) -> Row:
    """Scores of full rows."""
    scorer = Scorer(ScoreModel(config, jax.random.key(2)), tokenizer, batch_size=16)
    rows = np.random.default_rng(3).integers(3, config.vocab_size, (64, config.context)).tolist()
    scorer.score(rows)
    began = time.perf_counter()
    scorer.score(rows)
    seconds = time.perf_counter() - began
    return {
        'program': f'scoring, {size}',
        'shape': f'64 × {config.context:,}',
        'seconds': seconds,
        'tokens_per_second': 64 * config.context / seconds,
        'peak_gb': peak_memory(),
    }


def iterate(trained: str) -> Row:
    """A PPO iteration on prompts of the toy world, with random models of at most 1.1B and no more than what was trained."""
    for size in list(SIZES)[max(list(SIZES).index(trained), list(SIZES).index('1b')) :]:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            tokenizer = train_tokenizer(list(toy.documents('stories')), home / 'tokenizer.model', 1024)
            shape = dataclasses.replace(SIZES[size], vocab_size=1024)
            for name, model in (('policy', Llama(shape, jax.random.key(0))), ('reward', ScoreModel(shape, jax.random.key(1)))):
                save_model(home / name, model, tokenizer, {'stage': 'benchmark', 'parent': None, 'step': 0})
            config = PPOConfig(
                init_from=str(home / 'policy'),
                rewards=RewardsConfig(helpfulness=str(home / 'reward'), safety=str(home / 'reward')),
                prompts=PromptConfig(mixture='toy:prompts', longest=64),
                compute=ComputeConfig(remat='none' if size == 'tiny' else 'full'),
                iterations=2, batch_size=64, minibatch_size=16, max_new_tokens=64, decode_batch=64, eval_every=2, eval_prompts=16,
            )  # fmt: skip
            try:
                predicted = ppo_plan.dry_run(config, None)
            except UserError as error:
                print(f'PPO, {size}: {error}', flush=True)
                continue
            ppo.run(config, str(home / 'run'))
            line = read_metrics(home / 'run' / 'metrics.jsonl')[-1]  # the first iteration compiles
            phases = {name.partition('/')[2]: line[name] for name in line if name.startswith('seconds/')}
            estimates = [phase.times * (phase.report.program.seconds or 0) for phase in predicted.phases]
            return {
                'program': f'PPO iteration, {size}',
                'shape': '64 × 64 + 64',
                'seconds': sum(phases.values()),
                'predicted_seconds': sum(estimates) or None,
                'phases': phases,
                'peak_gb': peak_memory(),
                'predicted_gb': predicted.peak / 1e9,
            }
    raise UserError('No size of PPO fits these devices.')


def markdown(result: Row) -> str:
    """The rows of the table "Measured" of docs/hardware.md."""

    def cell(value: float | None, form: str) -> str:
        return format(value, form) if value else '–'

    columns = {
        's': ('seconds', '.3f'), 's predicted': ('predicted_seconds', '.3f'), 'tokens/s': ('tokens_per_second', ',.0f'),
        'MFU': ('mfu', '.1%'), 'peak GB': ('peak_gb', '.2f'), 'GB predicted': ('predicted_gb', '.2f'),
    }  # fmt: skip
    device = f'{result["chips"]} × {result["device"]}'
    return markdown_table(
        {'device': device, 'program': row['program'], 'rows × tokens': row['shape']}
        | {name: cell(row.get(key), form) for name, (key, form) in columns.items()}
        for row in result['programs']
    )


def main(argv: list[str]) -> None:
    """Runs everything, writes the file and prints the table."""
    del argv
    logging.set_verbosity(logging.WARNING)
    with runtime.user_errors():
        runtime.start()
        size, predicted = largest()
        print(predicted, flush=True)
        result: Row = {
            'date': f'{datetime.date.today()}',
            'device': jax.devices()[0].device_kind,
            'chips': jax.device_count(),
            'versions': {name: metadata.version(name) for name in ('llama2_jax', 'jax', 'jaxlib', 'flax', 'optax')},
            'programs': [train(size, predicted)],
        }
        shape = dataclasses.replace(SIZES[size], vocab_size=1024)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = train_tokenizer(list(toy.documents('stories')), Path(folder) / 'tokenizer.model', 1024)
        result['programs'].append(decode(size, Llama(shape, jax.random.key(0)), tokenizer))
        result['programs'].append(score(size, shape, tokenizer))
        result['programs'].append(iterate(size))
        Path(_OUTPUT.value).write_text(json.dumps(result, indent=1) + '\n')
        print(markdown(result))


if __name__ == '__main__':
    app.run(main)
