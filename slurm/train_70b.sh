#!/bin/bash
# 128 GPUs, one task per GPU:  sbatch slurm/train_70b.sh [RECIPE] data.root=/data [key=value ...]
#SBATCH --job-name=mowe_70b
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
trap 'export STOPPED_EARLY=1' USR1  # a warning that comes before Python listens is not lost

set -euo pipefail
[[ "${1:-=}" == *=* ]] && set -- mowe_70b "$@"
source "${SLURM_SUBMIT_DIR:-.}/slurm/env.sh"
trap '' USR1
exec python -u -m trainer.job "$@"
