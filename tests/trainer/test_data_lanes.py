from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from trainer.data.config import DataConfig, SetConfig
from trainer.data.lanes import Blend, SetOrder, lanes_of_rank, permutation

counts = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum)


@given(counts, st.integers(1, 9), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_once(per_shard: list[int], num_lanes: int, seed: int, shuffle: bool) -> None:
    order = SetOrder("s", per_shard, seed, num_lanes, shuffle)
    everything = {(shard, i) for shard, n in enumerate(per_shard) for i in range(n)}
    # After num_lanes epochs every lane has read every sample, so the count ends on whole epochs.
    seen: dict[int, Counter] = {}
    for lane in range(num_lanes):
        epochs = []
        for position in range(order.num_samples):
            address = order.locate(lane, position)
            seen.setdefault(address.epoch, Counter())[address.shard, address.rank_in_shard] += 1
            epochs.append(address.epoch)
        assert epochs == sorted(epochs)
        assert order.locate(lane, order.num_samples).epoch >= num_lanes
    assert sorted(seen) == list(range(num_lanes))
    assert all(set(c) == everything and set(c.values()) == {1} for c in seen.values())


def test_epochs_differ_if_shuffled_and_follow_storage_if_not() -> None:
    def epoch(order: SetOrder, number: int) -> list[tuple[int, int]]:
        found = (order.locate(0, number * order.num_samples + i) for i in range(order.num_samples))
        return [(a.shard, a.rank_in_shard) for a in found]

    stored = [(shard, i) for shard in range(3) for i in range(20)]
    shuffled, plain = (SetOrder("s", [20] * 3, 1, 1, shuffle) for shuffle in (True, False))
    assert epoch(plain, 0) == epoch(plain, 5) == stored
    assert len({tuple(epoch(shuffled, e)) for e in range(5)} | {tuple(stored)}) == 6
    assert epoch(shuffled, 0) != epoch(SetOrder("s", [20] * 3, 2, 1, True), 0)
    assert epoch(shuffled, 0) != epoch(SetOrder("t", [20] * 3, 1, 1, True), 0)


def test_the_order_is_that_of_every_machine_and_version() -> None:
    """Golden values: a change here makes every checkpoint continue with other samples."""
    assert permutation(8, 7, "set", 3).tolist() == [7, 1, 6, 5, 0, 2, 4, 3]
    order = SetOrder("set", [5, 3], 7, 2, True)
    assert [(a.shard, a.rank_in_shard) for a in (order.locate(1, p) for p in range(6))] == [
        (0, 1),
        (1, 2),
        (1, 0),
        (1, 1),
        (0, 1),
        (0, 2),
    ]


def test_locating_costs_the_same_far_into_the_stream() -> None:
    order = SetOrder("s", [1000] * 100, 1, 16, True)
    far = 10**12
    assert order.locate(3, far).epoch == pytest.approx(far * 16 / order.num_samples, rel=1e-6)


@given(st.integers(1, 40), st.integers(1, 40))
def test_lanes_go_to_ranks_in_contiguous_runs(num_lanes: int, world: int) -> None:
    runs = [list(lanes_of_rank(r, world, num_lanes)) for r in range(world)]
    assert [lane for run in runs for lane in run] == list(range(num_lanes))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def sets(*weights: object) -> list[SetConfig]:
    return [SetConfig(name=f"s{i}", manifest="m", weight=w) for i, w in enumerate(weights)]  # type: ignore[arg-type]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.5]), min_size=1, max_size=4).filter(sum), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_shares_follow_the_weights_within_every_stretch(weights: list[float], seed: int) -> None:
    blend = Blend(sets(*weights), seed, num_lanes=8, num_per_lane=2)
    draws = [[blend.choose(k, lane, d, 0.5) for lane in range(8) for d in range(2)] for k in range(60)]
    for first in (0, 13, 40):
        chosen = np.bincount(np.concatenate(draws[first : first + 20]), minlength=len(weights))
        np.testing.assert_allclose(chosen, 320 * np.array(weights) / sum(weights), atol=6)
    assert not any(weights[i] == 0 for batch in draws for i in batch)


def test_no_lane_is_stuck_with_one_set() -> None:
    blend = Blend(sets(1.0, 1.0), 0, num_lanes=8, num_per_lane=1)
    for lane in range(8):
        chosen = [blend.choose(k, lane, 0, 0.0) for k in range(200)]
        assert 70 <= sum(chosen) <= 130


def test_weight_schedule_is_piecewise_constant_over_progress() -> None:
    late = SetConfig(name="late", manifest="m", weight=((0.0, 0.0), (0.4, 1.0), (0.8, 3.0)))
    assert [late.weight_at(p) for p in (0.0, 0.39, 0.4, 0.79, 0.8, 1.0)] == [0, 0, 1, 1, 3, 3]
    blend = Blend([*sets(1.0), late], 0, num_lanes=4, num_per_lane=25)
    shares = [np.mean([blend.choose(0, n, d, p) for n in range(4) for d in range(25)]) for p in (0.2, 0.5, 0.9)]
    assert shares[0] == 0
    assert shares[1:] == pytest.approx([0.5, 0.75], abs=0.04)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sets": tuple(sets(0.0, 0.0))}, "all weights are 0 at progress 0"),
        ({"sets": tuple(sets(((0.0, 1.0), (0.5, 0.0)), 0.0))}, "all weights are 0 at progress 0.5"),
        ({"sets": tuple(sets(1.0) + sets(1.0))}, "must be unique"),
        ({"num_lanes": 3, "global_batch_samples": 4}, "must be a multiple of"),
        ({"max_audio_sec": 0}, "data.max_audio_sec = 0: must be positive"),
        ({"min_audio_sec": 2, "max_audio_sec": 1}, "data.min_audio_sec"),
        ({"max_skipped_fraction": 1}, "data.max_skipped_fraction"),
    ],
)
def test_illegal_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(
    "weight", [-1.0, (), ((0.1, 1.0),), ((0.0, 1.0), (1.0, 2.0)), ((0.0, 1.0), (0.6, 1.0), (0.3, 1.0))]
)
def test_illegal_weights_are_refused(weight: object) -> None:
    with pytest.raises(UserError, match="data.sets 's0': weight"):
        sets(weight)


def test_a_set_is_a_manifest_or_shards() -> None:
    for fields in ({}, {"manifest": "m", "shards": "s"}):
        with pytest.raises(UserError, match="give either manifest or shards"):
            SetConfig(name="s", **fields)
