#!/usr/bin/env bash
# Brings the code to every host of the pod and installs what it needs; what is there already stays.
#
#   tpu_setup/bootstrap.sh [--bucket BUCKET] [--dry_run]
#
# With --bucket, gs://BUCKET is mounted at /mnt/BUCKET on every host.
source "$(dirname "$0")/common.sh"

bucket=''
while [ $# -gt 0 ]; do
  case $1 in
    --bucket) value "$@" && bucket=$VALUE && shift ;;
    --dry_run) DRY_RUN=1 ;;
    --help) help ;;
    *) die "unknown argument $1; see --help." ;;
  esac
  shift
done
[ -z "$bucket" ] || name 'the bucket (--bucket)' "$bucket"
load_pod
export DRY_RUN POD ZONE PROJECT=${PROJECT:-} SLICES
"$HERE/sync.sh"
# uv brings Python 3.13, whatever the image has, and with it the newest of the two tested lines of versions.
on_all 'set -e
cd ~/llama2_jax
command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.13 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -r requirements.txt -e ".[tpu,gcs]"'
if [ -n "$bucket" ]; then
  on_all "set -e
mountpoint -q /mnt/$bucket && exit
command -v gcsfuse >/dev/null || {
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee \$key >/dev/null
  echo \"deb [signed-by=\$key] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
}
sudo mkdir -p /mnt/$bucket && sudo chown \"\$USER\" /mnt/$bucket
gcsfuse --implicit-dirs --rename-dir-limit=1000000 $bucket /mnt/$bucket"
fi
