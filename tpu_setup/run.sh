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
  --logs) load_pod && on_all 'cat ~/job/log' tpu_logs && exit ;;
  --stop) load_pod && on_all '[ ! -f ~/job/pid ] || kill -TERM -- "-$(cat ~/job/pid)" 2>/dev/null || true' && exit ;;
  --check) shift && command="python -m llama2_jax.runtime check $*" ;;
  -*) die "unknown flag $1; see --help." ;;
  *) command=$* ;;
esac
load_pod
# A group of processes of its own, so that it outlives the connection and --stop reaches all of it.
on_all "set -e
cd ~/llama2_jax && mkdir -p ~/job
printf '%s\n' $(printf '%q' "$command") >~/job/new
if [ -f ~/job/pid ] && kill -0 \"\$(cat ~/job/pid)\" 2>/dev/null; then
  cmp -s ~/job/new ~/job/command && exit
  echo \"\$(hostname) is busy with: \$(cat ~/job/command)\" >&2
  exit 1
fi
mv ~/job/new ~/job/command && rm -f ~/job/rc
setsid nohup bash -c 'trap : TERM; . .venv/bin/activate; export LLAMA2_JAX_COORDINATOR=auto
. ~/job/command; echo \$? >~/job/rc' >~/job/log 2>&1 </dev/null &
echo \$! >~/job/pid"
first=$(nodes | head -1)
run gcloud compute tpus tpu-vm ssh "$first" "${WHERE[@]}" --worker=0 \
  --command='tail -n +1 --pid="$(cat ~/job/pid)" -F ~/job/log'
on_all 'while kill -0 "$(cat ~/job/pid)" 2>/dev/null; do sleep 1; done
code=$(cat ~/job/rc 2>/dev/null || echo 1)
[ "$code" = 0 ] || { echo "$(hostname) ended with code $code:" >&2; tail -n 5 ~/job/log >&2; exit "$code"; }'
