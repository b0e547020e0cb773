#!/usr/bin/env bash
# Runs a command on every host of the pod, in the background there, and shows what the first host says until it ends.
#
#   tpu_setup/run.sh 'python experiments/pretrain.py --config=llama2_7b --workdir=/mnt/BUCKET/run'
#   tpu_setup/run.sh --check [gs://BUCKET …]    # preflight: hosts, devices, versions, disk, storage
#   tpu_setup/run.sh --logs                     # fetches what every host has said to tpu_logs/SLICE/WORKER.log
#   tpu_setup/run.sh --stop                     # SIGTERM: training saves and ends
#
# The hosts know of each other (LLAMA2_JAX_COORDINATOR=auto). Ctrl-C, or a lost connection, ends the showing only; the
# same command again shows it again. With --dry_run, first, the commands are printed.
source "$(dirname "$0")/common.sh"

if [ "${1:-}" = --dry_run ]; then DRY_RUN=1 && shift; fi
case ${1:-} in
  '' | --help) help ;;
  --logs | --stop)
    [ $# = 1 ] || die "unknown argument $2; see --help."
    load_pod
    if [ "$1" = --logs ]; then
      on_all 'cat ~/job/log' tpu_logs
    else
      on_all "$RUNNING"'! running || kill -TERM -- "-$(cat ~/job/pid)" || ! running'
    fi
    exit
    ;;
  --check) shift && command="python -m llama2_jax.runtime check $(quoted "$@")" ;;
  -*) die "unknown flag $1; see --help." ;;
  *) if [ $# = 1 ]; then command=$1; else command=$(quoted "$@"); fi ;; # one word is a command line, several are its words
esac
load_pod
# A group of processes of its own, so that it outlives the connection and --stop reaches all of it.
on_all "set -e
$RUNNING
cd ~/llama2_jax && mkdir -p ~/job
printf '%s\n' $(quoted "$command")>~/job/new
if running; then
  cmp -s ~/job/new ~/job/command && exit
  echo \"\$(hostname) is busy with: \$(cat ~/job/command)\" >&2
  exit 1
fi
mv ~/job/new ~/job/command && rm -f ~/job/rc
setsid nohup bash -c 'trap : TERM; . .venv/bin/activate; export LLAMA2_JAX_COORDINATOR=auto
(trap : TERM; . ~/job/command); echo \$? >~/job/rc' >~/job/log 2>&1 </dev/null &
pid=\$!
began \$pid >~/job/began
echo \$pid >~/job/pid"
first=$(nodes | head -1)
run gcloud compute tpus tpu-vm ssh "$first" "${WHERE[@]}" --worker=0 \
  --command='tail -n +1 --pid="$(cat ~/job/pid)" -F ~/job/log'
on_all "$RUNNING"'while running; do sleep 1; done
code=$(cat ~/job/rc 2>/dev/null || echo 1)
[ "$code" = 0 ] || { echo "$(hostname) ended with code $code:" >&2; tail -n 5 ~/job/log >&2; exit "$code"; }'
