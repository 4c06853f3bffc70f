#!/bin/bash
# Train one run per combination of values as a job array, and print a table of all runs at the end:
#   slurm/sweep.sh [sbatch options] slurm/train_8b.sh RECIPE optim.lr=1e-4,3e-4 seed=0,1 data.root=/data
# Options of sbatch must have the form --name=value. At most SWEEP_AT_ONCE runs (default 4) train at a time.
set -euo pipefail
options=()
while [[ "${1:-}" == -* ]]; do
  options+=("$1")
  shift
done
script=$1
shift
SLURM_SUBMIT_DIR="${SLURM_SUBMIT_DIR:-$PWD}"
source "$SLURM_SUBMIT_DIR/slurm/env.sh"
names=$(python -m trainer.job.sweep "$@")  # This refuses invalid combinations.
num=$(wc -l <<<"$names")
echo "$names"
job=$(sbatch --parsable "${options[@]}" --array="0-$((num - 1))%${SWEEP_AT_ONCE:-4}" --output=%x-%A-%a.log "$script" "$@")
root=$(python -m trainer.job.sweep --folder "$@")
table=$(sbatch --parsable --dependency="afterany:$job" --job-name=sweep --nodes=1 --ntasks=1 --output=sweep-%j.log \
  --wrap="python -m tools.status $root")
echo "job $job: $num runs; the table will be in sweep-$table.log, and until then: earshot status $root --watch"
