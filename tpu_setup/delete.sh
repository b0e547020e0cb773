#!/usr/bin/env bash
# Gives the pod back. What lies on its disks is lost; what lies in a bucket stays.
#
#   tpu_setup/delete.sh [--dry_run]
source "$(dirname "$0")/common.sh"

only_dry_run "$@"
STATE=unknown
[ -n "$DRY_RUN" ] || describe || die "gcloud could not say whether $POD is there; the reason is above."
if [ -n "$STATE" ]; then
  run gcloud compute tpus queued-resources delete "$POD" "${WHERE[@]}" --force --quiet
else
  echo "$POD is not there."
fi
[ -n "$DRY_RUN" ] || rm -f "$POD_FILE"
