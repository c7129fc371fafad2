#!/usr/bin/env bash
# Trains in several processes on this machine, each with one CPU device, as if they were several hosts:
#
#   launch/local.sh N ARGUMENT...    run python -m pspnet_jax.main ARGUMENT... in N processes that form one job
#
# If one process fails, the others get SIGTERM, and SIGKILL a minute later; the exit status is that of the one that failed.
# Ctrl-C and SIGTERM reach all processes as SIGTERM: they save their state and stop (143). A second Ctrl-C, more
# than two seconds later, stops them at once.
# With --dry-run, the commands are printed instead of run.

set -euo pipefail

misuse() {
  echo "error: $1" >&2
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 1
}

dry_run=false words=()
for argument; do
  if [ "$argument" = --dry-run ]; then dry_run=true; else words+=("$argument"); fi
done
set -- ${words[@]+"${words[@]}"}
[[ ${1-} =~ ^[1-9][0-9]*$ ]] || misuse "N is ${1-missing}: expected the number of processes"
[ $# -ge 2 ] || misuse "the job's arguments are missing"
processes=$1
shift

free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

send() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    [ -z "$pid" ] || kill "-$1" "$pid" 2>/dev/null || true
  done
}

forward() {
  if [ "$1" = INT ] && [ -n "$signaled" ] && [ $((SECONDS - signaled)) -gt 2 ]; then
    send KILL
  else
    signaled=${signaled:-$SECONDS}
    send TERM
  fi
}

pids=() left=0 status=0 failed='' signaled=''
trap 'forward TERM' TERM HUP
trap 'forward INT' INT
address=127.0.0.1:$(free_port)
export JAX_PLATFORMS=cpu
$dry_run || set -m # each process in its own process group: Ctrl-C reaches it only once, through `forward`
for ((i = 0; i < processes; i++)); do
  command=(python -m pspnet_jax.main --coordinator "$address" --processes "$processes" --process_id "$i" "$@")
  if $dry_run; then
    printf '%q ' JAX_PLATFORMS=cpu "${command[@]}"
    echo
  else
    "${command[@]}" </dev/null &
    pids+=($!)
    left=$((left + 1))
  fi
done
set +m

while [ $left -gt 0 ]; do
  sleep 0.2 || true # a signal may end it
  for i in "${!pids[@]}"; do
    if [ -z "${pids[i]}" ] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    pids[i]='' left=$((left - 1))
    if [ $code -ne 0 ] && [ $status -eq 0 ]; then
      status=$code failed=$SECONDS
      [ -n "$signaled" ] || echo "process $i of $processes ended with status $code; ending the others" >&2
      [ -n "$signaled" ] || forward TERM
    fi
  done
  [ $status -eq 0 ] || [ $((SECONDS - failed)) -lt 60 ] || send KILL
done
exit $status
