# Sourced by the batch scripts: the environment of every rank. Site settings (modules, network interfaces) go here.

cd "${SLURM_SUBMIT_DIR:-.}"
export PATH="$PWD/.venv/bin:$PATH"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export CUDA_DEVICE_MAX_CONNECTIONS=1           # Megatron: communication kernels start in the order they are issued
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"  # packs differ in length
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"   # 128 ranks must not ask the hub: download weights once, beforehand
