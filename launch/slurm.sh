#!/usr/bin/env bash
# One process a node, with all of its GPUs: sbatch [--nodes=2] launch/slurm.sh [arguments of pspnet_jax.main]
#SBATCH --job-name=pspnet_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
set -euo pipefail
srun python -m pspnet_jax.main --distributed "$@"
