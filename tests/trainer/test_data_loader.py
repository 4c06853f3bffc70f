"""Tests that a loader that resumes on any number of ranks returns bit-identical samples in the same order."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Sample
from model.errors import UserError
from model.lengths import TokenRate
from tests.trainer.data_corpus import data_config, write_shards
from tests.trainer.loader_runs import BROKEN, assert_identical, run, samples, small_corpus, with_fields
from trainer.data.config import DatasetConfig, JoinConfig
from trainer.data.loader import Loader
from trainer.data.prepare import PreparedData, prepare
from trainer.data.state import LaneState, State, new_state
from trainer.data.stream import SampleStream
from trainer.data.workers import LostWorkerError, Workers
from trainer.storage.store import LocalStore


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
@given(
    st.sampled_from([1, 2, 3, 8]),
    st.integers(1, 2),
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 12)), max_size=3),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 1.0, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_any_stop_points_and_ranks_give_the_same_batches(
    prepared: PreparedData,
    num_lanes: int,
    num_per_lane: int,
    parts: list[tuple[int, int]],
    shuffle: bool,
    cache_mib: int,
    read_kib: int,
    temperature: float | None,
) -> None:
    fields = {"num_lanes": num_lanes, "global_batch_samples": num_lanes * num_per_lane, "shuffle": shuffle}
    data = with_fields(prepared, **fields, read_kib=read_kib, temperature=temperature)
    expected, end = run(data, 12)
    found: list[list[Sample]] = []
    state: State | None = None
    for world, stop in [*sorted(parts, key=lambda p: p[1]), (2, 12)]:
        part = with_fields(data, cache_decoded_mib=cache_mib, read_ahead_mib=cache_mib)
        batches, state = run(part, 12, world, state, stop)
        found += batches
    assert_identical(expected, found)
    assert state == end


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_shards_resumed_on_1_then_4_then_2_ranks(
    prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Check with random text datasets that a resumed loader keeps the order, and draws no sample too often."""
    root = tmp_path_factory.mktemp("any")
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    weights = [1.0, *data.draw(st.lists(st.sampled_from([0.0, 0.3, 2.0]), min_size=2, max_size=2))]
    for i, size in enumerate(sizes):
        write_shards(root / f"s{i}", samples(f"s{i}", size, audio=False), data.draw(st.integers(1, 12)))
    datasets = tuple(DatasetConfig(name=f"s{i}", shards=f"s{i}", weight=weights[i]) for i in range(len(sizes)))
    num_lanes = data.draw(st.integers(1, 6))
    config = data_config(
        root, *datasets, num_lanes=num_lanes, global_batch_samples=num_lanes * data.draw(st.integers(1, 3))
    )
    config = replace(config, read_kib=1, tokenizer=replace(config.tokenizer, path=prepared.tokenizer_path))
    made = prepare(config, TokenRate((2,)))
    expected, end = run(made, 20)
    stops = sorted(data.draw(st.tuples(st.integers(0, 20), st.integers(0, 20))))
    found: list[list[Sample]] = []
    state: State | None = None
    for world, stop in zip((1, 4, 2), (*stops, 20), strict=True):
        batches, state = run(made, 20, world, state, stop)
        found += batches
    assert_identical(expected, found)
    assert state == end
    for i, size in enumerate(sizes):
        # Within each lane, every sample of the dataset is drawn once before any is drawn twice.
        drawn = Counter(s.key for b in expected for s in b if s.meta["set"] == f"s{i}")
        assert sum(drawn.values()) == sum(end["positions"].get(f"s{i}", [0]))
        assert len(drawn) <= size


def test_one_lane_draws_everything_once_per_epoch(prepared: PreparedData, tmp_path: Path) -> None:
    write_shards(tmp_path / "s", samples("s", 17, audio=False), 5)
    config = data_config(tmp_path, DatasetConfig(name="s", shards="s"), num_lanes=1, global_batch_samples=1)
    config = replace(config, read_kib=1, tokenizer=replace(config.tokenizer, path=prepared.tokenizer_path))
    batches, _ = run(prepare(config, TokenRate((2,))), 51)
    for epoch in range(3):
        assert len({b[0].key for b in batches[17 * epoch : 17 * epoch + 17]}) == 17


class Counting(LocalStore):
    """A store that counts its requests by kind."""

    requests: Counter[str] = Counter()

    def get(self, name: str) -> bytes:
        self.requests[name.partition(".")[2]] += 1
        return super().get(name)

    def get_range(self, name: str, offset: int, num_bytes: int, total_bytes: int | None = None) -> memoryview:
        self.requests["range"] += 1
        return super().get_range(name, offset, num_bytes, total_bytes)


@pytest.mark.parametrize("consumed", [0, 10**3, 10**6])
def test_resume_takes_the_same_number_of_reads_at_any_position(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, consumed: int
) -> None:
    monkeypatch.setattr("trainer.data.prepare.open_store", lambda url, retry_sec=None: Counting(Path(url)))
    monkeypatch.setattr(Counting, "requests", Counter())
    tokenizer = replace(prepared.config.tokenizer, path=prepared.tokenizer_path)
    fields = {"num_lanes": 1, "global_batch_samples": 1, "read_ahead_mib": 0, "read_kib": 1, "join": JoinConfig()}
    config = replace(prepared.config, datasets=prepared.config.datasets[:1], tokenizer=tokenizer, **fields)
    data = prepare(config, TokenRate((2, 2)))
    (reader,) = data.open_training()
    state = new_state(5, 1, {"a": reader.digest}, consumed, {0: LaneState({"a": consumed}, consumed)})
    with Loader(SampleStream(data, seed=5, num_batches=10**7, state=state)) as loader:
        next(iter(loader))
    assert Counting.requests["json"] == 1
    assert (
        Counting.requests["idx.json"] <= 2 and Counting.requests["range"] <= 2
    )  # two if a broken sample must be skipped
    assert sum(Counting.requests.values()) <= 5


@pytest.mark.slow
def test_processes_do_not_change_the_batches(prepared: PreparedData) -> None:
    """Load on 1 rank with 1 process, on 4 ranks without processes, and on 2 ranks with 2 processes each.

    The last case has little shared memory.
    """
    data = with_fields(prepared, num_lanes=4, global_batch_samples=8)
    expected, end = run(data, 12)
    first, state = run(with_fields(data, num_workers=1), 12, 1, None, 4)
    second, state = run(data, 12, 4, state, 7)
    third, state = run(with_fields(data, num_workers=2, prefetch_batches=3, buffer_mib=1), 12, 2, state)
    assert_identical(expected, first + second + third)
    assert state == end


def test_every_usable_sample_comes_exactly_once_per_epoch(prepared: PreparedData) -> None:
    """Check dataset `a` with one lane. It has 13 positions per epoch, of which 3 are skipped."""
    data = with_fields(
        prepared, num_lanes=1, global_batch_samples=1, datasets=prepared.config.datasets[:1], join=JoinConfig()
    )
    data = replace(data, datasets=data.datasets[:1])
    batches, state = run(data, 30)
    for epoch in range(3):
        keys = [b[0].key for b in batches[10 * epoch : 10 * epoch + 10]]
        assert sorted(keys) == sorted({f"a-{i}" for i in range(13)} - BROKEN)
    skipped = state["skipped"]["broken"]["0"]
    assert skipped <= 9
    assert state["num_seen"] == state["positions"]["a"] == [30 + skipped]


def test_prefetch_is_not_in_the_state(prepared: PreparedData) -> None:
    data = with_fields(prepared, num_workers=1, prefetch_batches=6)
    _, expected = run(prepared, 12, stop=2)
    with Loader(SampleStream(data, seed=5, num_batches=12)) as loader:
        iterator = iter(loader)
        next(iterator)
        _, state = next(iterator)
        workers = loader.stream._source
        assert isinstance(workers, Workers)
        while not workers._inboxes[0]._connection.poll(0.01):  # until the third batch has been prefetched
            pass
        assert loader.state == state == expected


def test_weights_may_change_and_datasets_may_be_added_at_a_resume(prepared: PreparedData) -> None:
    only_a = replace(
        prepared, config=replace(prepared.config, datasets=prepared.config.datasets[:1]), datasets=prepared.datasets[:1]
    )
    _, state = run(only_a, 40, stop=10)
    even = tuple(replace(s, weight=1.0) for s in prepared.config.datasets)
    both = replace(
        with_fields(prepared, datasets=even),
        datasets=tuple(replace(p, config=c) for p, c in zip(prepared.datasets, even, strict=True)),
    )
    batches, later = run(both, 40, state=state)
    tasks = [s.task for b in batches for s in b]
    assert abs(tasks.count("text") / len(tasks) - 0.5) < 0.1
    assert sum(later["positions"]["b"]) == tasks.count("text")
    assert sum(later["positions"]["a"]) > sum(state["positions"]["a"])


def test_epochs_are_reported_and_add_up_over_ranks(prepared: PreparedData) -> None:
    def epochs(world: int) -> dict[str, float]:
        total: Counter[str] = Counter()
        for rank in range(world):
            with Loader(SampleStream(prepared, seed=5, num_batches=20, rank=rank, world=world)) as loader:
                list(loader)
                total.update(loader.epochs)
        return dict(total)

    _, state = run(prepared, 20)
    whole = epochs(1)
    assert whole == {"a": sum(state["positions"]["a"]) / 13, "b": sum(state["positions"]["b"]) / 5}
    assert epochs(2) == pytest.approx(whole)


def test_state_of_256_lanes_and_six_datasets_is_a_few_kilobytes() -> None:
    digests = {f"set-{i}": "d" * 36 for i in range(6)}
    lane_state = LaneState({name: 10**6 for name in digests}, 10**7, {"broken": 12})
    state = new_state(1, 256, digests, 10**6, dict.fromkeys(range(256), lane_state))
    assert len(json.dumps(state)) < 24_000
    one = new_state(1, 16, digests, 10**6, dict.fromkeys(range(16), lane_state))
    assert len(json.dumps(one)) < 3_000


def test_ranks_beyond_the_lanes_get_empty_batches(prepared: PreparedData) -> None:
    with Loader(SampleStream(with_fields(prepared, num_workers=2), seed=5, num_batches=3, rank=0, world=4)) as loader:
        batches = [batch for batch, _ in loader]
    assert [len(b.samples) for b in batches] == [0, 0, 0]
    assert batches[0].clips.lengths == ()


def test_a_state_of_another_training_is_refused(prepared: PreparedData) -> None:
    _, state = run(prepared, 12, stop=3)
    for changed, seed, message in (
        (prepared, 6, "seed = 6: the checkpoint was made with 5"),
        (with_fields(prepared, num_lanes=1), 5, "data.num_lanes = 1: the checkpoint was made with 2"),
    ):
        with pytest.raises(UserError, match=message):
            Loader(SampleStream(changed, seed=seed, num_batches=12, state=state))
    with pytest.raises(UserError, match="data.datasets 'a': its shards or data.read_kib changed"):
        Loader(SampleStream(prepared, seed=5, num_batches=12, state={**state, "sets": {"a": "other"}}))
    one = {**state, "lanes": [0]}
    with pytest.raises(UserError, match=r"lanes \[1\] are missing"):
        Loader(SampleStream(prepared, seed=5, num_batches=12, state=one))


def test_closing_early_leaves_no_thread_and_no_process(prepared: PreparedData) -> None:
    before, open_files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for num_workers in (0, 2):
        data = with_fields(prepared, num_workers=num_workers, prefetch_batches=1)
        with Loader(SampleStream(data, seed=5, num_batches=50)) as loader:
            next(iter(loader))
        assert threading.active_count() == before
        assert multiprocessing.active_children() == []
    assert len(os.listdir("/proc/self/fd")) <= open_files + 1  # the first new process starts Python's resource tracker


def test_a_process_that_dies_is_a_one_line_error(prepared: PreparedData) -> None:
    with Loader(
        SampleStream(with_fields(prepared, num_workers=1, prefetch_batches=1), seed=5, num_batches=500)
    ) as loader:
        iterator = iter(loader)
        next(iterator)
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LostWorkerError, match=r"decoding process 0 died \(exit code -9"):
            list(iterator)
