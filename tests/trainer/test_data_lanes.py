"""Tests of the order of samples in lanes, and of the weights of datasets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.lanes import DatasetMixture, DatasetOrder, lanes_of_rank, permutation

counts = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum)


def walk(order: DatasetOrder, lane: int, num: int, start: int = 0) -> list[tuple[int, int, int]]:
    """Return (epoch, shard, index) at `num` positions of a lane, each of which is computed on its own."""
    spans = (order.span(lane, start + i) for i in range(num))
    return [(r.epoch, r.shard, r.indices[0]) for r in spans]


@given(counts, st.integers(1, 9), st.integers(0, 99), st.booleans(), st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_every_epoch_contains_every_sample_once(
    per_shard: list[int], num_lanes: int, seed: int, shuffle: bool, chunk: int
) -> None:
    order = DatasetOrder("s", per_shard, seed, num_lanes, shuffle, chunk)
    everything = {(shard, i) for shard, n in enumerate(per_shard) for i in range(n)}
    # If every lane reads as many samples as the dataset has, the lanes together read num_lanes whole epochs.
    seen: dict[int, Counter] = {}
    for lane in range(num_lanes):
        places = walk(order, lane, order.num_samples)
        for epoch, shard, index in places:
            seen.setdefault(epoch, Counter())[shard, index] += 1
        assert [p[0] for p in places] == sorted(p[0] for p in places)
        assert order.span(lane, order.num_samples).epoch >= num_lanes
    assert sorted(seen) == list(range(num_lanes))
    assert all(set(c) == everything and set(c.values()) == {1} for c in seen.values())


@given(counts, st.integers(1, 4), st.booleans(), st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_span_agrees_with_its_positions_and_is_within_one_chunk(
    per_shard: list[int], num_lanes: int, shuffle: bool, chunk: int
) -> None:
    order = DatasetOrder("s", per_shard, 3, num_lanes, shuffle, chunk)
    for lane in range(num_lanes):
        for position in range(0, 2 * order.num_samples, 3):
            span = order.span(lane, position)
            places = walk(order, lane, len(span.indices), position)
            assert places == [(span.epoch, span.shard, index) for index in span.indices]
            assert set(span.indices) <= set(order.chunk_of(span.shard, span.indices[0]))


def test_whole_chunk_is_one_span() -> None:
    order = DatasetOrder("s", [40, 25], 1, 1, True, 10)
    sizes, position = [], 0
    while position < 65:
        sizes.append(len(order.span(0, position).indices))
        position += sizes[-1]
    assert sorted(sizes) == [5, 10, 10, 10, 10, 10, 10]


def test_epochs_differ_if_shuffled_and_follow_storage_if_not() -> None:
    def epoch(order: DatasetOrder, number: int) -> list[tuple[int, int]]:
        return [(shard, index) for _, shard, index in walk(order, 0, order.num_samples, number * order.num_samples)]

    stored = [(shard, i) for shard in range(3) for i in range(20)]
    shuffled, plain = (DatasetOrder("s", [20] * 3, 1, 1, shuffle, 8) for shuffle in (True, False))
    assert epoch(plain, 0) == epoch(plain, 5) == stored
    assert len({tuple(epoch(shuffled, e)) for e in range(5)} | {tuple(stored)}) == 6
    assert epoch(shuffled, 0) != epoch(DatasetOrder("s", [20] * 3, 2, 1, True, 8), 0)
    assert epoch(shuffled, 0) != epoch(DatasetOrder("t", [20] * 3, 1, 1, True, 8), 0)


def test_the_order_is_that_of_every_machine_and_version() -> None:
    """Compare with golden values. If the order changed, existing checkpoints would resume with different samples."""
    assert permutation(8, 7, "set", 3).tolist() == [7, 1, 6, 5, 0, 2, 4, 3]
    order = DatasetOrder("set", [5, 3], 7, 2, True, 2)
    assert [place[1:] for place in walk(order, 1, 6)] == [(0, 0), (1, 1), (1, 0), (1, 2), (0, 4), (0, 1)]


def test_finding_a_sample_costs_the_same_far_into_the_stream() -> None:
    order = DatasetOrder("s", [1000] * 100, 1, 16, True, 64)
    far = 10**12
    assert order.span(3, far).epoch == pytest.approx(far * 16 / order.num_samples, rel=1e-6)


@given(st.integers(1, 40), st.integers(1, 40))
def test_ranks_get_consecutive_lanes(num_lanes: int, world: int) -> None:
    spans = [list(lanes_of_rank(r, world, num_lanes)) for r in range(world)]
    assert [lane for span in spans for lane in span] == list(range(num_lanes))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def datasets(*weights: object) -> list[DatasetConfig]:
    return [DatasetConfig(name=f"s{i}", manifest="m", weight=w) for i, w in enumerate(weights)]  # type: ignore[arg-type]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.5]), min_size=1, max_size=4).filter(sum), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_shares_follow_the_weights_within_every_stretch(weights: list[float], seed: int) -> None:
    mixture = DatasetMixture(datasets(*weights), seed, num_lanes=8, num_per_lane=2)
    draws = [[mixture.choose(k, lane, d, 0.5) for lane in range(8) for d in range(2)] for k in range(60)]
    for first in (0, 13, 40):
        chosen = np.bincount(np.concatenate(draws[first : first + 20]), minlength=len(weights))
        np.testing.assert_allclose(chosen, 320 * np.array(weights) / sum(weights), atol=6)
    assert not any(weights[i] == 0 for batch in draws for i in batch)


def test_every_lane_reads_all_datasets() -> None:
    mixture = DatasetMixture(datasets(1.0, 1.0), 0, num_lanes=8, num_per_lane=1)
    for lane in range(8):
        chosen = [mixture.choose(k, lane, 0, 0.0) for k in range(200)]
        assert 70 <= sum(chosen) <= 130


def test_temperature_weighs_datasets_by_their_size() -> None:
    sizes = [1000, 10]
    for temperature, share in ((None, 0.5), (1.0, 10 / 1010), (2.0, 0.1 / 1.1), (1000.0, 0.5)):
        mixture = DatasetMixture(datasets(1.0, 1.0), 0, 8, 25, sizes, temperature)
        chosen = [mixture.choose(k, lane, d, 0.0) for k in range(40) for lane in range(8) for d in range(25)]
        assert np.mean(chosen) == pytest.approx(share, abs=0.004)
    weighted = DatasetMixture(datasets(1.0, 3.0), 0, 8, 1, sizes, 2.0)
    assert weighted.weights_at(0.0) == pytest.approx([1000**0.5, 3 * 10**0.5])


def test_weight_schedule_is_piecewise_constant_over_progress() -> None:
    late = DatasetConfig(name="late", manifest="m", weight=((0.0, 0.0), (0.4, 1.0), (0.8, 3.0)))
    assert [late.weight_at(p) for p in (0.0, 0.39, 0.4, 0.79, 0.8, 1.0)] == [0, 0, 1, 1, 3, 3]
    mixture = DatasetMixture([*datasets(1.0), late], 0, num_lanes=4, num_per_lane=25)
    shares = [np.mean([mixture.choose(0, n, d, p) for n in range(4) for d in range(25)]) for p in (0.2, 0.5, 0.9)]
    assert shares[0] == 0
    assert shares[1:] == pytest.approx([0.5, 0.75], abs=0.04)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"datasets": tuple(datasets(0.0, 0.0))}, "all weights are 0 at progress 0"),
        ({"datasets": tuple(datasets(((0.0, 1.0), (0.5, 0.0)), 0.0))}, "all weights are 0 at progress 0.5"),
        ({"datasets": tuple(datasets(1.0) + datasets(1.0))}, "must be unique"),
        ({"num_lanes": 3, "global_batch_samples": 4}, "must be a multiple of"),
        ({"max_audio_sec": 0}, "data.max_audio_sec = 0: must be positive"),
        ({"min_audio_sec": 2, "max_audio_sec": 1}, "data.min_audio_sec"),
        ({"max_skipped_fraction": 1}, "data.max_skipped_fraction"),
        ({"temperature": 0.5}, "data.temperature = 0.5: must be at least 1"),
        ({"read_kib": 0}, "data.read_kib = 0"),
        ({"retry_sec": 900}, "data.retry_sec = 900"),
    ],
)
def test_illegal_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(
    "weight", [-1.0, (), ((0.1, 1.0),), ((0.0, 1.0), (1.0, 2.0)), ((0.0, 1.0), (0.6, 1.0), (0.3, 1.0))]
)
def test_illegal_weights_are_refused(weight: object) -> None:
    with pytest.raises(UserError, match="data.datasets 's0': weight"):
        datasets(weight)


def test_dataset_is_a_manifest_or_shards() -> None:
    for fields in ({}, {"manifest": "m", "shards": "s"}):
        with pytest.raises(UserError, match="exactly one of manifest and shards must be set"):
            DatasetConfig(name="s", **fields)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_augmentation_strength_of_a_dataset_is_at_most_1(strength: float) -> None:
    with pytest.raises(UserError, match=r"data\.datasets 's': augment_strength = .*: must be in \[0, 1\]"):
        DatasetConfig(name="s", manifest="m", augment_strength=strength)
