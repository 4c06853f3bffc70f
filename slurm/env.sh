# The environment of every rank, which the batch scripts source. Adapt this file to your cluster.

cd "${SLURM_SUBMIT_DIR:-.}"

# ---- Python: a virtual environment, modules, or a container (docs/slurm.md)
# module load cuda/12.8 nccl
export PATH="$PWD/.venv/bin:$PATH"
# export SRUN_OPTIONS="--container-image=..."      # additional options for the srun that starts the ranks
# export RANK_PYTHON="apptainer exec --nv ... python"

# ---- network: uncomment these if NCCL and Gloo choose the wrong interfaces
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0   # an interface by which all nodes reach each other
# export NCCL_IB_HCA=mlx5                                     # the InfiniBand adapters to use for collectives

# ---- storage
export TMPDIR="${SCRATCH:-${TMPDIR:-/tmp}}"        # a fast local disk for temporary files
# export AWS_ENDPOINT_URL=https://s3.example.org   # for S3 buckets outside AWS; keys are read from ~/.aws/credentials
# export MLFLOW_TRACKING_URI=https://mlflow.example.org

# ---- the accelerator of the plan: h100, h200, a100, or numbers (earshot plan --help)
export PLAN_ACCELERATOR="${PLAN_ACCELERATOR:-h100}"

# ---- the free memory and disk space that a node must have before ranks start on it
export PREFLIGHT_MIN_MEMORY_GIB="${PREFLIGHT_MIN_MEMORY_GIB:-64}"   # in addition to what the plan needs
export PREFLIGHT_MIN_DISK_GIB="${PREFLIGHT_MIN_DISK_GIB:-50}"   # in the run's folder, in addition to checkpoints, and in TMPDIR

# ---- rarely changed
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# trainer/parallel/environment.py sets variables of CUDA and gloo for every way to start ranks. Exports here override
# them.
# Ranks must not all query the Hugging Face hub. Download weights and tokenizers once before the job.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
