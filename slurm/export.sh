#!/bin/bash
# Export a checkpoint as a folder for transformers, on one node without GPUs:
#   sbatch slurm/export.sh RUN OUT [--llm-only ...]
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/env.sh"

# A requeued job resumes after the last complete file of weights.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -u -m tools.export "$@"
