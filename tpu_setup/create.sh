#!/usr/bin/env bash
# Requests a pod, waits until it is ready, and sets it up. The same command resumes where it stopped.
#
#   tpu_setup/create.sh v5p-64 --zone us-east5-a [--name NAME] [--project P] [--spot] [--slices N] [--bucket B] [--dry_run]
#
# Types are v4-N, v5e-N, v5p-N and v6e-N; N counts chips on v5e and v6e, and cores, two a chip, on v4 and v5p.
# --spot is cheaper, and may be taken away: training then saves, and this command followed by run.sh goes on.
# --slices makes several pods of this type work as one (set mesh.replica to their number).
# --bucket is mounted at /mnt/BUCKET on every host, for workdirs, data and token caches.
source "$(dirname "$0")/common.sh"

type='' spot='' bucket=''
while [ $# -gt 0 ]; do
  case $1 in
    --name) value "$@" && POD=$VALUE && shift ;;
    --zone) value "$@" && ZONE=$VALUE && shift ;;
    --project) value "$@" && PROJECT=$VALUE && shift ;;
    --slices) value "$@" && SLICES=$VALUE && shift ;;
    --bucket) value "$@" && bucket=$VALUE && shift ;;
    --spot) spot=1 ;;
    --dry_run) DRY_RUN=1 ;;
    --help) help ;;
    -*) die "unknown flag $1; see --help." ;;
    *)
      [ -z "$type" ] || die "unknown argument $1 beside the type $type; see --help."
      type=$1
      ;;
  esac
  shift
done
case $type in
  v4-*) version=tpu-ubuntu2204-base accelerator=$type ;;
  v5e-*) version=v2-alpha-tpuv5-lite accelerator=v5litepod-${type#v5e-} ;;
  v5p-*) version=v2-alpha-tpuv5 accelerator=$type ;;
  v6e-*) version=v2-alpha-tpuv6e accelerator=$type ;;
  *) die "the type of pod is missing or unknown: '$type'; such as v5e-256 or v5p-64." ;;
esac
number "the size of the pod in '$type'" "${type#*-}"
[ -n "${ZONE:-}" ] || die '--zone is missing, such as us-east5-a.'
[ -z "$bucket" ] || name 'the bucket (--bucket)' "$bucket"
POD=${POD:-llama2-$type}
where

if [ -z "$DRY_RUN" ]; then
  printf '%s=%s\n' POD "$POD" ZONE "$ZONE" PROJECT "${PROJECT:-}" SLICES "$SLICES" >"$POD_FILE"
fi
now='' asked='' failures=0 gone=0
until [ "$now" = ACTIVE ]; do
  if [ -z "$DRY_RUN" ]; then
    if describe; then
      now=$STATE failures=0
    else # a network that is away for a moment, or no rights
      failures=$((failures + 1))
      [ "$failures" -lt "${MAX_FAILURES:-5}" ] || die "gcloud could not say what $POD is doing, $failures times; the reason is above."
      sleep "${POLL_SECONDS:-30}"
      continue
    fi
  fi
  case $now in
    '')
      [ -z "$asked" ] || [ "$((gone += 1))" -lt "${MAX_FAILURES:-5}" ] || die "$POD was asked for and is not there."
      if [ -z "$asked" ]; then
        if [ "$SLICES" = 1 ]; then node=(--node-id="$POD"); else node=(--node-prefix="$POD" --node-count="$SLICES"); fi
        run gcloud compute tpus queued-resources create "$POD" "${WHERE[@]}" "${node[@]}" \
          --accelerator-type="$accelerator" --runtime-version="$version" ${spot:+--spot}
        asked=1
        [ -z "$DRY_RUN" ] || break
        continue
      fi
      ;;
    FAILED | SUSPENDED) # taken away, or never given
      [ -z "$asked" ] || die "$POD was not given; see: gcloud compute tpus queued-resources describe $POD ${WHERE[*]}"
      gcloud compute tpus queued-resources delete "$POD" "${WHERE[@]}" --force --quiet
      continue
      ;;
  esac
  echo "$(date +%T) $POD: ${now:-not there yet}"
  [ "$now" = ACTIVE ] || sleep "${POLL_SECONDS:-30}"
done
export POD ZONE PROJECT=${PROJECT:-} SLICES DRY_RUN
"$HERE/bootstrap.sh" ${bucket:+--bucket "$bucket"}
