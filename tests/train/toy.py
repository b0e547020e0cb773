"""The smallest run that `fit` can do, as a function and as a program: least squares with Adam on a mesh of all devices.

Nothing of it can be exact by luck: Adam has moments, and every batch differs.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import UserError
from llama2_jax.train.loop import LoopConfig, fit

ROWS, D, F = 16, 24, 8


class Linear(nnx.Module):
    def __init__(self, key, width=D):
        spec = P('data') if jax.sharding.get_abstract_mesh().shape else None
        self.w_DF = nnx.Param(jax.random.normal(key, (width, F), out_sharding=spec))
        self.b_F = nnx.Param(jnp.zeros(F))


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any


ADAM = optax.adam(1e-2)


def make_state(width=D):
    params = Linear(jax.random.key(0), width)
    return State(jnp.int32(0), params, ADAM.init(params))


def loss_fn(params, batch):
    x, y = batch
    w_DF = params.w_DF[...]
    if jax.sharding.get_abstract_mesh().shape:
        w_DF = jax.sharding.reshard(w_DF, P())  # the rows are cut over the devices as well
    return jnp.mean((x @ w_DF + params.b_F[...][None] - y) ** 2)


def step_fn(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    updates, opt_state = ADAM.update(grads, state.opt_state)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (state.params, state.opt_state))
    metrics = {'loss': loss, 'grad_norm': norm, 'update_norm': optax.tree.norm(updates), 'learning_rate': jnp.float32(1e-2)}
    return State(state.step + 1, params, opt_state), metrics | {'tokens': jnp.float32(ROWS), 'finite': finite}


def batches(start, bad=()):
    """Batch k is a function of k; the ids of its rows are (k, row)."""
    for k in range(start, 1000):
        rng = np.random.default_rng(k)
        x, noise = rng.normal(size=(ROWS, D)), rng.normal(size=(ROWS, F))
        y = x[:, :F] * 2 + 0.1 * noise
        if k + 1 in bad:
            y[3] = np.nan
        yield (x.astype(np.float32), y.astype(np.float32)), [(k, row) for row in range(ROWS)]


def on_devices(mesh, data):
    for (x, y), records in data:
        arrays = [jax.make_array_from_callback(a.shape, NamedSharding(mesh, P('data')), lambda i, a=a: a[i]) for a in (x, y)]
        yield tuple(arrays), records


def run(workdir, steps=40, bad=(), slow=0.0, width=D, callback=None, stop=None, **loop):
    """Trains and returns the state. `slow` seconds are slept a step; `callback(k)` is called as batch k is taken."""
    mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        init = jax.jit(lambda: make_state(width))
        heldout = next(on_devices(mesh, batches(999)))[0]
        measure = jax.jit(loss_fn)

        def data(start):
            for k, batch in enumerate(on_devices(mesh, batches(start, bad)), start=start + 1):
                if stop is not None and k > stop:
                    return
                if callback:
                    callback(k)
                time.sleep(slow)
                yield batch

        return fit(
            workdir,
            LoopConfig(**{'log_every': 1, 'eval_every': 10, 'sample_every': 20, 'checkpoint_every': 5, **loop}),
            abstract_state=jax.eval_shape(init),
            init=init,
            step=jax.jit(step_fn, donate_argnums=0),
            batches=data,
            steps=steps,
            describe=lambda records: [f'batch {k} row {row}' for k, row in records],
            evaluate=lambda state: {'heldout/loss': float(measure(state.params, heldout))},
            sample=lambda state: f'The bias is {float(jnp.sum(state.params.b_F[...])):.9f}.',
            flops_per_step=6.0 * ROWS * D * F,
            peak_flops=1e12,
        )


WALL_CLOCK = {'tokens_per_second', 'tflops', 'mfu', 'seconds'}


def trace(workdir):
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def launch(workdir, options, process=None, devices=None):
    """Starts `main` in a process of its own, with as many devices; `process` is (index, count, coordinator's address)."""
    flags = f'--xla_force_host_platform_device_count={devices or jax.device_count()}'
    arguments = [sys.executable, '-W', 'error', __file__, str(workdir), json.dumps(options), *map(str, process or ())]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def kill_in_a_save(workdir):
    """Waits for a save to begin, as seen by its unfinished directory, and kills this process."""
    while not list(Path(workdir, 'checkpoints').glob('*tmp*')):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def at(number, what):
    """A callback that does `what` as batch `number` is taken."""
    return lambda k: what() if k == number else None


def main():
    """Runs with the keyword arguments in argv[2] as JSON; as process argv[3] of argv[4] at argv[5], if given."""
    workdir, options = sys.argv[1], json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        jax.distributed.initialize(sys.argv[5], int(sys.argv[4]), int(sys.argv[3]))
    kill = options.pop('kill', {})
    for name, number in (('sigterm', signal.SIGTERM), ('sigint', signal.SIGINT)):
        if name in kill:
            options['callback'] = at(kill[name], partial(os.kill, os.getpid(), number))
    if 'timer' in kill:
        timer = threading.Timer(kill['seconds'], os.kill, (os.getpid(), signal.SIGKILL))
        options['callback'] = at(kill['timer'], timer.start)
    if 'save' in kill:
        thread = threading.Thread(target=kill_in_a_save, args=(workdir,), daemon=True)
        options['callback'] = at(kill['save'], thread.start)
    try:
        state = run(workdir, **options)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    if jax.process_count() == 1:
        np.savez(Path(workdir) / 'final.npz', *[np.asarray(leaf) for leaf in jax.tree.leaves(state)])


if __name__ == '__main__':
    main()
