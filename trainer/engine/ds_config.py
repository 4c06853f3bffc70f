"""The configuration of DeepSpeed, which combines a JSON file in DeepSpeed's format with values from the recipe.

Every setting is made in only one place. The JSON file adapts ZeRO-3 to the hardware (buckets, overlap, offload). The
recipe contains all settings that affect the trained weights.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from model.errors import UserError

Gathering = Literal["per_update", "per_module"]
"""The time at which the weights of encoders, router, adapter and projector are gathered: once per update, or around
every call of a module."""

BUCKET_ELEMENTS = 2**29
"""The largest number of elements that one collective gathers or reduces, unless a single parameter is larger. It
applies only if weights are gathered once per update, and limits the memory for the send buffers of weights and
gradients."""

_OWNERS = {
    "train_batch_size": "data.global_batch_samples",
    "train_micro_batch_size_per_gpu": "train.encoder_batch_sec",
    "gradient_accumulation_steps": "train.llm_tokens_per_microbatch",
    "gradient_clipping": "optim.clip_norm",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
    "activation_checkpointing": "train.recompute_encoders",
    "pipeline": "parallel.pipeline",
    "tensor_parallel": "parallel.tensor",
    "expert_parallel": "parallel.expert",
    "curriculum_learning": "data.datasets",
    "data_efficiency": "data",
    "steps_per_print": "telemetry.log_every_steps",
    "tensorboard": "telemetry",
    "wandb": "telemetry",
    "comet": "telemetry",
    "csv_monitor": "telemetry",
}
_PER_MODULE = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
}
"""The settings of `zero_optimization` that matter only if weights are gathered around every call of a module, with the
values that switch them off."""
_ALLOWED = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
    "disable_python_gc",
    "compile",
)


def load_ds_json(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON file.

    Raises:
        UserError: If the file is missing or malformed, contains an unknown key or a key that belongs in the recipe, or
            does not set ZeRO stage 3.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates(path))
    except FileNotFoundError:
        raise UserError(f"train.deepspeed = {path}: no such file; see ds_configs/ for examples") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"train.deepspeed = {path}: cannot be read as JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"train.deepspeed = {path}: must contain a JSON object")
    for key in tree:
        if key in _OWNERS:
            raise UserError(f"{path}: {key} belongs in the recipe as {_OWNERS[key]}; set it there and remove it here")
        if key not in _ALLOWED:
            near = difflib.get_close_matches(key, _ALLOWED, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(_ALLOWED)}"
            raise UserError(f"{path}: unknown key {key}; {hint}")
    zero = tree.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 3:
        raise UserError(f"{path}: zero_optimization.stage = {stage}: the audio side needs stage 3; set it to 3")
    return tree


def build_ds_config(path: Path, *, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`, from the JSON file at `path` and the values of the recipe.

    DeepSpeed's micro-batches, gradient accumulation and clipping are not used, because an update follows several
    encoder calls, and gradients are clipped by one norm over both engines. Gradients are reduced and kept in fp32 with
    either precision.

    Args:
        path: The JSON file.
        precision: The value of `train.precision`.

    Raises:
        UserError: If the file cannot be used (see `load_ds_json`), or its section `zero_optimization` is malformed.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # This import is slow, and only ranks need it.
    from pydantic import ValidationError

    tree = load_ds_json(path)
    try:
        DeepSpeedZeroConfig(**tree["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"{path}: {key} = {first['input']!r}: {first['msg']}") from None
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,  # The engine passes torch.optim.AdamW, even with offloading.
    }
    if precision == "bf16":
        owned |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return tree | owned


def without_buffers(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration in which DeepSpeed keeps no weights gathered and has no gradient buffers."""
    zero = ds_config["zero_optimization"] | {"stage3_param_persistence_threshold": 0, "contiguous_gradients": False}
    return ds_config | {"zero_optimization": zero}


def check_gathering(path: Path, tree: dict[str, Any], gathering: Gathering) -> None:
    """Check that the settings of a DeepSpeed JSON file suit the way in which weights are gathered.

    Args:
        path: The path to the file, for error messages.
        tree: The content of the file.
        gathering: The value of `train.gather_audio_weights`.

    Raises:
        UserError: If weights are gathered once per update, but the file stores them on NVMe, quantizes them, or keeps
            a secondary copy of them.
    """
    zero = tree["zero_optimization"]
    offload = (zero.get("offload_param") or {}).get("device", "none")
    found = {key: zero[key] for key, off in _PER_MODULE.items() if zero.get(key, off) != off}
    if offload == "nvme":
        found["offload_param.device"] = offload
    if gathering == "per_update" and found:
        key, value = next(iter(found.items()))
        raise UserError(
            f"{path}: zero_optimization.{key} = {value}: needs train.gather_audio_weights = per_module, because "
            "per_update gathers plain weights from memory"
        )


def _refuse_duplicates(path: Path) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key, value in pairs:
            if key in tree:
                raise UserError(f"{path}: key {key} is given twice; remove one of the two")
            tree[key] = value
        return tree

    return build
