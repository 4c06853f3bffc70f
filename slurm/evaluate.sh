#!/bin/bash
# Evaluate a run, a checkpoint or an exported model on one node, with one process per GPU:
#   sbatch slurm/evaluate.sh RUN --data MANIFEST [--tasks asr ...]
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/env.sh"

# A requeued job resumes: it evaluates only the samples that have no prediction yet.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --gpu-bind=none \
  python -u -m tools.evaluate "$@" --nproc "${SLURM_GPUS_ON_NODE:-1}"
