"""The section `optim` of a recipe, which determines how both engines train each parameter."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.config import is_factor
from model.errors import UserError, check_least

if TYPE_CHECKING:
    from torch import nn  # Recipes are read without PyTorch.


@dataclass(frozen=True)
class PartConfig:
    """Settings of the parameters whose names match a pattern. If several patterns match, the last one applies."""

    pattern: str = "*"
    """A shell-style pattern for parameter names, such as `audio.primary.*`, `audio.experts.hubert.*` or `llm.*`. Names
    of the LLM's parameters are their Hugging Face names after `llm.`. Names of low-rank adapters end in `.lora_A` and
    `.lora_B`."""
    frozen: bool = False
    """Whether the parameters are excluded from training. They then have no gradient and no optimizer state. Only a
    pattern that contains `lora_` freezes low-rank adapters, so `llm.*` freezes the LLM's own weights but not its
    adapters."""
    lr: float | None = None
    """The peak learning rate; null for `optim.lr`."""
    weight_decay: float | None = None
    """The weight decay; null for `optim.weight_decay`. Vectors (norms, biases) are never decayed."""

    def __post_init__(self) -> None:
        check_least(f"optim.parts '{self.pattern}'", self, lr=0, weight_decay=0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with one learning-rate schedule and one global gradient norm for both engines."""

    lr: float = 1e-4
    """The peak learning rate, reached after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The decay rates of AdamW's running averages of the gradient and of its square."""
    eps: float = 1e-8
    """The term that AdamW adds to the denominator for numerical stability."""
    weight_decay: float = 0.1
    """The decoupled weight decay of matrices. Vectors (norms, biases) are never decayed."""
    clip_norm: float = 1.0
    """The largest global gradient norm; larger gradients are scaled down to it. 0 disables clipping."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The curve along which the learning rate falls from its peak after the warm-up to its value at the end of the run
    (see `min_lr_ratio`). `constant` keeps the peak."""
    warmup_steps: int = 0
    """The number of steps in which the learning rate rises linearly to its peak. With 0, it starts at the peak."""
    min_lr_ratio: float = 0.1
    """The learning rate at the end of the schedules `linear` and `cosine`, as a fraction of the peak, from 0 to 1."""
    parts: tuple[PartConfig, ...] = ()
    """Different settings for some of the parameters, for example to freeze the LLM. A pattern that matches nothing is
    an error."""

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


@dataclass(frozen=True, order=True)
class ParamSetting:
    """The settings of one parameter."""

    frozen: bool
    lr: float
    weight_decay: float
    by_stage: tuple[ParamSetting, ...] = ()
    """The settings in every stage of a run with stages (`trainer.engine.stages`); empty for other runs."""

    def in_stage(self, index: int) -> ParamSetting:
        """Return the settings in a stage."""
        return self.by_stage[index] if self.by_stage else self


def setting_of(config: OptimConfig, name: str, num_dims: int) -> ParamSetting:
    """Return the settings of the parameter `name` (`audio.…` or `llm.…`), which has `num_dims` dimensions."""
    if hasattr(config, "setting"):  # This is a `StagedOptim`.
        found: ParamSetting = config.setting(name, num_dims)
        return found
    frozen, lr, weight_decay = False, config.lr, config.weight_decay if num_dims > 1 else 0.0
    for part in config.parts:
        if fnmatch.fnmatchcase(name, part.pattern):
            frozen = part.frozen and (not is_factor(name) or "lora_" in part.pattern)
            lr = config.lr if part.lr is None else part.lr
            if num_dims > 1:
                weight_decay = config.weight_decay if part.weight_decay is None else part.weight_decay
    return ParamSetting(frozen, lr, weight_decay)


def check_patterns(config: OptimConfig, names: Iterable[str]) -> None:
    """Check that every pattern matches a parameter, since a pattern without a match is probably misspelled.

    Raises:
        UserError: If a pattern matches none of `names`.
    """
    names = list(names)
    for i, part in enumerate(config.parts):
        if not fnmatch.filter(names, part.pattern):
            example = names[0] if names else "none"
            raise UserError(
                f"optim.parts[{i}].pattern = {part.pattern}: matches no parameter; names are such as {example}"
            )


def lr_scale(config: OptimConfig, step: int, num_steps: int) -> float:
    """Return the factor by which every peak learning rate is multiplied at `step`, counted from 0.

    The factor rises linearly during the warm-up and then follows the schedule. It depends only on the step, so a
    resumed run needs no scheduler state.
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
    """Return the parameter groups for a `torch.optim` optimizer, and set `requires_grad=False` for frozen parameters.

    Args:
        config: The optimizer section.
        params: The name, the parameter and its number of dimensions. The number is given separately, because a
            parameter that ZeRO-3 has partitioned does not have its original shape.

    Returns:
        Groups of the trained parameters, for `set_rates`. Their order is the same on all ranks, even if ranks hold
        different parameters. The key `setting` of a group contains its peak learning rate.
    """
    groups: dict[ParamSetting, list[nn.Parameter]] = {}
    for name, param, num_dims in params:
        setting = setting_of(config, name, num_dims)
        if setting.frozen:
            param.requires_grad_(False)
        if param.requires_grad:
            groups.setdefault(setting, []).append(param)
    return [
        {"params": p, "lr": s.lr, "weight_decay": s.weight_decay, "setting": s}
        for s, p in sorted(groups.items(), key=lambda g: g[0])
    ]


def set_rates(groups: Iterable[dict], stage: int, scale: float) -> None:
    """Set the learning rate and weight decay of optimizer groups. A group that is frozen in the stage is not updated.

    Args:
        groups: Groups with the key `setting`, a `ParamSetting`.
        stage: The index of the stage; ignored by groups without stages.
        scale: The factor by which peak learning rates are multiplied.
    """
    for group in groups:
        setting = group["setting"].in_stage(stage)
        group["lr"] = 0.0 if setting.frozen else setting.lr * scale
        group["weight_decay"] = 0.0 if setting.frozen else setting.weight_decay
