#!/usr/bin/env bash
# Starts two CPU processes on this machine, as if it were two hosts: launch/two_processes.sh [arguments of pspnet_jax.main]
set -euo pipefail
export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355} JAX_NUM_PROCESSES=2
JAX_PROCESS_ID=1 python -m pspnet_jax.main --distributed "$@" &
other=$!
trap 'kill $other 2>/dev/null || true' EXIT
JAX_PROCESS_ID=0 python -m pspnet_jax.main --distributed "$@"
wait $other
