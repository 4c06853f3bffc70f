"""The grid of ranks, which determines the part of the model that each rank holds."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from model.errors import UserError


@dataclass(frozen=True)
class ParallelConfig:
    """The parallelism of a run. The LLM has num_ranks / (tensor · context · pipeline) data-parallel replicas."""

    num_ranks: int = 1
    """The number of processes of the run, one per GPU."""
    tensor: int = 1
    """The tensor-parallel size of the LLM: the number of ranks that share each layer. Raise it if a layer's weights or
    activations do not fit one GPU, but keep it within a node. If it is above 1, sequence parallelism is used as
    well."""
    pipeline: int = 1
    """The number of pipeline stages of the LLM. Raise it if the LLM does not fit the GPUs of one node. If it does not
    divide the number of layers, the last stage and, if necessary, some of the first stages have one layer fewer."""
    context: int = 1
    """The context-parallel size of the LLM: the number of ranks that share the tokens of each pack (packed
    sequence). Raise it for recordings and texts whose activations do not fit one GPU (`docs/training.md`). It is not
    supported for an LLM with FFN experts."""
    expert: int = 1
    """The number of neighboring ranks over which the encoder experts are spread. Each block of this many ranks holds
    every encoder expert once. With 1, every encoder expert is sharded over all ranks."""
    audio_shard: int | None = None
    """The number of neighboring ranks among which ZeRO-3 divides the encoders, router, adapter and projector; null for
    all ranks. Each block of this many ranks then holds all of them, and blocks sum their gradients. With many ranks, a
    block of one node or a few nodes exchanges fewer and larger messages, but each rank stores more optimizer state. It
    must be a multiple of `expert`."""
    ffn_expert: int = 1
    """The number of ranks over which the FFN experts of each layer are spread (`docs/experts.md`). These ranks hold the
    same pipeline stage, as tensor-parallel ranks and as replicas. With 1, every rank of a stage holds all FFN experts.
    """
    ffn_expert_tensor: int | None = None
    """The number of tensor-parallel ranks that share an FFN expert. It is 1, or `tensor` for few large experts. null
    selects 1 if `ffn_expert` is above 1, and `tensor` otherwise."""
    virtual_stages: int = 1
    """The number of parts of the LLM that every pipeline stage holds (interleaved 1F1B). The idle time of the pipeline
    is divided by this number, but more activations are kept and more data is sent between stages. If it is above 1, the
    number of micro-batches of a step is a multiple of `pipeline`."""
    overlap_grad_reduce: bool = False
    """Whether the LLM's gradients are summed over replicas during the last backward pass, rather than after it.
    It cannot be combined with `stages`, in which the trained parameters change."""
    overlap_param_gather: bool = False
    """Whether the LLM's updated weights are gathered during the next forward pass, rather than before it. It needs
    `overlap_grad_reduce`."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype in which the LLM's gradients are accumulated and summed over replicas. bf16 halves their memory and
    traffic, but small contributions to large sums are lost."""


class Coordinates(NamedTuple):
    """The coordinates of a rank in the LLM's grid."""

    dp: int
    """The LLM replica."""
    pp: int
    """The pipeline stage."""
    tp: int
    """The tensor-parallel rank."""
    cp: int = 0
    """The context-parallel rank."""


class ExpertCoordinates(NamedTuple):
    """The coordinates of a rank in the grid of the LLM's FFN experts, among the ranks of its pipeline stage."""

    dp: int
    """The index of the rank's copy of the experts. Gradients are summed over all copies."""
    ep: int
    """The index of the rank's part of the list of experts in a layer."""
    tp: int
    """The index of the rank's slice of each of these experts."""


@dataclass(frozen=True)
class Topology:
    """The grid of ranks in Megatron's default order `tp-cp-ep-dp-pp`: rank = tp + TP · (cp + CP · (dp + DP · pp))."""

    world: int
    """The number of ranks."""
    tp: int
    """The tensor-parallel size."""
    pp: int
    """The number of pipeline stages."""
    ep: int = 1
    """The number of ranks that together hold every encoder expert once."""
    ffn_ep: int = 1
    """The number of ranks over which the FFN experts of an LLM layer are spread."""
    ffn_etp: int | None = None
    """The number of ranks that share an FFN expert; None for `tp`."""

    @property
    def expert_tp(self) -> int:
        """The number of ranks that share an FFN expert."""
        return self.tp if self.ffn_etp is None else self.ffn_etp

    @property
    def experts_span_replicas(self) -> bool:
        """True if LLM replicas share FFN experts and must therefore compute the same number of forward passes."""
        return self.ffn_ep * self.expert_tp > self.tp

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Return the coordinates of `rank` in the grid of the LLM's FFN experts."""
        rest, tp = divmod(rank % (self.world // self.pp), self.expert_tp)
        dp, ep = divmod(rest, self.ffn_ep)
        return ExpertCoordinates(dp, ep, tp)

    vp: int = 1
    """The number of virtual stages of each pipeline stage."""
    cp: int = 1
    """The number of ranks that share the rows of a pack."""
    shard: int | None = None
    """The number of consecutive ranks that together hold the partitions of the whole audio side; None for all ranks."""

    @property
    def shard_ranks(self) -> int:
        """The number of ranks in a block that holds the partitions of the whole audio side."""
        return self.shard or self.world

    @property
    def num_shard_copies(self) -> int:
        """The number of blocks that hold copies of the same partitions."""
        return self.world // self.shard_ranks

    def sharers(self, rank: int, *, of_experts: bool) -> range:
        """Return the ranks that share the audio side's partitions with `rank`.

        Args:
            rank: A rank.
            of_experts: True for the encoder experts that `rank` holds, False for all other modules.
        """
        first = rank - rank % self.shard_ranks
        step = self.ep if of_experts else 1
        return range(first + rank % step, first + self.shard_ranks, step)

    def shard_groups(self, *, of_experts: bool) -> list[range]:
        """Return the distinct results of `sharers` for all ranks."""
        places = range(self.ep if of_experts else 1)
        firsts = range(0, self.world, self.shard_ranks)
        return [self.sharers(first + place, of_experts=of_experts) for first in firsts for place in places]

    def num_sharers(self, *, of_experts: bool) -> int:
        """Return the number of ranks that share the audio side's partitions with a rank, including that rank."""
        return len(self.sharers(0, of_experts=of_experts))

    def saving_block(self, name: str) -> int:
        """Return the index of the block whose ranks save the tensor `name` of the audio side in checkpoints.

        Each block saves some of the tensors, so that all ranks write similar amounts.
        """
        return zlib.crc32(name.encode()) % self.num_shard_copies

    def shard_copies(self, rank: int) -> range:
        """Return the ranks that hold copies of the audio side's partitions of `rank`, including `rank` itself."""
        return range(rank % self.shard_ranks, self.world, self.shard_ranks)

    @property
    def without_context(self) -> Topology:
        """The topology of the same ranks in which each copy of the LLM's weights is a replica that processes whole
        packs.

        Context-parallel ranks hold the same weights. If packs are not divided among them, they act as replicas.
        """
        return replace(self, cp=1)

    @property
    def row_multiple(self) -> int:
        """The number that must divide the number of rows of a pack, so that all ranks hold equally many rows."""
        return self.tp if self.cp == 1 else 2 * self.cp * self.tp

    @property
    def microbatch_multiple(self) -> int:
        """The number that must divide the number of micro-batches, as the interleaved schedule requires."""
        return self.pp if self.vp > 1 else 1

    @property
    def dp(self) -> int:
        """The number of LLM replicas."""
        return self.world // (self.tp * self.cp * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of `rank`. This is the inverse of `rank_of`."""
        assert 0 <= rank < self.world, rank
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(dp, pp, tp, cp)

    def rank_of(self, dp: int, pp: int, tp: int, cp: int = 0) -> int:
        """Return the rank at these coordinates."""
        assert 0 <= dp < self.dp and 0 <= pp < self.pp and 0 <= tp < self.tp and 0 <= cp < self.cp, (dp, pp, tp, cp)
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def stage_ranks(self, dp: int, pp: int) -> tuple[int, ...]:
        """Return the ranks that hold stage `pp` of replica `dp`, ordered by context- and then tensor-parallel rank."""
        first = self.rank_of(dp, pp, 0)
        return tuple(range(first, first + self.tp * self.cp))

    def first_stage_ranks(self, dp: int) -> tuple[int, ...]:
        """Return the ranks of replica `dp` that receive embeddings."""
        return self.stage_ranks(dp, 0)

    def last_stage_ranks(self, dp: int) -> tuple[int, ...]:
        """Return the ranks of replica `dp` that compute the loss."""
        return self.stage_ranks(dp, self.pp - 1)

    def replica_ranks(self, dp: int) -> tuple[int, ...]:
        """Return all TP·CP·PP ranks of replica `dp`, ordered by stage."""
        return tuple(rank for pp in range(self.pp) for rank in self.stage_ranks(dp, pp))

    @property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of `ep` consecutive ranks that together hold every encoder expert once.

        They are the groups that `deepspeed.utils.groups._create_expert_and_data_parallel(ep)` creates.
        """
        return tuple(tuple(range(start, start + self.ep)) for start in range(0, self.world, self.ep))

    @property
    def expert_replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that hold the same encoder experts.

        A group consists of every `ep`-th rank. Its ranks sum their gradients.
        """
        return tuple(tuple(range(start, self.world, self.ep)) for start in range(self.ep))


def build_topology(parallel: ParallelConfig, world: int) -> Topology:
    """Return the grid of ranks that a recipe describes.

    Args:
        parallel: The section `parallel` of the recipe.
        world: The number of ranks that were started.

    Raises:
        UserError: If a size does not divide the number of ranks, or `world` differs from `parallel.num_ranks`.
    """
    if parallel.num_ranks < 1:
        raise UserError(f"parallel.num_ranks = {parallel.num_ranks}: must be at least 1")
    if parallel.num_ranks != world:
        raise UserError(
            f"parallel.num_ranks = {parallel.num_ranks}, but {world} ranks were started: "
            f"start {parallel.num_ranks} or set parallel.num_ranks={world}"
        )
    tensor, pipeline = parallel.tensor, parallel.pipeline
    _check_divides("parallel.tensor", tensor, world, f"{world} ranks")
    held = f"{world} ranks with tensor={tensor}"
    _check_divides("parallel.pipeline", pipeline, world // tensor, held, tensor)
    held = f"{held} and pipeline={pipeline}"
    _check_divides("parallel.context", parallel.context, world // tensor // pipeline, held, tensor * pipeline)
    _check_divides("parallel.expert", parallel.expert, world, f"{world} ranks")
    shard = _shard(parallel, world)
    if parallel.virtual_stages < 1 or (parallel.virtual_stages > 1 and parallel.pipeline == 1):
        raise UserError(
            f"parallel.virtual_stages = {parallel.virtual_stages}: must be "
            f"{'at least 1' if parallel.pipeline > 1 else '1, since parallel.pipeline = 1'}"
        )
    return Topology(
        world=world,
        tp=parallel.tensor,
        pp=parallel.pipeline,
        ep=parallel.expert,
        ffn_ep=parallel.ffn_expert,
        ffn_etp=_expert_tensor(parallel),
        vp=parallel.virtual_stages,
        cp=parallel.context,
        shard=shard,
    )


def _shard(parallel: ParallelConfig, world: int) -> int | None:
    """Return `Topology.shard`, after checking `parallel.audio_shard`."""
    shard, ep = parallel.audio_shard, parallel.expert
    allowed = [d for d in divisors(world) if d % ep == 0]
    if shard is not None and shard not in allowed:
        raise UserError(
            f"parallel.audio_shard = {shard}: must be one of {', '.join(map(str, allowed))} for {world} ranks with "
            f"expert={ep}"
        )
    return None if shard == world else shard


def _expert_tensor(parallel: ParallelConfig) -> int | None:
    """Check the sizes of FFN expert parallelism, and return `Topology.ffn_etp`.

    Raises:
        UserError: If a size is not allowed.
    """
    tensor, ep, etp = parallel.tensor, parallel.ffn_expert, parallel.ffn_expert_tensor
    etp = (1 if ep > 1 else tensor) if etp is None else etp
    allowed = [tensor] if ep == 1 else sorted({1, tensor})
    if etp not in allowed:
        raise UserError(
            f"parallel.ffn_expert_tensor = {etp}: must be {' or '.join(map(str, allowed))} for tensor={tensor} and "
            f"ffn_expert={ep}"
        )
    ranks = parallel.num_ranks // parallel.pipeline
    what = f"{ranks} ranks per stage with ffn_expert_tensor={etp}"
    _check_divides("parallel.ffn_expert", ep, ranks // etp, what, parallel.pipeline * etp)
    return None if etp == tensor else etp


def divisors(number: int) -> list[int]:
    """Return all positive divisors of a number in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _check_divides(key: str, value: int, total: int, what: str, others: int = 1) -> None:
    """Check that a size divides `total`, which is the number of ranks divided by the product `others` of other sizes.

    Raises:
        UserError: If it does not.
    """
    if value < 1 or total % value:
        legal = ", ".join(map(str, divisors(total)))
        ranks = f"; or set parallel.num_ranks to a multiple of {others * value}" if value > 1 else ""
        raise UserError(f"{key} = {value}: must be one of {legal} for {what}{ranks}")
