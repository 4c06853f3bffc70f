#!/bin/bash
# Check here and now, then hand the job in; what cannot run waits in no queue:
#   slurm/submit.sh [sbatch options] slurm/train_70b.sh [RECIPE] [key=value ...]      options as --name=value
set -euo pipefail
options=()
while [[ "${1:-}" == -* ]]; do
  options+=("$1")
  shift
done
bash "$@"  # outside a job, the script only checks
exec sbatch "${options[@]}" "$@"
