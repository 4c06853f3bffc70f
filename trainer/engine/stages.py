"""The section `stages` of a recipe, which divides a run into stages that train different parameters.

The optimizers hold every parameter that is trained in any stage. A checkpoint therefore has the same tensors in all
stages, and a run can resume at any step. During a stage, parameters that the stage does not train have no gradient and
a learning rate of zero. At the beginning of a stage, Adam's moments are reset to zero.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from model.errors import UserError, check_least
from trainer.engine.optim import OptimConfig, ParamSetting, PartConfig, setting_of

PARTS = {
    "connector": (
        "audio.adapter.*",
        "audio.projector.*",
        "audio.feature_norm.*",
        "audio.output_norm.*",
        "audio.router.*",
        "audio.stream_projection.*",
        "audio.experts.*.projection.*",
        "audio.*_head.*",
        "audio.ctc_feedback.*",
    ),
    "encoders": ("audio.primary.*", "audio.experts.*"),
    "llm": ("llm.*",),
    "lora": ("*.lora_?",),
}
"""Names that `stages.N.train` accepts in place of patterns, and the patterns of parameter names that they stand for."""


_FOR_LLM = ("audio.projector.", "audio.output_norm.", "audio.ctc_feedback.")
"""Prefixes of the audio side's parameters on which only the input of the LLM depends."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of training. Keys that are null have the value of the same key in the section `optim`."""

    name: str
    """The name of the stage in logs and reports."""
    steps: int
    """The number of steps. `train.steps` need not be given. If it is, it must be the sum over all stages."""
    train: tuple[str, ...] = ()
    """The parameters that are trained: `connector` (adapter, projector, norms, router, feature projections, loss
    heads), `encoders`, `llm`, `lora` (all low-rank adapters), or patterns of parameter names; empty for all.
    Parameters that `optim.parts` freezes are not trained in any stage."""
    lr: float | None = None
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """The curve along which the learning rate falls between the warm-up and the end of the stage."""
    warmup_steps: int | None = None
    """The number of steps in which the learning rate rises at the beginning of the stage."""
    min_lr_ratio: float | None = None
    """The learning rate at the end of the stage, as a fraction of the peak."""
    parts: tuple[PartConfig, ...] = ()
    """Different settings for some of the parameters in this stage, applied after the settings in `optim.parts`."""
    llm: bool = True
    """If false, the stage does not run the LLM. It then trains only with the losses of the audio side, such as CTC, and
    its steps take less time. It does not train the projector, and must not train parameters of the LLM."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weights of datasets in this stage, by the name of the dataset. Other datasets keep their own `weight`."""

    def __post_init__(self) -> None:
        where = f"stages '{self.name}'"
        check_least(where, self, steps=1, warmup_steps=0)
        if self.lr is not None and self.lr <= 0:
            raise UserError(f"{where}.lr = {self.lr}: must be positive")
        if any(weight < 0 for weight in self.weights.values()):
            raise UserError(f"{where}.weights = {self.weights}: must be at least 0")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of the parameters that the stage may train; empty for all."""
        return tuple(pattern for entry in self.train for pattern in PARTS.get(entry, (entry,)))


@dataclass(frozen=True)
class Stage:
    """A stage of a run."""

    name: str
    start: int
    """The number of steps before the stage."""
    steps: int
    optim: OptimConfig
    """The settings of the stage."""
    patterns: tuple[str, ...] = ()
    """The patterns of the parameters that the stage may train; empty for all."""
    runs_llm: bool = True
    """Whether the stage runs the LLM; see `StageConfig.llm`."""

    def setting(self, name: str, num_dims: int) -> ParamSetting:
        """Return the settings of a parameter in this stage; see `setting_of`."""
        setting = setting_of(self.optim, name, num_dims)
        learns = not self.patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
        if not self.runs_llm and name.startswith(_FOR_LLM):
            learns = False  # Its gradient would be zero, and weight decay would shrink it.
        return setting if learns else replace(setting, frozen=True)


@dataclass(frozen=True)
class StagedOptim(OptimConfig):
    """The settings of a run with stages."""

    stages: tuple[Stage, ...] = ()

    def setting(self, name: str, num_dims: int) -> ParamSetting:
        """Return the settings of a parameter, which is frozen if it is frozen in every stage."""
        found = tuple(stage.setting(name, num_dims) for stage in self.stages)
        first = next((setting for setting in found if not setting.frozen), found[0])
        return replace(first, by_stage=found)


def staged_optim(optim: OptimConfig, stages: Sequence[StageConfig]) -> OptimConfig:
    """Combine the section `optim` with the stages of a run. Without stages, `optim` itself is returned.

    Raises:
        UserError: If the warm-up of a stage, which may be inherited from `optim`, is longer than the stage.
    """
    if not stages:
        return optim
    found, start = [], 0
    for number, stage in enumerate(stages):
        own = {key: getattr(stage, key) for key in ("lr", "schedule", "warmup_steps", "min_lr_ratio")}
        given = {key: value for key, value in own.items() if value is not None}
        settings = replace(optim, **given, parts=(*optim.parts, *stage.parts))
        if settings.warmup_steps > stage.steps:
            raise UserError(
                f"stages '{stage.name}'.warmup_steps = {settings.warmup_steps}: must be within 0..{stage.steps}, "
                f"the steps of the stage; set stages.{number}.warmup_steps"
            )
        found.append(Stage(stage.name, start, stage.steps, settings, stage.patterns, stage.llm))
        start += stage.steps
    return StagedOptim(**{f.name: getattr(optim, f.name) for f in fields(optim)}, stages=tuple(found))


def stages_of(optim: OptimConfig, num_steps: int) -> tuple[Stage, ...]:
    """Return the stages of a run; without the section `stages`, a single stage without a name."""
    return optim.stages if isinstance(optim, StagedOptim) else (Stage("", 0, num_steps, optim),)


def stage_at(optim: OptimConfig, step: int, num_steps: int) -> int:
    """Return the index of the stage that contains a step, counted from 0."""
    stages = stages_of(optim, num_steps)
    return next((i for i, stage in enumerate(stages) if step < stage.start + stage.steps), len(stages) - 1)


def check_stages(optim: OptimConfig, names: Iterable[str]) -> None:
    """Check that every pattern of every stage matches a parameter.

    Raises:
        UserError: If a pattern matches none of `names`, a stage trains no audio parameter, or a stage trains parameters
            of the LLM without running it.
    """
    names = list(names)
    known = {pattern for patterns in PARTS.values() for pattern in patterns}
    for stage in stages_of(optim, 0):
        for pattern in (*stage.patterns, *(part.pattern for part in stage.optim.parts)):
            # The name of a part is accepted even if this model lacks some of its modules, such as a router.
            if pattern not in known and not fnmatch.filter(names, pattern):
                raise UserError(
                    f"stages '{stage.name}': pattern {pattern} matches no parameter; use one of {', '.join(PARTS)}, "
                    f"or a pattern of parameter names, such as {names[0]}"
                )
        if not any(name.startswith("audio.") and not stage.setting(name, 2).frozen for name in names):
            least = "audio.projector.*" if stage.runs_llm else "audio.adapter.*"
            raise UserError(f"stages '{stage.name}': every audio parameter is frozen; train at least {least}")
        trained = next((n for n in names if n.startswith("llm.") and not stage.setting(n, 2).frozen), None)
        if not stage.runs_llm and trained is not None:
            raise UserError(
                f"stages '{stage.name}'.llm = false: the stage would also train {trained}, which gets no gradient; set "
                "its `train` to parts of the audio side, such as [connector, encoders]"
            )
