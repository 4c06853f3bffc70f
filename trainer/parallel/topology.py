"""The grid of ranks, which determines the part of the model that each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.errors import UserError


@dataclass(frozen=True)
class ParallelConfig:
    """The parallelism of a run. The data-parallel size of the LLM follows: num_ranks / (tensor · pipeline)."""

    num_ranks: int = 1
    """The number of processes of the run, one per GPU."""
    tensor: int = 1
    """The tensor-parallel size of the LLM: the ranks that share each of its layers. Raise it if a layer's weights or
    activations do not fit one GPU, but keep it within a node. Above 1, sequence parallelism is on, too."""
    pipeline: int = 1
    """The number of pipeline stages of the LLM. Raise it if the LLM does not fit the GPUs of one node."""
    expert: int = 1
    """The number of neighbouring ranks over which the encoder experts are spread: each block of this many ranks holds
    every expert once. With 1, every expert is sharded over all ranks."""


class Coordinates(NamedTuple):
    """The coordinates of a rank in the LLM's grid."""

    dp: int
    """The LLM replica."""
    pp: int
    """The pipeline stage."""
    tp: int
    """The tensor-parallel rank."""


@dataclass(frozen=True)
class Topology:
    """The grid of ranks in Megatron's default order `tp-cp-ep-dp-pp`: rank = tp + TP · (dp + DP · pp)."""

    world: int
    """The number of ranks."""
    tp: int
    """The tensor-parallel size."""
    pp: int
    """The number of pipeline stages."""
    ep: int = 1
    """The number of ranks that together hold every encoder expert once."""

    @property
    def dp(self) -> int:
        """The number of LLM replicas."""
        return self.world // (self.tp * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of `rank`. This is the inverse of `rank_of`."""
        assert 0 <= rank < self.world, rank
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(dp, pp, tp)

    def rank_of(self, dp: int, pp: int, tp: int) -> int:
        """Return the rank at these coordinates."""
        assert 0 <= dp < self.dp and 0 <= pp < self.pp and 0 <= tp < self.tp, (dp, pp, tp)
        return tp + self.tp * (dp + self.dp * pp)

    def stage_ranks(self, dp: int, pp: int) -> tuple[int, ...]:
        """Return the ranks that hold stage `pp` of replica `dp`, in the order of their tensor-parallel rank."""
        return tuple(self.rank_of(dp, pp, tp) for tp in range(self.tp))

    def first_stage_ranks(self, dp: int) -> tuple[int, ...]:
        """Return the ranks of replica `dp` that receive embeddings."""
        return self.stage_ranks(dp, 0)

    def last_stage_ranks(self, dp: int) -> tuple[int, ...]:
        """Return the ranks of replica `dp` that compute the loss."""
        return self.stage_ranks(dp, self.pp - 1)

    def replica_ranks(self, dp: int) -> tuple[int, ...]:
        """Return all TP·PP ranks of replica `dp`, ordered by stage."""
        return tuple(rank for pp in range(self.pp) for rank in self.stage_ranks(dp, pp))

    @property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of `ep` consecutive ranks that together hold every encoder expert once.

        They are the groups that `deepspeed.utils.groups._create_expert_and_data_parallel(ep)` creates.
        """
        return tuple(tuple(range(start, start + self.ep)) for start in range(0, self.world, self.ep))

    @property
    def expert_replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that hold the same encoder experts and sum their gradients: every `ep`-th rank."""
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
    _check_divides("parallel.tensor", parallel.tensor, world, f"{world} ranks")
    stages = world // parallel.tensor
    _check_divides("parallel.pipeline", parallel.pipeline, stages, f"{world} ranks with tensor={parallel.tensor}")
    _check_divides("parallel.expert", parallel.expert, world, f"{world} ranks")
    return Topology(world=world, tp=parallel.tensor, pp=parallel.pipeline, ep=parallel.expert)


def divisors(number: int) -> list[int]:
    """Return all positive divisors of a number in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _check_divides(key: str, value: int, total: int, what: str) -> None:
    if value < 1 or total % value:
        raise UserError(f"{key} = {value}: legal values for {what} are {', '.join(map(str, divisors(total)))}")
