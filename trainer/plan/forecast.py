"""The part of a stored plan with which a running job is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.config.convert import to_tree
from trainer.config.schema import Recipe

ENCODERS, LLM, UPDATE = "encoders", "LLM", "update"
_BATCH_KEYS = ("global_batch_samples", "num_lanes", "min_audio_sec", "max_audio_sec", "tokenizer")
"""Keys of the recipe's `data` section that change the time of a step or its memory. The contents of the datasets may
differ from the plan; the number of tokens and seconds of audio is then reported."""
_UNPLANNED_KEYS = ("steps", "run_dir", "debug_plan")
"""Keys of the recipe's `train` section that change neither the time of a step nor its memory."""


@dataclass(frozen=True)
class Forecast:
    """The planned time and memory of a step."""

    step_sec: float
    low_sec: float
    """The lower end of the step time's range, in seconds."""
    high_sec: float
    """The upper end of the step time's range, in seconds."""
    parts_sec: Mapping[str, float]
    """The seconds of the encoders (with the exchange of clips and embeddings), of the LLM, and of the update."""
    peak_bytes: int
    """The peak memory of the fullest rank."""
    tokens: int
    """The number of LLM positions in a step, audio tokens included."""
    audio_sec: float
    """The duration of the audio in a step, in seconds."""


def digest_of(recipe: Recipe) -> str:
    """Return a digest of the settings of a recipe that determine the time and the memory of a step."""
    tree = to_tree(recipe)
    train = {key: value for key, value in tree["train"].items() if key not in _UNPLANNED_KEYS}
    batch = {key: tree["data"][key] for key in _BATCH_KEYS}
    # Learning rates, schedules and the lengths of stages change neither the time nor the memory.
    stages = [[stage["train"], stage["parts"]] for stage in tree["stages"]]
    parts = [tree["model"], tree["lora"], tree["parallel"], train, batch, tree["optim"].get("parts"), stages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read_forecast(path: Path, recipe: Recipe) -> Forecast | None:
    """Read the forecast of a run from the plan that is stored with it.

    Args:
        path: The file that `earshot plan --store` or the run's job wrote.
        recipe: The recipe of the run.

    Returns:
        The forecast; None if there is no plan, or if the plan contains no forecast because the run is too small.

    Raises:
        UserError: If the file is not a plan, or is the plan of a different layout or model.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["digest"] != digest_of(recipe):
            raise UserError(f"{path}: is the plan of another layout or model; write it again with earshot plan --store")
        return None if tree["too_small"] else _forecast(tree)
    except FileNotFoundError:
        return None
    except UserError:  # UserError is a ValueError, which is handled below.
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a plan ({error!r}); write it again with earshot plan --store") from None


def _forecast(tree: Mapping[str, Any]) -> Forecast:
    moved = float(tree["parts_sec"]["exchanging clips and embeddings"])
    replicas = float(tree["parts_sec"]["gradients and weights over replicas"])
    sent = [tree["sent_bytes_per_rank"].get(f"LLM, {kind} over replicas", 0) for kind in ("gradients", "weights")]
    # Gradients are reduced at the end of the LLM's backward pass, and weights are gathered after the update.
    gradients = replicas * sent[0] / max(1, sum(sent))
    low, high = map(float, tree["step_sec_range"])
    return Forecast(
        float(tree["step_sec"]),
        low,
        high,
        {
            ENCODERS: float(tree["encoders_sec"]) + moved,
            LLM: float(tree["llm_sec"]) + gradients,
            UPDATE: float(tree["update_sec"]) + replicas - gradients,
        },
        max(int(kind["total_bytes"]) for kind in tree["kinds"]),
        int(tree["tokens_per_step"]),
        float(tree["audio_sec_per_step"]),
    )
