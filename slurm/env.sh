# Sourced by the batch scripts: the environment of every rank. What a site changes stands here.

cd "${SLURM_SUBMIT_DIR:-.}"

# ---- Python: a virtual environment, modules, or a container (docs/slurm.md)
# module load cuda/12.8 nccl
export PATH="$PWD/.venv/bin:$PATH"
# export SRUN_OPTIONS="--container-image=..."      # more options of the ranks' srun
# export RANK_PYTHON="apptainer exec --nv ... python"

# ---- network: uncomment where ranks must not choose for themselves
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0   # the interface that all nodes share
# export NCCL_IB_HCA=mlx5                                     # the InfiniBand cards that carry collectives

# ---- storage
export TMPDIR="${SCRATCH:-${TMPDIR:-/tmp}}"        # a fast disk of the node: temporary files
# export AWS_ENDPOINT_URL=https://s3.example.org   # buckets that are not Amazon's; keys: ~/.aws/credentials
# export MLFLOW_TRACKING_URI=https://mlflow.example.org

# ---- what the plan is made for: h100, h200, a100, or numbers (python -m tools.plan --help)
export PLAN_ACCELERATOR="${PLAN_ACCELERATOR:-h100}"

# ---- what a node must have before ranks start on it
export PREFLIGHT_MIN_MEMORY_GIB="${PREFLIGHT_MIN_MEMORY_GIB:-64}"   # besides what the plan needs for checkpoints
export PREFLIGHT_MIN_DISK_GIB="${PREFLIGHT_MIN_DISK_GIB:-50}"   # in the run's folder, and in TMPDIR

# ---- rarely changed
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# CUDA's and gloo's settings, however ranks are started: trainer/parallel/environment.py; what is exported here wins.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"   # 128 ranks must not ask the hub: download weights once, beforehand
