#!/usr/bin/env bash
# Rents a Cloud TPU slice and trains on it. NAME is your name for the slice; ZONE is a zone with such TPUs, such as us-west4-a.
#
#   launch/tpu_pod.sh create NAME ZONE TYPE [OPTION...]  request TYPE, such as v4-32, v5e-16, v5p-32 or v6e-16;
#                                                        each OPTION is one of gcloud's, such as --spot
#   launch/tpu_pod.sh setup  NAME ZONE                   wait until it is ready and install this checkout on all workers
#   launch/tpu_pod.sh start  NAME ZONE ARGUMENT...       run python -m pspnet_jax.main ARGUMENT... on all workers
#   launch/tpu_pod.sh logs   NAME ZONE [WORKER]          follow the log of worker 0, or of another one, until the job ends
#   launch/tpu_pod.sh resume NAME ZONE                   watch the job until it has finished; after a preemption, create,
#                                                        set up and start everything again, as it was
#   launch/tpu_pod.sh stop   NAME ZONE                   make the job save its state and stop
#   launch/tpu_pod.sh delete NAME ZONE                   delete the slice; until then, it costs money
#
# With --dry-run, the commands are printed instead of run.

set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

fail() {
  echo "error: $1" >&2
  exit 1
}

misuse() {
  echo "error: $1" >&2
  usage >&2
  exit 1
}

say() {
  echo "$(date '+%F %T')  $1"
}

# Runs a command, or prints it with --dry-run.
run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# What `resume` needs is kept on this machine, in $memory: the words of a command, or the code.
remember() {
  $dry_run || { mkdir -p "$memory" && printf '%q ' "${@:2}" >"$memory/$1"; }
}

recall() {
  eval "words=($(cat "$memory/$1"))"
}

on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --quiet --command="$2"
}

create() {
  local type=$1 runtime
  [[ $type =~ ^(v4|v5e|v5litepod|v5p|v6e)-[0-9]+$ ]] || misuse "TYPE is $type: expected v4-N, v5e-N, v5p-N or v6e-N, such as v5e-16"
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5e-* | v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
  esac
  run gcloud compute tpus queued-resources create "$name" --zone="$zone" --node-id="$name" \
    --accelerator-type="${type/#v5e-/v5litepod-}" --runtime-version="$runtime" --quiet "${@:2}"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
}

# Prints the state of the queued resource or of its node: one word in capitals.
describe() {
  local output
  if output=$(gcloud compute tpus "$1" describe "$name" --zone="$zone" --format="value($2)" 2>&1); then
    grep -xE '[A-Z_]+' <<<"$output" | tail -n 1
  elif [[ $output == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$output" >&2
    echo UNREACHABLE
  fi
}

# Prints READY if the slice can be used, LOST if it will not come (back), and otherwise what it waits for.
slice_state() {
  local state
  state=$(describe queued-resources state.state) || true
  [ "$state" != ACTIVE ] || state=$(describe tpu-vm state) || true
  case $state in
    MISSING | FAILED | SUSPENDED | PREEMPTED | TERMINATED) echo LOST "($state)" ;;
    *) echo "${state:-UNKNOWN}" ;;
  esac
}

wait_until_ready() {
  local state last=
  if $dry_run; then
    run gcloud compute tpus queued-resources describe "$name" --zone="$zone" '--format=value(state.state)'
    run gcloud compute tpus tpu-vm describe "$name" --zone="$zone" '--format=value(state)'
    return
  fi
  while state=$(slice_state) && [ "$state" != READY ]; do
    [[ $state != LOST* ]] || fail "$name in $zone is not there ${state#LOST }; delete and create it, or let resume do it"
    [ "$state" = "$last" ] || say "$name: $state"
    last=$state
    sleep 30
  done
}

pack() {
  $dry_run || mkdir -p "$memory"
  COPYFILE_DISABLE=1 run tar -czf "$memory/new_code.tar.gz" -C "$root" --exclude=__pycache__ \
    README.md LICENSE pyproject.toml requirements.txt configs launch pspnet_jax
}

# Installs an archive of the code on all workers.
install() {
  run gcloud compute tpus tpu-vm scp "$memory/$1" "$name:pspnet_jax.tar.gz" --zone="$zone" --worker=all --quiet &&
    on_workers all "mkdir -p pspnet_jax && tar -xzf pspnet_jax.tar.gz -C pspnet_jax --strip-components=1 launch/tpu_worker.sh &&\
 bash pspnet_jax/tpu_worker.sh setup"
}

start() {
  on_workers all "bash pspnet_jax/tpu_worker.sh start $(printf '%q ' "$@")"
}

# Prints the value of an option, such as --workdir, among arguments; of several, the last.
value_of() {
  local argument previous='' value=''
  for argument in "${@:2}"; do
    [[ $argument != "$1"=* ]] || value=${argument#*=}
    [ "$previous" != "$1" ] || value=$argument
    previous=$argument
  done
  echo "$value"
}

# A job that cannot write to a place that outlives its workers would lose everything when they are preempted.
require_shared_workdir() {
  local workdir
  workdir=$(value_of --workdir "$@")
  [[ $workdir == gs://* || $workdir == /* ]] ||
    misuse "start needs --workdir gs://BUCKET/DIR (or a directory that all workers have mounted): their own disks go with them"
}

# Only the recipes in configs/ are installed on the workers.
require_installed_recipe() {
  local recipe
  recipe=$(value_of --config "$@")
  [[ $recipe == gs://* || ($recipe != *..* && ($recipe =~ ^(\./)?configs/ || ! $recipe =~ \.(py|json))) ]] ||
    misuse "--config $recipe: only the recipes in configs/ are installed on the workers; move it there, and set them up again"
}

# Prints running, finished, failed (status 1 on all workers), or what became of the job on the workers.
job_state() {
  local lines
  lines=$(on_workers all "bash pspnet_jax/tpu_worker.sh status || echo job: absent" | grep '^job: ' | sort -u) || {
    echo unreachable
    return
  }
  case $lines in
    *running*) echo running ;;
    'job: exit 0') echo finished ;;
    'job: exit 1') echo failed ;;
    *) echo "${lines//job: /}" | paste -sd , - ;;
  esac
}

recreate() {
  delete || true
  recall create
  create "${words[@]}"
}

install_and_start() {
  recall start
  install code.tar.gz && start "${words[@]}"
}

resume() {
  local state last='' restarts=0
  if $dry_run; then
    recreate
    wait_until_ready
    install_and_start
    return
  fi
  while [ -e "$memory/start" ]; do
    state=$(slice_state)
    [ "$state" != READY ] || state="job $(job_state)"
    [ "$state" = "$last" ] || say "$name: $state"
    last=$state
    case $state in
      'job finished') return ;;
      'job failed') fail "the job ended with an error on all workers, and would again: see launch/tpu_pod.sh logs $name $zone" ;;
      'job running' | 'job unreachable') ;;
      job*)
        [ $((restarts += 1)) -le 10 ] || fail "the job did not run to its end in 10 restarts on the same workers: see their logs"
        install_and_start || say "starting failed; trying again"
        ;;
      LOST*)
        restarts=0
        recreate || say "creating failed; trying again"
        ;;
    esac
    sleep 60
  done
  fail "$name in $zone was stopped or deleted meanwhile"
}

dry_run=false words=()
for argument; do
  if [ "$argument" = --dry-run ]; then dry_run=true; else words+=("$argument"); fi
done
set -- ${words[@]+"${words[@]}"}
case ${1-} in
  '' | -h | --help)
    usage
    exit
    ;;
  create | setup | start | logs | stop | resume | delete) ;;
  *) misuse "$1: expected create, setup, start, logs, resume, stop or delete" ;;
esac
[ $# -ge 3 ] || misuse "$1 needs NAME and ZONE"
action=$1 name=$2 zone=$3
shift 3
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || misuse "NAME is $name: expected lowercase letters, digits and hyphens"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] || misuse "ZONE is $zone: expected a zone, such as us-west4-a"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
memory=${XDG_STATE_HOME:-$HOME/.local/state}/pspnet_jax/$zone/$name
$dry_run || command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

case $action in
  create | start) [ $# -ge 1 ] || misuse "$action needs $([ "$action" = create ] && echo TYPE || echo "the job's arguments")" ;;
  logs) [[ $# -eq 0 || $# -eq 1 && $1 =~ ^[0-9]+$ ]] || misuse "WORKER is $*: expected a number" ;;
  *) [ $# -eq 0 ] || misuse "$action takes no more than NAME and ZONE, but there is also: $*" ;;
esac
case $action in
  create)
    create "$@" || fail "the request was refused; gcloud's message is above"
    remember create "$@"
    ;;
  setup)
    wait_until_ready
    pack
    install new_code.tar.gz || fail "the installation failed on at least one worker; run setup again"
    run mv "$memory/new_code.tar.gz" "$memory/code.tar.gz" # which resume installs
    ;;
  start)
    require_shared_workdir "$@"
    require_installed_recipe "$@"
    start "$@" || fail "the job did not start on all workers; set them up, or stop the job that runs there"
    remember start "$@"
    ;;
  logs) on_workers "${1:-0}" "bash pspnet_jax/tpu_worker.sh logs" ;;
  stop)
    $dry_run || rm -f "$memory/start"
    on_workers all "bash pspnet_jax/tpu_worker.sh stop"
    ;;
  resume)
    for file in create code.tar.gz start; do
      [ -e "$memory/$file" ] || fail "this machine has no record of $name in $zone: create, setup and start come before resume"
    done
    resume
    ;;
  delete)
    delete
    $dry_run || rm -rf "$memory"
    ;;
esac
