"""Which rank does what: pure arithmetic on a handful of integers, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.errors import UserError


@dataclass(frozen=True)
class ParallelConfig:
    """The recipe's `parallel` section. The LLM's data parallelism is what remains: num_ranks / (tensor · pipeline)."""

    num_ranks: int = 1
    """World size: processes in the job, one per GPU."""
    tensor: int = 1
    """Tensor (and sequence) parallel size of the LLM: ranks that share each of its layers; keep it within a node."""
    pipeline: int = 1
    """Pipeline stages of the LLM."""
    expert: int = 1
    """Ranks over which the routed encoders are spread: blocks of so many neighbours hold every one of them once. 1: all
    ranks share in all of them."""


class Coordinates(NamedTuple):
    """Where a rank stands in the LLM's grid."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """The rank grid, in Megatron's default order `tp-cp-ep-dp-pp`: rank = tp + TP · (dp + DP · pp)."""

    world: int
    tp: int
    pp: int
    ep: int = 1

    @property
    def dp(self) -> int:
        """LLM replicas."""
        return self.world // (self.tp * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """The grid place of `rank`; inverse of `rank_of`."""
        assert 0 <= rank < self.world, rank
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(dp, pp, tp)

    def rank_of(self, dp: int, pp: int, tp: int) -> int:
        """The rank at a grid place."""
        assert 0 <= dp < self.dp and 0 <= pp < self.pp and 0 <= tp < self.tp, (dp, pp, tp)
        return tp + self.tp * (dp + self.dp * pp)

    def stage_ranks(self, dp: int, pp: int) -> tuple[int, ...]:
        """The tensor-parallel group that holds stage `pp` of replica `dp`, by tensor rank."""
        return tuple(self.rank_of(dp, pp, tp) for tp in range(self.tp))

    def first_stage_ranks(self, dp: int) -> tuple[int, ...]:
        """Ranks of replica `dp` that take embeddings in."""
        return self.stage_ranks(dp, 0)

    def last_stage_ranks(self, dp: int) -> tuple[int, ...]:
        """Ranks of replica `dp` that have the loss."""
        return self.stage_ranks(dp, self.pp - 1)

    def replica_ranks(self, dp: int) -> tuple[int, ...]:
        """All TP·PP ranks of replica `dp`, stage after stage."""
        return tuple(rank for pp in range(self.pp) for rank in self.stage_ranks(dp, pp))

    @property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that together hold every routed encoder once: blocks of `ep` neighbours.

        The same sets as `deepspeed.utils.groups._create_expert_and_data_parallel(ep)`.
        """
        return tuple(tuple(range(start, start + self.ep)) for start in range(0, self.world, self.ep))

    @property
    def expert_replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same routed encoders and sum their gradients: every `ep`-th rank (source as above)."""
        return tuple(tuple(range(start, self.world, self.ep)) for start in range(self.ep))


def build_topology(parallel: ParallelConfig, world: int) -> Topology:
    """The grid of `world` ranks that the recipe asks for.

    Raises:
        UserError: a size does not divide the ranks (the legal values are listed), or `world` is not the recipe's.
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
    """All positive divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _check_divides(key: str, value: int, total: int, what: str) -> None:
    if value < 1 or total % value:
        raise UserError(f"{key} = {value}: legal values for {what} are {', '.join(map(str, divisors(total)))}")
