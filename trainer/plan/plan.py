"""The plan of a run, which is computed before the run starts and printed by `earshot plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from model.errors import UserError
from model.lengths import num_samples
from trainer.config.checks import check_recipe, deepspeed_json
from trainer.config.schema import Recipe
from trainer.engine.ds_config import load_ds_json
from trainer.engine.llm_optimizer import Reduction
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology, build_topology
from trainer.plan.accelerator import GIB, Accelerator
from trainer.plan.communication import Traffic, traffic
from trainer.plan.data import DatasetSummary
from trainer.plan.encoder_memory import EncoderTracer
from trainer.plan.encoder_time import EncoderCost, encoder_costs
from trainer.plan.experts import ExpertPlan, expert_plan
from trainer.plan.flops import Flops, step_flops
from trainer.plan.forecast import digest_of
from trainer.plan.host import DiskSpace, HostMemory, disk_space, host_memory
from trainer.plan.layer_time import RankRates
from trainer.plan.llm_memory import Kernels, StageMemory, stage_memory
from trainer.plan.mechanisms import AS_BUILT, Mechanisms
from trainer.plan.memory import MemoryModel, RankMemory, kinds_of_ranks, memory_model
from trainer.plan.ranks import DTYPES, RankStates, rank_states
from trainer.plan.remedies import memory_remedy
from trainer.plan.sizes import Size, parameter_sizes, part_sizes, sized_model
from trainer.plan.states import States
from trainer.plan.step_time import StepTime, step_time
from trainer.plan.workload import EncoderWork, Workload, encoder_balance, encoder_padding, encoder_work, pack_work

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
    """The attention implementation whose memory is counted."""
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
        """Return the price of all steps if each step takes `step_sec` seconds."""
        return step_sec * self.recipe.train.steps / 3600 * self.topology.world * price_per_gpu_hour

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
        """The expected number of steps per day."""
        return SECONDS_PER_DAY / self.time.total

    @property
    def days(self) -> float:
        """The expected duration of all steps in days, without evaluations and checkpoints."""
        return self.recipe.train.steps / self.steps_per_day

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


class Planner:
    """A planner for variants of one recipe. It caches the results that variants have in common.

    Args:
        recipe: The first variant. Others may differ from it only in `parallel` and `train`.
        accelerator: The accelerator to plan for.
        device: The type of device that the ranks run on, `cuda` or `cpu`.
        mechanisms: Assumptions that differ from the trainer.
        transformer_engine: True if TransformerEngine is installed on the ranks. On GPUs, it computes attention in bf16.

    Raises:
        UserError: If the recipe is invalid.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        device: str = "cuda",
        mechanisms: Mechanisms = AS_BUILT,
        transformer_engine: bool = False,
    ) -> None:
        check_recipe(recipe)
        self.transformer_engine = transformer_engine or mechanisms.fused_kernels
        self.accelerator, self.device, self.mechanisms = accelerator, device, mechanisms
        self.model = sized_model(recipe)
        self.sizes = parameter_sizes(self.model, recipe.staged_optim)
        self.parts = part_sizes(self.sizes)
        self.ds_json = load_ds_json(deepspeed_json(recipe))
        self._encoder_work: dict[tuple[int, int, int, int], tuple[Workload, list[EncoderWork]]] = {}
        self._stages: dict[Any, StageMemory] = {}
        self._states: dict[Any, tuple[States, ...]] = {}
        self._packs: dict[tuple[int | None, ...], tuple[Workload, PackPlan]] = {}
        self._tracers: dict[tuple[str, bool], EncoderTracer] = {}
        self._encoder_costs: dict[tuple[int, str, bool, bool], tuple[EncoderCost, ...]] = {}

    def tracer(self, recipe: Recipe) -> EncoderTracer:
        """Return the tracer of the encoders, with the recipe's precision and recomputation."""
        key = (recipe.train.precision, recipe.train.recompute_encoders)
        if key not in self._tracers:
            dtype = DTYPES[key[0]]
            rates = RankRates(self.accelerator, self.mechanisms, dtype.itemsize)
            self._tracers[key] = EncoderTracer(
                self.model.tower(), recipe.staged_optim, dtype, key[1], self.device, rates.ridge
            )
        return self._tracers[key]

    def encoder_costs(self, recipe: Recipe, work: Sequence[EncoderWork]) -> tuple[EncoderCost, ...]:
        """Return the costs of the encoders on their busiest ranks. `work` must be a result of `place`."""
        layers, calls = recipe.train.recompute_encoders, recipe.train.recompute_encoder_calls
        key = (id(work), recipe.train.precision, layers, calls)
        if key not in self._encoder_costs:
            tracer = self.tracer(recipe)
            self._encoder_costs[key] = encoder_costs(
                self.model, self.parts, tracer, work, recompute_layers=layers, recompute_calls=calls
            )
        return self._encoder_costs[key]

    def place(self, recipe: Recipe, workload: Workload) -> tuple[Topology, list[EncoderWork], PackPlan]:
        """Return the topology of the recipe, and the distribution of a step's work over it (encoder work and packs)."""
        topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
        budget, train = num_samples(recipe.train.encoder_batch_sec), recipe.train
        # The encoders' work does not depend on how the LLM is split.
        key = (topology.world, topology.ep, budget, id(workload))
        if key not in self._encoder_work:
            work = encoder_work(self.model, workload, topology, budget, self.device)
            self._encoder_work[key] = (workload, work)
        divided = (topology.dp, topology.row_multiple, topology.microbatch_multiple)
        packed = (*divided, train.llm_tokens_per_microbatch, train.pack_multiple_tokens, id(workload))
        if packed not in self._packs:
            self._packs[packed] = (workload, pack_work(recipe, workload, topology))
        return topology, self._encoder_work[key][1], self._packs[packed][1]

    def layer_unit(self, recipe: Recipe) -> float:
        """Return the bytes that a layer of the LLM keeps for the backward pass, divided by the bytes of its input.

        The layer is traced without parallelism, and with short segments that need no padding.
        """
        rows, dtype = 1024, DTYPES[recipe.train.precision]
        found = stage_memory(
            self.model.llm,
            Topology(1, 1, 1),
            0,
            (rows,),
            1,
            optim=recipe.staged_optim,
            dtype=dtype,
            recompute=recipe.train.recompute_llm,
            kernels=Kernels(self.device, self.transformer_engine, self.mechanisms),
            adapters=self.model.adapters,
        )
        return found.layers / self.model.llm.num_hidden_layers / (rows * self.model.llm.hidden_size * dtype.itemsize)

    def memory(
        self, recipe: Recipe, workload: Workload, topology: Topology, work: Sequence[EncoderWork], packs: PackPlan
    ) -> MemoryModel:
        """Return the memory model of a topology, see `memory_model`."""
        tracer, kernels = self.tracer(recipe), Kernels(self.device, self.transformer_engine, self.mechanisms)
        return memory_model(
            recipe, self.model, topology, self.ds_json, tracer, workload, work, packs, kernels, self._stages
        )

    def plan(self, recipe: Recipe, workload: Workload) -> Plan:
        """Return the plan of `recipe` for `workload`.

        Raises:
            UserError: If the recipe is invalid.
        """
        check_recipe(recipe)
        topology, work, packs = self.place(recipe, workload)
        reduction = Reduction.of(recipe.parallel)
        states = rank_states(
            self.model, topology, recipe.staged_optim, recipe.train.precision, self.ds_json, reduction, self._states
        )
        kinds = kinds_of_ranks(self.memory(recipe, workload, topology, work, packs), states)
        fullest = max((k.states for k in kinds), key=lambda s: s.total)
        flops, moved, time = self.time(recipe, workload, topology, work, packs, fullest)
        slow, fast, free = (
            step_time(*self._timed(recipe, topology, accelerator, work, packs, flops, moved, fullest)).total
            for accelerator in (
                self.accelerator.ranging(-UNCERTAINTY),
                self.accelerator.ranging(UNCERTAINTY),
                self.accelerator.without_fixed_costs(),
            )
        )
        fused = self.transformer_engine and self.device == "cuda" and recipe.train.precision == "bf16"
        return Plan(
            recipe,
            self.accelerator,
            topology,
            self.sizes,
            workload,
            packs,
            states,
            kinds,
            flops,
            moved,
            time,
            (fast, slow),
            1 - free / time.total,
            "TransformerEngine" if fused else "PyTorch, on segments padded to batches",
            self.mechanisms,
            encoder_balance(work),
            encoder_padding(work),
            expert_plan(
                self.model.llm,
                topology,
                packs.pack_tokens,
                packs.num_microbatches,
                DTYPES[recipe.train.precision].itemsize,
                recipe.train.recompute_llm == "full",
            ),
        )

    def time(
        self,
        recipe: Recipe,
        workload: Workload,
        topology: Topology,
        work: Sequence[EncoderWork],
        packs: PackPlan,
        states: States,
    ) -> tuple[Flops, list[Traffic], StepTime]:
        """Return the FLOPs, the traffic and the time of a step, given the model states of the fullest rank."""
        flops = step_flops(recipe, self.model, self.parts, workload, work)
        moved = traffic(
            recipe, self.model, self.parts, topology, work, packs, self.accelerator.per_node, self.mechanisms
        )
        time = step_time(*self._timed(recipe, topology, self.accelerator, work, packs, flops, moved, states))
        return flops, moved, time

    def _timed(
        self,
        recipe: Recipe,
        topology: Topology,
        accelerator: Accelerator,
        work: Sequence[EncoderWork],
        packs: PackPlan,
        flops: Flops,
        moved: Sequence[Traffic],
        states: States,
    ) -> tuple[Any, ...]:
        """Return the arguments of `step_time`."""
        return (
            recipe,
            self.model,
            self.parts,
            topology,
            accelerator,
            self.encoder_costs(recipe, work),
            packs,
            flops,
            moved,
            states,
            self.ds_json,
            self.mechanisms,
        )


def _dataset(one: DatasetSummary) -> dict[str, Any]:
    lengths = one.lengths
    return {
        "name": one.name,
        "num_samples": lengths.num_samples,
        "hours": lengths.hours,
        "share": one.share,
        "epochs": one.epochs,
        "mean_sec": float(lengths.seconds.mean()),
        "longest_sec": float(lengths.seconds.max()),
        "num_too_long": lengths.num_too_long,
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """Return all numbers of a plan as JSON values. The keys contain the units."""
    time, kinds = plan.time, []
    for kind in plan.kinds:
        kinds.append(
            {
                "stages": list(kind.stages),
                "expert_place": kind.place,
                "phase": kind.phase,
                "weights_bytes": kind.states.weights,
                "gradients_bytes": kind.states.gradients,
                "optimizer_bytes": kind.states.optimizer,
                "activations_bytes": kind.activations,
                "encoder_activations_bytes": kind.encoder_activations,
                "buffers_bytes": kind.buffers,
                "whole_audio_weights_bytes": kind.whole_weights,
                "whole_audio_gradients_bytes": kind.whole_gradients,
                "total_bytes": kind.total,
            }
        )
    topology = plan.topology
    return {
        "recipe": plan.recipe.name,
        "digest": digest_of(plan.recipe),
        "accelerator": plan.accelerator.name,
        "usable_bytes": int(plan.accelerator.usable_bytes),
        "fits": plan.fits,
        "is_tight": plan.is_tight,
        "ranks": topology.world,
        "tensor": topology.tp,
        "context": topology.cp,
        "pipeline": topology.pp,
        "virtual_stages": topology.vp,
        "data": topology.dp,
        "expert": topology.ep,
        "ffn_expert": topology.ffn_ep,
        "ffn_expert_tensor": topology.expert_tp,
        "ffn_experts": None if plan.experts is None else dataclasses.asdict(plan.experts),
        "parameters": sum(s.total for s in plan.sizes.values()),
        "learned_parameters": sum(s.learned for s in plan.sizes.values()),
        "num_microbatches": plan.packs.num_microbatches,
        "pack_tokens": plan.packs.pack_tokens,
        "tokens_per_step": plan.workload.tokens,
        "audio_sec_per_step": plan.workload.audio_sec,
        "encoder_balance": plan.encoder_balance,
        "encoder_padding": plan.encoder_padding,
        "datasets": None if plan.workload.data is None else [_dataset(d) for d in plan.workload.data.datasets],
        "kinds": kinds,
        "host_bytes_per_node": {"total": plan.host.total, **dataclasses.asdict(plan.host)},
        "checkpoint_bytes": plan.disk.checkpoint,
        "checkpoints_kept": plan.disk.num_kept,
        "disk_bytes_per_run": 0 if plan.disk.in_bucket else plan.disk.run,
        "model_flops": plan.flops.model,
        "llm_flops": plan.flops.llm,
        "encoder_flops": plan.flops.encoders,
        "recomputed_flops": plan.flops.recomputed,
        "sent_bytes_per_rank": {t.name: t.bytes for t in plan.traffic},
        "bubble": time.bubble,
        "step_sec": time.total,
        "encoders_sec": time.encoders,
        "llm_sec": time.llm,
        "exchange_sec": time.exchange,
        "update_sec": time.update,
        "step_sec_range": list(plan.seconds_range),
        "fixed_share": plan.fixed_share,
        "too_small": plan.too_small,
        "attention": plan.attention,
        "what_if": plan.mechanisms.labels(),
        "mfu": time.mfu,
        "mfu_full_attention": time.mfu_full_attention,
        "parts_sec": time.parts,
        "tokens_per_day": plan.workload.tokens * plan.steps_per_day,
        "audio_hours_per_day": plan.workload.audio_sec / 3600 * plan.steps_per_day,
        "days": plan.days,
    }
