#!/usr/bin/env bash
# What the pod is doing: its state, and for each host the command it runs and the last line that it said.
#
#   tpu_setup/status.sh [--dry_run]
source "$(dirname "$0")/common.sh"

only_dry_run "$@"
run gcloud compute tpus queued-resources describe "$POD" "${WHERE[@]}" --format='value(state.state)'
on_all "$RUNNING"'if [ ! -f ~/job/pid ]; then what=idle
elif running; then what=running
else what="ended with code $(cat ~/job/rc 2>/dev/null || echo unknown)"; fi
echo "$(hostname): $what: $(cat ~/job/command 2>/dev/null): $(tail -n 1 ~/job/log 2>/dev/null)"'
