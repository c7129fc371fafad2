#!/usr/bin/env bash
# Trains on GPUs of a SLURM cluster, with one process per GPU. Activate the environment first; the workdir has to be on a shared disk.
#
#   sbatch [OPTION...] launch/slurm.sh ARGUMENT...   submit python -m pspnet_jax.main ARGUMENT...
#   launch/slurm.sh --dry-run ARGUMENT...            print the commands that the job runs
#
# The options below are defaults, which those of sbatch override, such as --nodes=4 --partition=gpu --time=24:00:00.
# 120 seconds before the time limit, SIGTERM makes the job save its state (exit status 143); it is then queued again and resumes.
# After a node failure or preemption, SLURM itself queues it again.

#SBATCH --job-name=pspnet_jax
#SBATCH --output=pspnet_jax-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue

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
[ ${#words[@]} -ge 1 ] || misuse "the job's arguments are missing"
# After the first process has ended, the others have two minutes, so that all can save; then they are ended too.
# From SLURM 22.05 on, srun does not take over the number of CPUs from sbatch.
command=(srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0 --wait=120 python -m pspnet_jax.main "${words[@]}")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
  echo "scontrol requeue \$SLURM_JOB_ID  # if the exit status is 143"
  exit
fi
[ -n "${SLURM_JOB_ID-}" ] || misuse "this is not a SLURM job: submit it with sbatch"
status=0
"${command[@]}" || status=$?
[ "$status" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
