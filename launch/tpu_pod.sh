#!/usr/bin/env bash
# Starts the same command on every host of a Cloud TPU pod: launch/tpu_pod.sh TPU_NAME ZONE [arguments of pspnet_jax.main]
# Every host needs this repository in ~/pspnet_jax, installed for its python3 (3.11 or later), with the extra gcs for gs:// paths:
#   cd ~/pspnet_jax && python3 -m pip install -e ".[tpu,gcs]"
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 TPU_NAME ZONE --config FILE --workdir gs://BUCKET/DIR ..." >&2
  exit 1
fi
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd ~/pspnet_jax && python3 -m pspnet_jax.main --distributed $(printf '%q ' "$@")"
