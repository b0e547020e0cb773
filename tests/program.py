"""The pretraining stage as a program: runs on a small text, in one process or several, killed or not.

python program.py WORKDIR '{"text": "corpus.txt", …}'
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from llama2_jax import runtime
from llama2_jax.config import ModelConfig
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.mesh import replicate
from llama2_jax.stages import pretrain
from llama2_jax.stages.pretrain import PretrainConfig
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.optimizer import OptimizerConfig

WALL_CLOCK = {'tokens_per_second', 'tflops', 'mfu', 'seconds'}


def config(text, cache, steps=24, workers=0, vocab_size=384):
    """A model of some thousand parameters; the text gives its tokenizer and its tokens."""
    return PretrainConfig(
        model=ModelConfig(vocab_size=vocab_size, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=32),
        data=DataConfig(mixture=f'text:{text}', cache_dir=cache, heldout=0.1, workers=workers),
        optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=2),
        loop=LoopConfig(log_every=1, eval_every=8, sample_every=0, checkpoint_every=4),
        tokens=steps * 8 * 32,
        batch_size=8,
        length=32,
        eval_batches=2,
    )


def trained(segments, mask_documents):
    """How many targets of a batch [B, L+1] count, by a loop over them."""
    pairs = [(a, b) for row in np.asarray(segments).tolist() for a, b in zip(row, row[1:], strict=False)]
    return sum(b > 0 and (a == b or not mask_documents) for a, b in pairs)


def write_text(path):
    """Some toy documents: 40 kB."""
    from llama2_jax import toy

    documents, size = [], 0
    for document in toy.documents(toy.GENRES[0]):
        documents.append(document)
        size += len(document)
        if size > 40_000:
            break
    path.write_text('\n<|endoftext|>\n'.join(documents))
    return str(path)


def trace(workdir):
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def final(workdir):
    """The leaves of the final state."""
    with np.load(Path(workdir) / 'final.npz') as arrays:
        return [arrays[name] for name in arrays.files]


def start(arguments, devices, environment=None):
    """Starts Python in a process with so many devices."""
    # Compiled in half the time, to code that is slow.
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags} | (environment or {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def launch(workdir, devices, kill=None, environment=None, **options):
    """Starts this program in a process with so many devices."""
    return start([__file__, workdir, json.dumps(options), json.dumps(kill)], devices, environment)


def finish(*processes, code=0, seconds=300):
    """Waits for all, and sees that each ended with the exit code."""
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), '\n'.join(errors)


def members(processes):
    """The environment of each of several processes of one run."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    common = {'LLAMA2_JAX_COORDINATOR': address, 'LLAMA2_JAX_PROCESSES': str(processes)}
    return [common | {'LLAMA2_JAX_PROCESS': str(index)} for index in range(processes)]


def launch_several(workdir, processes, devices, environment=None, **options):
    """Starts the processes of one run, each with so many devices."""
    each = [(environment or {}) | member for member in members(processes)]
    return [launch(workdir, devices, environment=variables, **options) for variables in each]


def kill_one(processes, victim, workdir, step, pause=0.0):
    """Kills one of several processes `pause` seconds after step `step` was logged; what the others say as they end."""
    metrics = Path(workdir) / 'metrics.jsonl'
    while not (metrics.exists() and metrics.read_text().count('\n') >= step):
        assert all(process.poll() is None for process in processes), [process.communicate()[1] for process in processes]
        time.sleep(0.001)
    time.sleep(pause)
    processes[victim].kill()
    said = [process.communicate(timeout=250)[1] for process in processes]
    assert all(process.returncode for process in processes)
    return [text for index, text in enumerate(said) if index != victim]


def kill_self(workdir, step, pause):
    """Kills this process `pause` seconds after step `step` was logged; pause None: in the first save from there on."""
    metrics, checkpoints = Path(workdir) / 'metrics.jsonl', Path(workdir) / 'checkpoints'
    while not (metrics.exists() and metrics.read_text().count('\n') >= step):
        time.sleep(0.001)
    while pause is None and not list(checkpoints.glob('*tmp*')):
        time.sleep(0.0005)
    time.sleep(pause or 0)
    os.kill(os.getpid(), 9)


def main():
    """Runs the stage and writes the final state's leaves to final.npz."""
    workdir, options, kill = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    if kill:
        threading.Thread(target=kill_self, args=(workdir, *kill), daemon=True).start()
    with runtime.user_errors():
        runtime.start()
        state = pretrain.run(config(**options), workdir)
    leaves = [np.asarray(jax.jit(replicate)(leaf)) for leaf in jax.tree.leaves((state.params, state.opt_state))]
    if runtime.is_main_process():
        np.savez(Path(workdir) / 'final.npz', *leaves)


if __name__ == '__main__':
    main()
