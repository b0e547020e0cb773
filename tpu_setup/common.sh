# shellcheck shell=bash disable=SC2034 # the scripts read VALUE, STATE and RUNNING
# What the scripts here share; sourced by them.
#
# Which pod is meant: POD, ZONE, PROJECT, SLICES from the environment, or as create.sh has left them in tpu_setup/pod.env.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
POD_FILE=${POD_FILE:-$HERE/pod.env}
DRY_RUN=${DRY_RUN:-}

# For the hosts. A job is the process group of ~/job/pid if that process began when ~/job/began says: numbers are used again.
RUNNING='began() {
  sed "s/.*) //" "/proc/$1/stat" 2>/dev/null | cut -d " " -f 20
}
running() {
  [ -s ~/job/began ] && began "$(cat ~/job/pid)" | cmp -s - ~/job/began
}
'

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

name() { # WHAT VALUE: letters, digits, dots, dashes and underscores, and no flag
  case $2 in
    '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) die "$1 is '$2'. Use letters, digits, '.', '_' and '-', the first a letter or digit." ;;
  esac
}

number() { # WHAT VALUE: 1 to 9999
  case $2 in
    '' | 0* | *[!0-9]* | ?????*) die "$1 is '$2'. Use a number from 1 to 9999." ;;
  esac
}

value() { # "$@" of which $1 is a flag: its value, in VALUE
  case ${2:-} in
    '' | --*) die "$1 needs a value; see --help." ;;
  esac
  VALUE=$2
}

quoted() { # words for a shell on another machine
  printf '%q ' "$@"
}

where() { # checks where the pod is; flags that say so
  SLICES=${SLICES:-1}
  name 'the name of the pod (POD, --name)' "$POD"
  name 'the zone (ZONE, --zone)' "$ZONE"
  number 'the number of slices (SLICES, --slices)' "$SLICES"
  WHERE=(--zone="$ZONE")
  if [ -n "${PROJECT:-}" ]; then
    name 'the project (PROJECT, --project)' "${PROJECT/:/.}" # example.com:project is one too
    WHERE+=(--project="$PROJECT")
  fi
}

load_pod() { # what is in the environment goes before what create.sh has noted
  local key value
  if [ -f "$POD_FILE" ]; then
    while IFS='=' read -r key value || [ -n "$key" ]; do
      case $key in
        POD) POD=${POD:-$value} ;;
        ZONE) ZONE=${ZONE:-$value} ;;
        PROJECT) PROJECT=${PROJECT:-$value} ;;
        SLICES) SLICES=${SLICES:-$value} ;;
        '' | '#'*) ;;
        *) die "$POD_FILE: unknown key '$key'. POD, ZONE, PROJECT and SLICES are known; delete the line." ;;
      esac
    done <"$POD_FILE"
  fi
  [ -n "${POD:-}" ] && [ -n "${ZONE:-}" ] || die 'which pod? Run create.sh first, or set POD and ZONE.'
  where
}

only_dry_run() { # the arguments of a script that takes no others
  [ $# -le 1 ] || die "unknown argument $2; see --help."
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

describe() { # sets STATE of the queued resource, '' where there is none; shows gcloud's error and fails where it cannot say
  local error
  error=$(mktemp)
  if STATE=$(gcloud compute tpus queued-resources describe "$POD" "${WHERE[@]}" --format='value(state.state)' 2>"$error"); then
    rm "$error"
  elif grep -qiE 'NOT_FOUND|not found' "$error"; then
    STATE=''
    rm "$error"
  else
    cat "$error" >&2
    rm "$error"
    return 1
  fi
}

on_all() { # COMMAND [DIRECTORY]: on every host of every slice at once; output of each host to DIRECTORY/SLICE/WORKER.log
  local node pid code pids=() failed=0
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
  for pid in ${pids[@]+"${pids[@]}"}; do
    code=0
    wait "$pid" || code=$?
    [ "$code" = 0 ] || failed=$code
  done
  return "$failed"
}
