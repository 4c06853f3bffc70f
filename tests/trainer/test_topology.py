"""Tests of the coordinates and the groups of ranks."""

from __future__ import annotations

import itertools

import pytest

from model.errors import UserError
from trainer.parallel.topology import ParallelConfig, Topology, build_topology, divisors


def test_eight_ranks_written_by_hand() -> None:
    # With TP 2, PP 2, DP 2 in Megatron's order tp-cp-ep-dp-pp, stage 0 has ranks 0 to 3, and stage 1 has ranks 4 to 7.
    topology = Topology(world=8, tp=2, pp=2)
    assert topology.dp == 2
    assert [tuple(topology.coordinates(r)) for r in range(8)] == [
        (0, 0, 0, 0),
        (0, 0, 1, 0),
        (1, 0, 0, 0),
        (1, 0, 1, 0),
        (0, 1, 0, 0),
        (0, 1, 1, 0),
        (1, 1, 0, 0),
        (1, 1, 1, 0),
    ]
    assert topology.first_stage_ranks(0) == (0, 1)
    assert topology.last_stage_ranks(0) == (4, 5)
    assert topology.replica_ranks(1) == (2, 3, 6, 7)


def test_one_pipeline_stage_is_first_and_last() -> None:
    topology = Topology(world=4, tp=2, pp=1)
    assert topology.first_stage_ranks(1) == topology.last_stage_ranks(1) == topology.replica_ranks(1) == (2, 3)


@pytest.mark.parametrize(("tp", "cp", "pp"), list(itertools.product([1, 2, 4], [1, 2], [1, 3])))
def test_every_rank_has_one_place_and_one_replica(tp: int, cp: int, pp: int) -> None:
    topology = Topology(world=24, tp=tp, pp=pp, cp=cp)
    assert [topology.rank_of(*topology.coordinates(r)) for r in range(24)] == list(range(24))
    replicas = [topology.replica_ranks(dp) for dp in range(topology.dp)]
    assert sorted(itertools.chain(*replicas)) == list(range(24))
    assert all(topology.coordinates(r).dp == dp for dp, ranks in enumerate(replicas) for r in ranks)


@pytest.mark.parametrize(
    ("tp", "cp", "pp"), [(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2), (4, 1, 3), (8, 1, 4), (2, 3, 2), (1, 2, 3)]
)
def test_groups_equal_those_of_megatron(tp: int, cp: int, pp: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    world = 12 * tp * cp * pp
    topology = Topology(world=world, tp=tp, pp=pp, cp=cp)
    order = RankGenerator(tp=tp, ep=1, dp=topology.dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    stages = {topology.stage_ranks(dp, stage) for dp in range(topology.dp) for stage in range(pp)}
    assert stages == {tuple(g) for g in order.get_ranks("tp-cp")}
    replicas = {frozenset(topology.replica_ranks(dp)) for dp in range(topology.dp)}
    assert replicas == {frozenset(g) for g in order.get_ranks("tp-cp-pp")}
    copies = topology.without_context
    same_weights = {
        tuple(copies.rank_of(copy, stage, t) for copy in range(copies.dp)) for stage in range(pp) for t in range(tp)
    }
    assert same_weights == {tuple(g) for g in order.get_ranks("dp-cp")}


def test_expert_groups_equal_those_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.utils import groups

    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.dist, "get_world_size", lambda: 16)
    monkeypatch.setattr(groups.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(groups.dist, "new_group", lambda ranks: made.append(tuple(ranks)))
    monkeypatch.setattr(groups, "log_dist", lambda *_, **__: None)
    for table in ("", "_RANKS"):
        for kind in ("_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP"):
            monkeypatch.setattr(groups, kind + table, {})
    groups._create_expert_and_data_parallel(4)
    topology = Topology(world=16, tp=1, pp=1, ep=4)
    assert made == [*topology.expert_replica_groups, *topology.expert_groups]


def test_blocks_that_hold_the_whole_audio_side() -> None:
    topology = build_topology(ParallelConfig(16, expert=2, audio_shard=4), 16)
    assert (topology.shard_ranks, topology.num_shard_copies) == (4, 4)
    assert topology.sharers(6, of_experts=False) == range(4, 8)
    assert list(topology.sharers(6, of_experts=True)) == [4, 6] and list(topology.sharers(7, of_experts=True)) == [5, 7]
    assert list(topology.shard_copies(6)) == [2, 6, 10, 14]
    assert [list(ranks) for ranks in topology.shard_groups(of_experts=True)[:3]] == [[0, 2], [1, 3], [4, 6]]
    assert topology.shard_groups(of_experts=False) == [range(first, first + 4) for first in (0, 4, 8, 12)]
    assert (topology.num_sharers(of_experts=False), topology.num_sharers(of_experts=True)) == (4, 2)
    assert {topology.saving_block(f"audio.{i}") for i in range(100)} == {0, 1, 2, 3}
    for rank in range(16):
        assert rank in topology.sharers(rank, of_experts=True) and rank in topology.shard_copies(rank)


def test_one_block_is_the_default() -> None:
    topology = build_topology(ParallelConfig(16, expert=4, audio_shard=16), 16)
    assert topology == build_topology(ParallelConfig(16, expert=4), 16)
    assert topology.sharers(6, of_experts=False) == range(16)
    assert [tuple(topology.sharers(r, of_experts=True)) for r in range(4)] == list(topology.expert_replica_groups)
    assert list(topology.shard_copies(6)) == [6] and topology.saving_block("audio.x") == 0


def test_experts_are_spread_over_tensor_ranks_and_replicas() -> None:
    topology = build_topology(ParallelConfig(16, tensor=2, pipeline=2, ffn_expert=4), 16)
    assert (topology.expert_tp, topology.experts_span_replicas) == (1, True)
    stage = [topology.expert_coordinates(rank) for rank in range(8)]
    assert [at.ep for at in stage] == [0, 1, 2, 3, 0, 1, 2, 3] and [at.dp for at in stage] == [0] * 4 + [1] * 4
    assert stage == [topology.expert_coordinates(rank) for rank in range(8, 16)]
    shared = build_topology(ParallelConfig(8, tensor=2, ffn_expert=4, ffn_expert_tensor=2), 8)
    assert [tuple(shared.expert_coordinates(r)) for r in (0, 1, 2, 7)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 3, 1)]
    assert not build_topology(ParallelConfig(8, tensor=4, ffn_expert=4), 8).experts_span_replicas


def test_legal_sizes() -> None:
    assert build_topology(ParallelConfig(num_ranks=128, tensor=8, pipeline=4), 128) == Topology(128, 8, 4, 1)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (
            ParallelConfig(12, tensor=5),
            12,
            "parallel.tensor = 5: must be one of 1, 2, 3, 4, 6, 12 for 12 ranks; or set parallel.num_ranks to a "
            "multiple of 5",
        ),
        (ParallelConfig(8, tensor=0), 8, "parallel.tensor = 0: must be one of 1, 2, 4, 8 for 8 ranks"),
        (
            ParallelConfig(8, tensor=2, pipeline=8),
            8,
            "parallel.pipeline = 8: must be one of 1, 2, 4 for 8 ranks with tensor=2; or set parallel.num_ranks to a "
            "multiple of 16",
        ),
        (
            ParallelConfig(8, tensor=2, ffn_expert_tensor=1),
            8,
            "parallel.ffn_expert_tensor = 1: must be 2 for tensor=2 and ffn_expert=1",
        ),
        (
            ParallelConfig(8, tensor=4, ffn_expert=2, ffn_expert_tensor=2),
            8,
            "parallel.ffn_expert_tensor = 2: must be 1 or 4 for tensor=4 and ffn_expert=2",
        ),
        (
            ParallelConfig(8, tensor=2, pipeline=2, ffn_expert=4, ffn_expert_tensor=2),
            8,
            "parallel.ffn_expert = 4: must be one of 1, 2 for 4 ranks per stage with ffn_expert_tensor=2; or set "
            "parallel.num_ranks to a multiple of 16",
        ),
        (
            ParallelConfig(8, expert=3),
            8,
            "parallel.expert = 3: must be one of 1, 2, 4, 8 for 8 ranks; or set parallel.num_ranks to a multiple of 3",
        ),
        (
            ParallelConfig(8, expert=2, audio_shard=1),
            8,
            "parallel.audio_shard = 1: must be one of 2, 4, 8 for 8 ranks with expert=2",
        ),
        (
            ParallelConfig(8),
            4,
            "parallel.num_ranks = 8, but 4 ranks were started: start 8 or set parallel.num_ranks=4",
        ),
        (ParallelConfig(0), 0, "parallel.num_ranks = 0: must be at least 1"),
    ],
)
def test_illegal_sizes_are_refused_with_the_legal_ones(parallel: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        build_topology(parallel, world)
    assert str(error.value) == message
