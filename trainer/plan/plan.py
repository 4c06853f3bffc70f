"""The plan of a run, which is computed before the run starts and printed by `earshot plan`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from model.errors import UserError
from trainer.config.schema import Recipe
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology
from trainer.plan.accelerator import GIB, Accelerator
from trainer.plan.communication import Traffic
from trainer.plan.experts import ExpertPlan
from trainer.plan.flops import Flops
from trainer.plan.host import DiskSpace, HostMemory, disk_space, host_memory
from trainer.plan.mechanisms import AS_BUILT, Mechanisms
from trainer.plan.memory import RankMemory
from trainer.plan.ranks import RankStates
from trainer.plan.remedies import memory_remedy
from trainer.plan.sizes import Size
from trainer.plan.step_time import StepTime
from trainer.plan.workload import Workload

SECONDS_PER_DAY = 86_400.0
UNCERTAINTY = 0.15
"""The assumed relative error of the rates, from which the range of the step time is computed."""
MEMORY_MARGIN = 0.07
"""The fraction of the usable memory that should stay free. Except for one run, published peaks exceed the planned ones
by at most about as much (docs/plan.md)."""


@dataclass(frozen=True)
class Plan:
    """The expected memory and speed of one recipe on one kind of accelerator."""

    recipe: Recipe
    accelerator: Accelerator
    topology: Topology
    sizes: dict[str, Size]
    """The size of each parameter, by its name."""
    workload: Workload
    packs: PackPlan
    states: RankStates
    kinds: list[RankMemory]
    """The memory of each distinct kind of rank."""
    flops: Flops
    traffic: list[Traffic]
    time: StepTime
    seconds_range: tuple[float, float]
    """The range of the step time in seconds if the rates are up to `UNCERTAINTY` better or worse than assumed."""
    fixed_share: float
    """The fraction of a step that is spent on kernel launches and link latencies."""
    attention: str
    """How the LLM computes attention, as far as it matters for memory."""
    mechanisms: Mechanisms = AS_BUILT
    encoder_balance: float = 1.0
    """The encoders' FLOPs on the busiest rank, divided by the mean over ranks."""
    encoder_padding: float = 0.0
    """The fraction of the encoders' input that is padding."""
    experts: ExpertPlan | None = None
    """The memory and traffic of the FFN experts; None if the LLM has none."""

    @property
    def too_small(self) -> bool:
        """True if kernel launches and link latencies take more than half of a step, whose time is then not forecast."""
        return self.fixed_share > 0.5

    def cost(self, step_sec: float, price_per_gpu_hour: float) -> float:
        """Return the price of all steps if a step that runs the LLM takes `step_sec` seconds."""
        return self.run_sec(step_sec) / 3600 * self.topology.world * price_per_gpu_hour

    def run_sec(self, step_sec: float) -> float:
        """Return the duration of all steps if a step that runs the LLM takes `step_sec` seconds.

        Steps of stages with `llm: false` take less time by the LLM's share of a step.
        """
        without_llm = sum(stage.steps for stage in self.recipe.stages if not stage.llm)
        return step_sec * (self.recipe.train.steps - without_llm * self.time.llm / self.time.total)

    @property
    def worst(self) -> RankMemory:
        """The kind of rank that needs the most memory."""
        return max(self.kinds, key=lambda kind: kind.total)

    @property
    def fits(self) -> bool:
        """True if every rank's peak memory fits into the accelerator's usable memory."""
        return self.worst.total <= self.accelerator.usable_bytes

    @property
    def is_tight(self) -> bool:
        """True if the run fits, but less than `MEMORY_MARGIN` of the usable memory stays free."""
        return self.fits and self.worst.total > (1 - MEMORY_MARGIN) * self.accelerator.usable_bytes

    @property
    def verdict(self) -> str:
        """Whether the run fits into memory: `yes`, `tight` or `NO`."""
        return "tight" if self.is_tight else "yes" if self.fits else "NO"

    @cached_property
    def host(self) -> HostMemory:
        """The host memory of the node that needs the most host memory."""
        return host_memory(self.recipe, self.states, self.workload, self.accelerator.per_node)

    @cached_property
    def disk(self) -> DiskSpace:
        """The disk space that checkpoints need."""
        return disk_space(self.recipe, self.states)

    @property
    def steps_per_day(self) -> float:
        """The expected number of steps per day, if every step runs the LLM."""
        return SECONDS_PER_DAY / self.time.total

    @property
    def days(self) -> float:
        """The expected duration of all steps in days, without evaluations and checkpoints."""
        return self.run_sec(self.time.total) / SECONDS_PER_DAY

    @property
    def misfit(self) -> str:
        """A clause that names the rank that needs the most memory, the parts of its memory, and the usable memory."""
        worst = self.worst
        return (
            f"a rank of stage {worst.stages[0]} at place {worst.place} of its expert-parallel group needs "
            f"{worst.total / GIB:.1f} GiB (weights, gradients and optimizer {worst.states.total / GIB:.1f}, LLM "
            f"activations {worst.activations / GIB:.1f}, encoder activations {worst.encoder_activations / GIB:.1f}, "
            f"buffers {worst.buffers / GIB:.1f}), but {self.accelerator.name} has "
            f"{self.accelerator.usable_bytes / GIB:.1f} GiB usable"
        )

    def check_fits(self) -> None:
        """Check that the run fits into memory.

        Raises:
            UserError: If it does not fit. The message names the kind of rank that needs the most memory, and a remedy.
        """
        if self.fits:
            return
        worst = self.worst
        parts = {
            "states": worst.states.total,
            "LLM activations": worst.activations,
            "encoder activations": worst.encoder_activations,
            "buffers": worst.buffers,
        }
        remedy = memory_remedy(max(parts, key=lambda part: parts[part]), self.recipe, bool(worst.whole_weights))
        raise UserError(f"{self.recipe.name} does not fit: {self.misfit}; try {remedy}, or use --fit")
