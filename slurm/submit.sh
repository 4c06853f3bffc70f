#!/bin/bash
# Check a training job on this machine, and submit it only if it can run:
#   slurm/submit.sh [sbatch options] slurm/train_70b.sh [RECIPE] [key=value ...]
# Options of sbatch must have the form --name=value.
set -euo pipefail
options=()
while [[ "${1:-}" == -* ]]; do
  options+=("$1")
  shift
done
bash "$@"  # Outside a Slurm job, the script only checks the recipe and the data.
exec sbatch "${options[@]}" "$@"
