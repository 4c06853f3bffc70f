"""The planner, which computes the plans of variants of one recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.lengths import num_samples
from trainer.config.checks import check_recipe, deepspeed_json
from trainer.config.schema import Recipe
from trainer.engine.ds_config import load_ds_json
from trainer.engine.llm_optimizer import Reduction
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology, build_topology
from trainer.plan.accelerator import Accelerator
from trainer.plan.communication import Traffic, traffic
from trainer.plan.encoder_memory import EncoderTracer
from trainer.plan.encoder_time import EncoderCost, encoder_costs
from trainer.plan.experts import expert_plan
from trainer.plan.flops import Flops, step_flops
from trainer.plan.layer_time import RankRates
from trainer.plan.llm_memory import Kernels, StageMemory, stage_memory
from trainer.plan.mechanisms import AS_BUILT, Mechanisms
from trainer.plan.memory import MemoryModel, kinds_of_ranks, memory_model
from trainer.plan.plan import UNCERTAINTY, Plan
from trainer.plan.ranks import DTYPES, rank_states
from trainer.plan.sizes import parameter_sizes, part_sizes, sized_model
from trainer.plan.states import States
from trainer.plan.step_time import StepTime, step_time
from trainer.plan.workload import EncoderWork, Workload, encoder_balance, encoder_padding, encoder_work, pack_work


class Planner:
    """A planner for variants of one recipe. It caches the results that variants have in common.

    Args:
        recipe: The first variant. Others may differ from it only in `parallel` and `train`.
        accelerator: The accelerator to plan for.
        device: The type of device that the ranks run on, `cuda` or `cpu`.
        mechanisms: The mechanisms that the plan assumes. The defaults describe the trainer.

    Raises:
        UserError: If the recipe is invalid.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        device: str = "cuda",
        mechanisms: Mechanisms = AS_BUILT,
    ) -> None:
        check_recipe(recipe)
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
        """Return the costs of the primary encoder and of the encoder experts, each on its busiest rank.

        `work` must be a result of `place`.
        """
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
            kernels=self._kernels(recipe),
            adapters=self.model.adapters,
        )
        return found.layers / self.model.llm.num_hidden_layers / (rows * self.model.llm.hidden_size * dtype.itemsize)

    def _kernels(self, recipe: Recipe) -> Kernels:
        return Kernels(self.device, recipe.train.deterministic, self.mechanisms)

    def memory(
        self, recipe: Recipe, workload: Workload, topology: Topology, work: Sequence[EncoderWork], packs: PackPlan
    ) -> MemoryModel:
        """Return the memory model of a topology; see `memory_model`."""
        tracer, kernels = self.tracer(recipe), self._kernels(recipe)
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
        unpadded = self._kernels(recipe).attends_unpadded(DTYPES[recipe.train.precision])
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
            "without padding" if unpadded else "on segments padded to batches",
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
