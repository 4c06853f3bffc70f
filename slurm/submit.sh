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
[[ $# -gt 0 ]] || { echo "usage: slurm/submit.sh [--name=value ...] SCRIPT [RECIPE] [key=value ...]" >&2; exit 2; }

# asked NAME: the value of sbatch's option --NAME, given here or in a line of the script that begins with #SBATCH
asked() {
  printf '%s\n' "$(sed -n 's/^#SBATCH //p' "$script")" "${options[@]}" | sed -n "s/^--$1=//p" | tail -n 1
}
script=$1
# Outside a Slurm job, the script only checks the recipe and the data, and whether the ranks fit on these nodes.
SUBMIT_NODES="$(asked nodes)" SUBMIT_NTASKS_PER_NODE="$(asked ntasks-per-node)" \
  SUBMIT_GPUS_PER_NODE="$(asked gpus-per-node)" bash "$@"
exec sbatch "${options[@]}" "$@"
