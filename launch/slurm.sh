#!/usr/bin/env bash
# Starts one process per GPU, as JAX expects under SLURM: sbatch [--nodes=2] launch/slurm.sh [arguments of pspnet_jax.main]
# The defaults are two nodes with 8 GPUs each. SIGTERM comes 120 seconds before the time limit, so that the state can be saved.
#SBATCH --job-name=pspnet_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
set -euo pipefail
srun python -m pspnet_jax.main --distributed "$@"
