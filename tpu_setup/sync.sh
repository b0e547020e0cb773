#!/usr/bin/env bash
# Copies the files that git knows, as they are now, to ~/llama2_jax on every host of the pod.
#
#   tpu_setup/sync.sh [--dry_run]
source "$(dirname "$0")/common.sh"

only_dry_run "$@"
cd "$HERE/.."
archive=$(mktemp -d)/llama2_jax.tar.gz
trap 'rm -r "$(dirname "$archive")"' EXIT
git ls-files -z | tar --null --files-from=- --ignore-failed-read -czf "$archive"
for node in $(nodes); do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:llama2_jax.tar.gz" "${WHERE[@]}" --worker=all
done
on_all 'mkdir -p ~/llama2_jax && tar xzf ~/llama2_jax.tar.gz -C ~/llama2_jax'
