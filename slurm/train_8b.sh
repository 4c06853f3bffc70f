#!/bin/bash
# Train on 2 nodes of 8 GPUs, with one task per GPU:
#   sbatch slurm/train_8b.sh [RECIPE] data.root=/data [key=value ...]
# RECIPE is mowe_8b by default. Ten minutes before the time limit, USR1 makes the run save and the job requeue itself.
#SBATCH --job-name=mowe_8b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
trap 'export STOPPED_EARLY=1' USR1  # This records a USR1 that arrives before Python handles it.

set -euo pipefail
[[ "${1:-=}" == *=* ]] && set -- mowe_8b "$@"
source "${SLURM_SUBMIT_DIR:-.}/slurm/env.sh"
trap '' USR1
exec python -u -m trainer.job "$@"
