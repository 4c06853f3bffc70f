#!/bin/bash
# 128 GPUs, one task per GPU:  sbatch slurm/train_70b.sh data.root=/data [key=value ...]
#SBATCH --job-name=mowe_70b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/env.sh"

# Every task sees all GPUs of its node and takes the one of its local rank.
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-12}" \
  python -m trainer mowe_70b "$@"
