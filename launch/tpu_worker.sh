#!/usr/bin/env bash
# Runs on each worker of a TPU slice, started by tpu_pod.sh:
#
#   tpu_worker.sh setup              unpack ~/pspnet_jax.tar.gz and install it, with Python 3.12, in ~/pspnet_jax
#   tpu_worker.sh start ARGUMENT...  run python -m pspnet_jax.main ARGUMENT... in the background, without this connection
#   tpu_worker.sh status             print "job: running", "job: exit STATUS" or "job: absent"
#   tpu_worker.sh logs               follow the job's log until it ends; exit with its status
#   tpu_worker.sh stop               make the job save its state and stop (SIGTERM); after five minutes, kill it
#
# ~/pspnet_jax holds code/, which setup replaces, venv/, the log of all jobs, and the last job's pid and exit status.

set -euo pipefail

home=$HOME/pspnet_jax

fail() {
  echo "error: $1 (worker $(hostname))" >&2
  exit 1
}

running() {
  [ -e "$home/pid" ] && grep -qs tpu_worker.sh "/proc/$(cat "$home/pid")/cmdline"
}

setup() {
  ! running || fail "a job is running; stop it first"
  rm -rf "$home/code"
  mkdir -p "$home/code"
  tar -xzf "$HOME/pspnet_jax.tar.gz" -C "$home/code"
  python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.12 "$home/venv"
  python3 -m uv pip install --quiet --python "$home/venv/bin/python" -e "$home/code[train,tpu,gcs]"
}

start() {
  ! running || fail "a job is running; stop it first"
  rm -f "$home/status"
  setsid nohup bash "$home/tpu_worker.sh" run "$@" >>"$home/log" 2>&1 </dev/null &
  echo $! >"$home/pid"
}

# What start runs in the background. A signal to its process group ends the job, and not this.
run() {
  local status=0
  trap : TERM
  echo "$(date '+%F %T')  python -m pspnet_jax.main $*"
  cd "$home/code"
  "$home/venv/bin/python" -m pspnet_jax.main "$@" || status=$?
  echo "$(date '+%F %T')  exit status $status"
  echo "$status" >"$home/status"
}

status() {
  if running; then
    echo "job: running"
  elif [ -e "$home/status" ]; then
    echo "job: exit $(cat "$home/status")"
  else
    echo "job: absent"
  fi
}

logs() {
  [ -e "$home/pid" ] || fail "no job was started"
  tail -n 1000 -f --pid="$(cat "$home/pid")" "$home/log"
  exit "$(cat "$home/status" 2>/dev/null || echo 1)"
}

stop() {
  running || return 0
  kill -TERM -- "-$(cat "$home/pid")"
  for ((second = 0; second < 300; second++)); do
    running || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$home/pid")"
}

case ${1-} in
  setup | start | run | status | logs | stop) "$@" ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 1
    ;;
esac
