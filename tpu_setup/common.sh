# shellcheck shell=bash
# What the scripts here share; sourced by them.
#
# Which pod is meant: POD, ZONE, PROJECT, SLICES from the environment, or as create.sh has left them in tpu_setup/pod.env.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
POD_FILE=${POD_FILE:-$HERE/pod.env}
DRY_RUN=${DRY_RUN:-}

die() {
  echo "Error: $*" >&2
  exit 1
}

help() { # prints the comment at the top of the script
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit 0
}

run() { # runs a command, or prints it with --dry_run
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

where() { # flags that say where the pod is
  SLICES=${SLICES:-1} WHERE=(--zone="$ZONE")
  if [ -n "${PROJECT:-}" ]; then WHERE+=(--project="$PROJECT"); fi
}

load_pod() { # what is in the environment goes before what create.sh has noted
  local key value
  if [ -f "$POD_FILE" ]; then
    while IFS='=' read -r key value; do
      [ -n "${!key:-}" ] || export "$key=$value"
    done <"$POD_FILE"
  fi
  [ -n "${POD:-}" ] && [ -n "${ZONE:-}" ] || die 'which pod? Run create.sh first, or set POD and ZONE.'
  where
}

only_dry_run() { # the arguments of a script that takes no others
  case ${1:-} in
    '') ;;
    --dry_run) DRY_RUN=1 ;;
    --help) help ;;
    *) die "unknown argument $1; see --help." ;;
  esac
  load_pod
}

nodes() { # the slices of the pod
  if [ "$SLICES" = 1 ]; then echo "$POD"; else seq -f "$POD-%g" 0 $((SLICES - 1)); fi
}

on_all() { # COMMAND [DIRECTORY]: on every host of every slice at once; output of each host to DIRECTORY/SLICE/WORKER.log
  local node pid pids=() failed=0
  for node in $(nodes); do
    local target=()
    if [ -n "${2:-}" ]; then
      run mkdir -p "$2/$node"
      target=(--output-directory="$2/$node")
    fi
    if [ -n "$DRY_RUN" ]; then # in order
      run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker=all --command="$1" ${target[@]+"${target[@]}"}
    else
      gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker=all --command="$1" ${target[@]+"${target[@]}"} &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || failed=1; done
  return "$failed"
}
