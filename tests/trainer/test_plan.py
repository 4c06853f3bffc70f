"""Tests of the plans of packs and exchanges: every rank computes the same plan, and every row arrives at its place."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.llm.context import ContextPart
from trainer.parallel.packs import PackPlan, embedding_segments, plan_packs, token_segments
from trainer.parallel.plan import Route, route
from trainer.parallel.topology import Topology


def carry_out(routes: list[Route], rows: list[np.ndarray]) -> list[np.ndarray]:
    """Execute an all-to-all in one process, and return the rows that each rank receives."""
    world = len(routes)
    sent = [np.split(rows[r][routes[r].send_rows], np.cumsum(routes[r].send_counts)[:-1]) for r in range(world)]
    results = []
    for rank, plan in enumerate(routes):
        arriving = np.concatenate([sent[source][rank] for source in range(world)])
        assert [len(sent[s][rank]) for s in range(world)] == plan.recv_counts.tolist()
        out = np.full(plan.num_out, -1)
        out[plan.recv_rows] = arriving
        results.append(out)
    return results


TOPOLOGIES = [Topology(1, 1, 1), Topology(2, 1, 1), Topology(2, 2, 1), Topology(4, 2, 2), Topology(4, 1, 2),
              Topology(8, 2, 2), Topology(6, 1, 3), Topology(2, 1, 1, cp=2), Topology(12, 3, 1, cp=2),
              Topology(8, 1, 2, cp=4), Topology(16, 2, 2, cp=2)]  # fmt: skip


def samples_of_rows(packing: PackPlan, replica: int) -> NDArray[np.int64]:
    """Return the sample of every row of a replica's packs, as `members` and `lengths` give it; -1 for padding."""
    found = []
    for m in range(packing.num_microbatches):
        lengths = packing.lengths(replica, m)
        found.append(np.repeat([*packing.members(replica, m), -1][: len(lengths)], lengths))
    return np.concatenate(found)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TOPOLOGIES), st.data())
def test_every_token_arrives_once_at_its_planned_place(topology: Topology, data: st.DataObject) -> None:
    per_rank = data.draw(
        st.lists(st.lists(st.integers(1, 30), max_size=4), min_size=topology.world, max_size=topology.world)
    )
    sizes = [n for own in per_rank for n in own]
    source_ranks = np.array([rank for rank, own in enumerate(per_rank) for _ in own], dtype=np.int64)
    multiple = topology.row_multiple * data.draw(st.sampled_from([1, 1, 3, 8]))
    packing = plan_packs(sizes, topology.dp, data.draw(st.integers(1, 64)), multiple)
    assert packing.pack_tokens % multiple == 0
    ids = np.arange(sum(sizes))
    starts = np.cumsum([0] + [sum(own) for own in per_rank])
    rows = [ids[starts[r] : starts[r + 1]] for r in range(topology.world)]
    num_rows = packing.num_microbatches * packing.pack_tokens
    at_ends = [topology.coordinates(r).pp in (0, topology.pp - 1) for r in range(topology.world)]
    routes = [
        route(token_segments(packing, source_ranks, topology, r), r, topology.world, num_rows if at_ends[r] else 0)
        for r in range(topology.world)
    ]
    arrived = carry_out(routes, rows)
    first = np.cumsum([0, *sizes])
    for rank in range(topology.world):
        if not at_ends[rank]:
            assert len(arrived[rank]) == 0
            continue
        owners = samples_of_rows(packing, topology.coordinates(rank).dp)
        for sample in set(owners.tolist()) - {-1}:
            assert arrived[rank][owners == sample].tolist() == ids[first[sample] : first[sample + 1]].tolist()
        assert (arrived[rank][owners == -1] == -1).all()
    some = np.arange(len(sizes))[::-2]
    rows_in_replica = packing.pack % packing.num_microbatches * packing.pack_tokens + packing.row
    assert packing.replica_rows(some).tolist() == rows_in_replica[some].tolist()
    packs = [(d, m) for d in range(topology.dp) for m in range(packing.num_microbatches)]
    placed = [i for d, m in packs for i in packing.members(d, m).tolist()]
    assert sorted(placed) == list(range(len(sizes)))
    for d in range(topology.dp):
        assert all(sum(packing.lengths(d, m)) == packing.pack_tokens for m in range(packing.num_microbatches))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(TOPOLOGIES), st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 50))
def test_embeddings_go_to_exactly_the_slice_that_needs_them(topology: Topology, sizes: list[int], budget: int) -> None:
    source_ranks = np.sort(np.arange(len(sizes)) % topology.world)
    packing = plan_packs(sizes, topology.dp, budget, topology.row_multiple)
    share = packing.pack_tokens // (topology.tp * topology.cp)
    ids = np.arange(sum(sizes))
    offsets = np.cumsum([0, *sizes])
    rows = [
        np.concatenate([ids[offsets[i] : offsets[i + 1]] for i, h in enumerate(source_ranks) if h == r] or [ids[:0]])
        for r in range(topology.world)
    ]
    num_rows = packing.num_microbatches * share
    routes = [
        route(
            embedding_segments(packing, source_ranks, topology, r),
            r,
            topology.world,
            num_rows if topology.coordinates(r).pp == 0 else 0,
        )
        for r in range(topology.world)
    ]
    arrived = carry_out(routes, rows)
    assert sorted(np.concatenate(arrived)[np.concatenate(arrived) >= 0].tolist()) == ids.tolist()
    for d in range(topology.dp):
        slices = [arrived[r].reshape(packing.num_microbatches, share) for r in topology.first_stage_ranks(d)]
        held = [ContextPart(cp, topology.cp).rows(packing.pack_tokens) for cp in range(topology.cp)]
        packs = np.empty((packing.num_microbatches, packing.pack_tokens), dtype=np.int64)
        packs[:, np.concatenate(held)] = np.concatenate(slices, axis=1)
        whole = packs.flatten()
        owners = samples_of_rows(packing, d)
        for sample in set(owners.tolist()) - {-1}:
            assert whole[owners == sample].tolist() == ids[offsets[sample] : offsets[sample + 1]].tolist()


def test_restricted_plans_agree_on_both_sides() -> None:
    packing = plan_packs([4, 3], 1, 16, 1)
    segments = [token_segments(packing, np.array([0, 1]), Topology(2, 2, 1), r) for r in (0, 1)]
    keep = [np.array([True, False, True, False]), np.array([False, True, True])]
    whole = np.array([True, False, True, False, False, True, True])
    routes = [route(segments[r], r, 2, 7).restricted(keep[r], whole) for r in (0, 1)]
    arrived = carry_out(routes, [np.arange(4), np.arange(10, 13)])
    assert arrived[0].tolist() == arrived[1].tolist() == [0, -1, 2, -1, -1, 11, 12]


def test_a_sample_longer_than_the_budget_makes_the_packs_longer() -> None:
    packing = plan_packs([100, 5, 5], 1, 16, 4)
    assert packing.pack_tokens == 100 and packing.num_microbatches == 2
    assert plan_packs([], 2, 16, 4).pack_tokens == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.sampled_from([2, 8, 32, 64]), st.integers(1, 3))
def test_grid_changes_only_the_padding_and_stays_within_the_budget(
    sizes: list[int], multiple: int, replicas: int
) -> None:
    plain, grid = (plan_packs(sizes, replicas, 64, m) for m in (1, multiple))
    assert grid.pack_tokens == -(-plain.pack_tokens // multiple) * multiple <= 64
    assert grid.num_microbatches == plain.num_microbatches
    assert (grid.pack == plain.pack).all() and (grid.row == plain.row).all()
