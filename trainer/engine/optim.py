"""What is learned, how fast, and when: one optimizer section for both engines."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.config import is_factor
from model.errors import UserError, check_least

if TYPE_CHECKING:
    from torch import nn  # a recipe is read without it


@dataclass(frozen=True)
class PartConfig:
    """Settings of the parameters whose name matches; the last matching part wins."""

    pattern: str = "*"
    """A shell-style pattern on parameter names, such as `audio.primary.*`, `audio.experts.hubert.*` or `llm.*`. The
    LLM's parameters have their Hugging Face names, and adapters (`lora`) end in `.lora_A` and `.lora_B`."""
    frozen: bool = False
    """Do not train these parameters. Adapters are frozen only by a pattern that contains `lora_`, so `llm.*` freezes
    the LLM's own weights and keeps its adapters trainable."""
    lr: float | None = None
    """Peak learning rate; null: `optim.lr`."""
    weight_decay: float | None = None
    """null: `optim.weight_decay`."""

    def __post_init__(self) -> None:
        check_least(f"optim.parts '{self.pattern}'", self, lr=0, weight_decay=0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, one schedule, one global-norm clip over both engines."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; vectors (norms, biases) take none."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    """End of `linear` and `cosine`, as a share of the peak."""
    parts: tuple[PartConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optim.lr = {self.lr}: must be positive")
        if self.clip_norm < 0:
            raise UserError(f"optim.clip_norm = {self.clip_norm}: must be positive, or 0 for no clipping")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optim.min_lr_ratio = {self.min_lr_ratio}: must be within 0..1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas = {list(self.betas)}: must be within [0, 1)")
        check_least("optim", self, eps=0, weight_decay=0)


@dataclass(frozen=True)
class ParamSetting:
    """What one parameter gets."""

    frozen: bool
    lr: float
    weight_decay: float


def setting_of(config: OptimConfig, name: str, num_dims: int) -> ParamSetting:
    """The setting of the parameter `name` (`audio.…` or `llm.…`) that has `num_dims` dimensions."""
    frozen, lr, weight_decay = False, config.lr, config.weight_decay if num_dims > 1 else 0.0
    for part in config.parts:
        if fnmatch.fnmatchcase(name, part.pattern):
            frozen = part.frozen and (not is_factor(name) or "lora_" in part.pattern)
            lr = config.lr if part.lr is None else part.lr
            if num_dims > 1:
                weight_decay = config.weight_decay if part.weight_decay is None else part.weight_decay
    return ParamSetting(frozen, lr, weight_decay)


def check_patterns(config: OptimConfig, names: Iterable[str]) -> None:
    """Every part must match something: a pattern that matches nothing is a misspelling.

    Raises:
        UserError: names the pattern.
    """
    names = list(names)
    for i, part in enumerate(config.parts):
        if not fnmatch.filter(names, part.pattern):
            example = names[0] if names else "none"
            raise UserError(
                f"optim.parts[{i}].pattern = {part.pattern}: matches no parameter (names are like {example})"
            )


def lr_scale(config: OptimConfig, step: int, num_steps: int) -> float:
    """Factor on every peak learning rate at `step` (0-based): linear warm-up, then the schedule.

    A pure function of the step, so a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    span = max(1, num_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    fall = progress if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - config.min_lr_ratio) * fall


def param_groups(config: OptimConfig, params: Iterable[tuple[str, nn.Parameter, int]]) -> list[dict]:
    """`torch.optim` groups of the (name, parameter, number of dimensions) that learn; `peak_lr` stays in each group.

    Marks frozen parameters with `requires_grad=False`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param, num_dims in params:
        setting = setting_of(config, name, num_dims)
        if setting.frozen:
            param.requires_grad_(False)
        if param.requires_grad:
            groups.setdefault((setting.lr, setting.weight_decay), []).append(param)
    return [{"params": p, "lr": lr, "peak_lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]
