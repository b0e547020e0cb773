"""Who is missing is named: at the start, at a barrier, in the middle of a run; and what is compiled is kept."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import served_bucket

from llama2_jax.config import UserError
from llama2_jax.runtime.check import differences, unwritable
from llama2_jax.runtime.hosts import ProcessInfo, Watch, find_process_info, handshake, name_all

HOST = socket.gethostname()


def free_address():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return f'localhost:{free.getsockname()[1]}'


def launch(count, index, address, *arguments, **variables):
    several = {'LLAMA2_JAX_COORDINATOR': address, 'LLAMA2_JAX_PROCESSES': str(count), 'LLAMA2_JAX_PROCESS': str(index)}
    environment = os.environ | {'XLA_FLAGS': '', 'LLAMA2_JAX_TIMEOUT': '300'} | several | variables
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **pipes)


def call(address, count, indices, seconds=0.5):
    """What each of these processes gets from a roll call: the facts of all, or an error."""

    def one(index):
        try:
            return handshake(ProcessInfo(address, count, index), {'host': f'host-{index}'}, seconds)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as threads:
        return list(threads.map(one, indices))


def test_handshake():
    everyone = [{'host': f'host-{index}'} for index in range(4)]
    assert call(free_address(), 4, [2, 0, 3, 1], 20) == [everyone] * 4


def test_handshake_names_the_missing(monkeypatch):
    assert call(free_address(), 4, [0, 2]) == ['Did not come within 0.5 s: process 1, process 3.'] * 2
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 't-0,t-1,t-2')
    assert call(free_address(), 3, [0, 1]) == ['Did not come within 0.5 s: process 2 on t-2.'] * 2
    address = free_address()
    assert call(address, 3, [1]) == [f'Process 1 on {HOST} has not reached process 0 at {address} in 0.5 s.']
    assert name_all(range(11), [f'h{i}' for i in range(11)]).endswith('process 7 on h7 and 3 more')


def test_handshake_of_different_runs():
    address = free_address()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(call, address, 3, [0], 5)
        second = threads.submit(call, address, 2, [1], 5)
        assert first.result() == second.result() == ['Process 1 on host-1 counts 2 processes, process 0 counts 3.']


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({'LLAMA2_JAX_COORDINATOR': 'a:1'}, 'LLAMA2_JAX_PROCESSES and LLAMA2_JAX_PROCESS must be whole numbers'),
        ({'LLAMA2_JAX_COORDINATOR': 'a:1', 'LLAMA2_JAX_PROCESSES': '2', 'LLAMA2_JAX_PROCESS': '2'}, 'PROCESS=2 one of 0 to 1'),
        ({'LLAMA2_JAX_COORDINATOR': 'a', 'LLAMA2_JAX_PROCESSES': '2', 'LLAMA2_JAX_PROCESS': '1'}, 'a must be host:port'),
        ({'LLAMA2_JAX_COORDINATOR': 'auto'}, 'auto finds neither a TPU pod nor a Slurm job'),
        ({'LLAMA2_JAX_COORDINATOR': 'auto', 'LLAMA2_JAX_TIMEOUT': 'soon'}, 'LLAMA2_JAX_TIMEOUT=soon must be a number'),
    ],
)
def test_mistakes_in_the_environment(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        find_process_info()


def test_a_barrier_names_who_has_not_come():
    program, address = Path(__file__).with_name('hosts_program.py'), free_address()
    first, second = (launch(2, index, address, program, 'barrier') for index in (0, 1))
    try:
        out, err = first.communicate(timeout=200)
    finally:
        second.kill()
        second.communicate()
    assert (first.returncode, out.count('done')) == (1, 0)
    assert f"Waiting at the barrier 'the roof is on' for process 1 on {HOST}." in err
    assert f"Error: Not at the barrier 'the roof is on' within 5 s: process 1 on {HOST}. The same command" in err
    assert 'Traceback' not in err


def test_a_run_that_stands_still_says_who_is_behind():
    program, address = Path(__file__).with_name('hosts_program.py'), free_address()
    results = [p.communicate(timeout=200) for p in [launch(2, index, address, program, 'watch') for index in (0, 1)]]
    assert f'No step for 5 s: process 1 on {HOST} at step 3 of 4.' in results[0][1]
    assert 'No step' not in results[1][1]
    assert ['done' in out for out, _ in results] == [True, False]  # process 0 speaks for all


def test_who_has_fallen_silent(capsys):
    watch = Watch()
    watch._look([('beat/0', '3 0'), ('beat/1', '3 0')], limit=0.1)
    time.sleep(0.05)
    watch._look([('beat/0', '3 1'), ('beat/1', '3 0')], limit=0.1)
    assert capsys.readouterr().err == 'Not heard of for 0.02 s: process 1.\n'


def test_check_of_two_processes_and_a_bucket(tmp_path):
    with served_bucket.serve() as url:
        storage = {'TENSORSTORE_GCS_HTTP_URL': url, 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x'}
        arguments = ('-m', 'llama2_jax.runtime', 'check', 'gs://bucket/run', tmp_path)
        address = free_address()
        processes = [launch(2, index, address, *arguments, **storage) for index in (0, 1)]
        (out, err), (quiet, _) = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], err
    assert out.startswith('processes  2 on 1 host\nversions   python 3.') and out.endswith('\nReady.\n')
    assert 'devices    2 × cpu, 1 a process; all exchanged a number in' in out
    assert 'Ready' not in quiet and 'devices' not in quiet
    assert served_bucket.Bucket.objects == {} and list(tmp_path.iterdir()) == []


def test_check_names_who_differs():
    facts = {'host': 'a', 'same': {'jax': '1', 'python': '3'}, 'directories': {'gs://b': ''}}
    other = {'host': 'b', 'same': {'jax': '2', 'python': '3'}, 'directories': {'gs://b': 'no rights'}}
    assert differences([facts, facts, other]) == ["Process 2 on b has jax '2', most have '1'."]
    assert unwritable([facts, other]) == ['Process 1 on b cannot write to gs://b: no rights.']


def test_check_of_a_directory_that_cannot_be_written():
    process = launch(1, 0, '', '-m', 'llama2_jax.runtime', 'check', '/proc/1')
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and out.startswith('processes  1 on 1 host')
    assert err.startswith(f'Error: Process 0 on {HOST} cannot write to /proc/1: ') and err.count('\n') == 1


def test_what_is_compiled_is_kept_by_kind_of_processor(tmp_path):
    text = 'import jax, json; from llama2_jax import runtime; runtime.start(); print(json.dumps(['
    text += 'jax.config.jax_compilation_cache_dir]))'
    environment = {'PATH': '/usr/bin', 'JAX_PLATFORMS': 'cpu'}
    run = partial(subprocess.run, [sys.executable, '-c', text], capture_output=True, text=True, check=True)
    [kept] = json.loads(run(env=environment | {'HOME': str(tmp_path)}).stdout)
    assert Path(kept).parent == tmp_path / '.cache/llama2_jax/compiled' and Path(kept).is_dir()
    assert json.loads(run(env=environment | {'LLAMA2_JAX_CACHE': '/proc/1'}).stdout) == [None]
    assert json.loads(run(env=environment | {'JAX_COMPILATION_CACHE_DIR': '/x'}).stdout) == ['/x']


@pytest.mark.parametrize(('tasks', 'devices'), [(1, ['all']), (2, ['0', '1'])])
def test_a_slurm_task_takes_all_gpus_of_its_node_unless_there_are_others(tasks, devices):
    """JAX itself would give the only task of a node the first GPU alone."""
    code = """
from jax._src import xla_bridge
from llama2_jax.runtime import hosts
hosts.join(hosts.find_process_info())
print(xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""
    port = free_address().rpartition(':')[2]
    job = {'JOB_ID': '7', 'STEP_NODELIST': 'localhost', 'STEP_NUM_NODES': '1', 'NTASKS': str(tasks)}
    running = []
    for index in range(tasks):
        slurm = job | {'PROCID': str(index), 'LOCALID': str(index)}
        environment = {**os.environ, 'LLAMA2_JAX_COORDINATOR': 'auto', 'JAX_COORDINATOR_PORT': port}
        environment |= {f'SLURM_{name}': value for name, value in slurm.items()}
        running.append(subprocess.Popen([sys.executable, '-c', code], env=environment, stdout=subprocess.PIPE, text=True))
    assert [task.communicate(timeout=60)[0].strip() for task in running] == devices
