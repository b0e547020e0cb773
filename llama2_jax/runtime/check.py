"""Preflight: what each host of a run is and has, who is missing, who differs, and whether all devices answer."""

import importlib.metadata
import os
import platform
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tensorstore
from jax.experimental import multihost_utils

from llama2_jax import runtime
from llama2_jax.config import UserError
from llama2_jax.runtime.hosts import code_fingerprint, find_process_info, handshake, join, start_timeout
from llama2_jax.text.printable import printable

PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'grain', 'numpy')
VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_PLATFORMS')  # with others a host compiles another program
STORAGE_SECONDS = 30.0


def check(directories: Sequence[str]) -> None:
    """Looks at this process and the others of its run, and prints, from process 0, what they are.

    Args:
      directories: paths or gs:// addresses that every process must be able to write to.

    Raises:
      UserError: something is missing, differs or cannot be written; the hosts are named.
    """
    process = find_process_info()
    mine = facts(directories)
    everyone = handshake(process, mine, start_timeout()) if process else [mine]
    if not process or process.index == 0:
        print(printable(describe(everyone)), flush=True)
    if faults := differences(everyone) + unwritable(everyone):
        raise UserError(' '.join(faults))
    runtime.keep_libtpu_unloaded()
    runtime.keep_compiled()
    if process:
        join(process)
    runtime.log(f'{devices()}\nReady.')


def facts(directories: Sequence[str]) -> dict[str, Any]:
    """What this host is: 'same' must be the same on all."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = 'none'
    cache = Path(os.environ.get('LLAMA2_JAX_CACHE') or Path.home())
    return {
        'host': socket.gethostname(),
        'same': {'python': platform.python_version(), 'llama2_jax': code_fingerprint()}
        | versions
        | {name: os.environ.get(name, '') for name in VARIABLES},
        'cpus': len(os.sched_getaffinity(0)),
        'memory': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        'disk': shutil.disk_usage(cache).free,
        'directories': {name: try_writing(name) for name in directories},
    }


def try_writing(directory: str) -> str:
    """Writes, reads and removes a small file; '' or what went wrong."""
    text = uuid.uuid4().hex.encode()
    name = f'preflight-{text.decode()}'
    url = directory if '://' in directory else f'file://{Path(directory).absolute()}'
    try:
        store = tensorstore.KvStore.open(url.rstrip('/') + '/').result(timeout=STORAGE_SECONDS)
        store.write(name, text).result(timeout=STORAGE_SECONDS)
        same = store.read(name).result(timeout=STORAGE_SECONDS).value == text
        store.write(name, None).result(timeout=STORAGE_SECONDS)  # removes it
    except TimeoutError:
        return f'no answer within {STORAGE_SECONDS:g} s'
    except Exception as error:  # TensorStore raises ValueError for everything
        return str(error).splitlines()[0][:200]
    return '' if same else 'what was read is not what was written'


def describe(everyone: Sequence[Mapping[str, Any]]) -> str:
    """For people: versions, and the least that a host has."""
    same = everyone[0]['same']
    least = {name: min(facts[name] for facts in everyone) for name in ('cpus', 'memory', 'disk')}
    hosts = len({facts['host'] for facts in everyone})
    lines = [
        f'processes  {len(everyone)} on {hosts} host{"s" if hosts > 1 else ""}',
        'versions   ' + ', '.join(f'{name} {value}' for name, value in same.items() if name not in VARIABLES),
        f'each has   {least["cpus"]} CPUs, {least["memory"] / 1e9:.0f} GB of memory, {least["disk"] / 1e9:.0f} GB free on disk',
    ]
    lines += [f'{name:<10} {same[name]}' for name in VARIABLES if same[name]]
    return '\n'.join(lines)


def differences(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each thing that is not the same everywhere, naming the processes that differ from most."""
    sentences = []
    for name in everyone[0]['same']:
        counts = Counter(facts['same'].get(name) for facts in everyone)
        usual = counts.most_common(1)[0][0]
        for index, facts in enumerate(everyone):
            if (value := facts['same'].get(name)) != usual:
                sentences.append(f'Process {index} on {facts["host"]} has {name} {value!r}, most have {usual!r}.')
    return sentences


def unwritable(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each process and directory that do not go together."""
    return [
        f'Process {index} on {facts["host"]} cannot write to {name}: {fault}.'
        for index, facts in enumerate(everyone)
        for name, fault in facts['directories'].items()
        if fault
    ]


def devices() -> str:
    """For people: the devices of the run, after all of them have added up a number.

    Raises:
      UserError: processes have different numbers of them.
    """
    counts = Counter(device.process_index for device in jax.devices())
    usual = Counter(counts.values()).most_common(1)[0][0]
    if faults := [f'process {index} has {count}' for index, count in sorted(counts.items()) if count != usual]:
        raise UserError(f'Most processes have {usual} devices, but {", ".join(faults)}.')
    start = time.perf_counter()
    heard = multihost_utils.process_allgather(jax.process_index() * jax.numpy.ones(1, int)).ravel().tolist()
    seconds = time.perf_counter() - start
    if heard != list(range(jax.process_count())):
        raise UserError(f'The devices do not hear each other: the processes heard are {heard}.')
    kind, count, here = jax.devices()[0].device_kind, jax.device_count(), jax.local_device_count()
    return f'devices    {count} × {kind}, {here} a process; all exchanged a number in {seconds:.2f} s'
