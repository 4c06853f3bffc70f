"""Tests of dispatch plans: each wanted pair of clip and encoder is computed once, and its features are returned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.lengths import WHOLE, Windowing, num_samples
from trainer.parallel.dispatch import ClipTable, dispatch_of, group_by_length, plan_dispatch


def linear(rate: float):  # noqa: ANN201
    return lambda samples: rate * samples


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_pair_is_computed_once_and_returned(data: st.DataObject) -> None:
    ep = data.draw(st.sampled_from([1, 2, 4]))
    world = ep * data.draw(st.integers(1, 3))
    num_encoders = data.draw(st.integers(1, 5))
    places = data.draw(st.lists(st.integers(0, ep - 1), min_size=num_encoders, max_size=num_encoders))
    per_rank = data.draw(st.lists(st.lists(st.integers(1, 2000), max_size=4), min_size=world, max_size=world))
    source_rank = np.array([r for r, own in enumerate(per_rank) for _ in own], dtype=np.int64)
    samples = np.array([n for own in per_rank for n in own], dtype=np.int64)
    flags = data.draw(
        st.lists(st.booleans(), min_size=len(source_rank) * num_encoders, max_size=len(source_rank) * num_encoders)
    )
    clips = ClipTable(source_rank, samples, np.array(flags, dtype=bool).reshape(len(source_rank), num_encoders))
    plan = plan_dispatch(clips, [linear(k + 1.0) for k in range(num_encoders)], places, ep, world)
    assert (plan.encoder_rank % ep == np.asarray(places)[plan.encoder]).all(), (
        "a rank received a clip for an encoder that it lacks"
    )
    parts = [dispatch_of(plan, rank) for rank in range(world)]

    # The plan is executed with numbers in place of clips, and with pairs (clip, encoder) in place of features.
    first = np.searchsorted(source_rank, np.arange(world))
    sent = [[int(first[r]) + c for c in parts[r].send_clips] for r in range(world)]
    arriving = [delivered(rank, sent, [p.send_to for p in parts], parts[rank].recv_from) for rank in range(world)]
    computed = []
    for rank, part in enumerate(parts):
        assert [int(samples[c]) for c in arriving[rank]] == list(part.recv_lengths)
        assert len(set(arriving[rank])) == len(arriving[rank]), "a clip was sent twice to one rank"
        results = [(arriving[rank][i], k) for k, work in enumerate(part.work) for i in work]
        computed += results
        back = [results[i] for i in part.return_order]
        assert [int(source_rank[c]) for c, _ in back] == list(part.return_to) == sorted(part.return_to)
    assert sorted(computed) == sorted(zip(plan.clip.tolist(), plan.encoder.tolist(), strict=True))
    for rank, part in enumerate(parts):
        returned = [[results_of(p, arriving[r])[i] for i in p.return_order] for r, p in enumerate(parts)]
        got = delivered(rank, returned, [p.return_to for p in parts], parts[rank].result_from)
        assert [-(-int(samples[c]) // 320) for c, _ in got] == list(part.result_lengths)
        for k in range(num_encoders):
            mine = [c for c in range(len(source_rank)) if source_rank[c] == rank and clips.wanted[c, k]]
            assert [got[i] for i in part.results[k]] == [(c, k) for c in mine]


def delivered(rank: int, sent: list[list], to: list[tuple[int, ...]], source: tuple[int, ...]) -> list:
    """Return what arrives at `rank` from all ranks, in the order in which each of them sent it."""
    left = {s: [x for x, t in zip(sent[s], to[s], strict=True) if t == rank] for s in range(len(sent))}
    found = [left[s].pop(0) for s in source]
    assert not any(left.values()), "something was sent that no rank expects"
    return found


def results_of(part, arriving: list[int]) -> list[tuple[int, int]]:  # noqa: ANN001
    return [(arriving[i], k) for k, work in enumerate(part.work) for i in work]


def test_encoder_ranks_get_equal_work_and_clips_of_similar_length() -> None:
    source_rank = np.array([0] * 8 + [1, 2, 3])
    clips = ClipTable(source_rank, np.array([1, 2, 4, 8] * 2 + [2, 1, 1]) * 16_000, np.ones((11, 1), dtype=bool))
    plan = plan_dispatch(clips, [linear(1.0)], [0], 1, 4)
    runs = [sorted(clips.samples[plan.clip[plan.encoder_rank == rank]] // 16_000) for rank in range(4)]
    assert runs == [[1, 8], [1, 8], [4, 4], [1, 1, 2, 2, 2]]


def test_every_encoder_is_balanced_over_its_ranks() -> None:
    clips = ClipTable(np.arange(4), np.full(4, 16_000), np.ones((4, 2), dtype=bool))
    plan = plan_dispatch(clips, [linear(1.0), linear(5.0)], [0, 0], 1, 4)
    assert plan.encoder.tolist() == [0] * 4 + [1] * 4 and plan.encoder_rank.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("num_clips", [8, 16, 64])
def test_encoders_with_few_clips_do_not_all_use_the_same_ranks(num_clips: int) -> None:
    rng = np.random.default_rng(0)
    wanted = np.zeros((num_clips, 8), dtype=bool)
    wanted[np.arange(num_clips), np.arange(num_clips) % 8] = True
    clips = ClipTable(np.repeat(np.arange(8), num_clips // 8), rng.integers(40_000, 160_000, num_clips), wanted)
    plan = plan_dispatch(clips, [linear(1.0)] * 8, [0] * 8, 1, 8)
    loads = np.bincount(plan.encoder_rank, weights=plan.cost, minlength=8)
    assert loads.max() <= plan.cost.sum() / 8 + plan.cost.max()


CALL_COST = 160_000


def brute_force(lengths: list[int], budget: int, windowing: Windowing) -> float:
    order = sorted(lengths, reverse=True)

    def best(start: int) -> float:
        if start == len(order):
            return 0.0
        costs = []
        for end in range(start + 1, len(order) + 1):
            padded = windowing.computed_samples(order[start:end])
            if padded <= budget or end == start + 1:
                costs.append(padded + CALL_COST + best(end))
        return min(costs)

    return best(0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 200_000), max_size=7),
    st.integers(1, 500_000),
    st.sampled_from([WHOLE, Windowing(64_000), Windowing(64_000, 64_000), Windowing(300_000, 400)]),
)
def test_grouping_minimises_computation(lengths: list[int], budget: int, windowing: Windowing) -> None:
    groups = group_by_length(lengths, budget, CALL_COST, windowing)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    computed = [windowing.computed_samples([lengths[i] for i in group]) for group in groups]
    assert all(len(group) <= 1 or samples <= budget for group, samples in zip(groups, computed, strict=True))
    if lengths:
        assert sum(computed) + CALL_COST * len(groups) == pytest.approx(brute_force(lengths, budget, windowing))


def test_clips_that_are_padded_to_a_full_window_are_counted_as_full_windows() -> None:
    full = Windowing(num_samples(30), num_samples(30))
    groups = group_by_length([num_samples(2)] * 240, num_samples(480), num_samples(10), full)
    assert [len(group) for group in groups] == [16] * 15
    assert full.computed_samples([num_samples(65), num_samples(2)]) == 4 * num_samples(30)


def test_without_clips_there_is_one_empty_group() -> None:
    assert group_by_length([], 400_000, CALL_COST) == [[]]
