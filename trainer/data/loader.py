"""Training batches of one rank, in an order that depends on nothing but seed, blend and state.

    with Loader(prepared, seed=1, num_batches=1000, rank=r, world=w, state=saved) as loader:
        for batch, state in loader: ...          # saving `state` and starting from it continues with the next batch

A worker thread serves whole lanes: it draws, decodes and tokenises a lane's samples one after another, so skips move
only their own lane and the order cannot depend on timing. Each lane has a bounded queue; a batch takes one piece from
every lane of the rank. State travels with the pieces, so what was only prefetched is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

from model.batch import Batch, Sample
from model.errors import UserError
from trainer.data.decode import SampleError
from trainer.data.lanes import Blend, SetOrder, lanes_of_rank
from trainer.data.prepare import PreparedData
from trainer.data.source import SampleSource, SetReader, Skip, check_skipped, merge_counts

State = dict[str, Any]
"""JSON: version, seed, num_lanes, batch (the next one), sets (name → digest), lanes (lane → account)."""

STATE_VERSION = 1
_POLL_SEC = 0.1
_MAX_SKIPS_IN_A_ROW = 1000


@dataclass(frozen=True)
class _Piece:
    """What one lane gives to one batch, and the lane's account after it."""

    samples: tuple[Sample, ...]
    skips: tuple[Skip, ...]
    account: dict[str, Any]


class _Lane:
    """One lane's account (position per set, samples seen, skips by reason) and the drawing from it."""

    def __init__(self, lane: int, account: Mapping[str, Any], loader: Loader) -> None:
        self.lane, self.loader = lane, loader
        self.positions: dict[str, int] = dict(account.get("positions", {}))
        self.num_seen: int = account.get("num_seen", 0)
        self.skipped: dict[str, int] = dict(account.get("skipped", {}))

    def account(self) -> dict[str, Any]:
        return {"positions": dict(self.positions), "num_seen": self.num_seen, "skipped": dict(self.skipped)}

    def piece(self, batch: int) -> _Piece:
        loader, skips, samples = self.loader, [], []
        progress = batch / loader.num_batches
        for draw in range(loader.num_per_lane):
            which = loader.blend.choose(batch, self.lane, draw, progress)
            reader, order = loader.readers[which], loader.orders[which]
            skips_in_a_row = 0
            while True:
                position = self.positions.get(order.name, 0)
                self.positions[order.name] = position + 1
                self.num_seen += 1
                try:
                    samples.append(loader.source.training(reader, order, self.lane, position, progress))
                    break
                except SampleError as error:
                    self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
                    skips.append(reader.skip(*loader.source.find(reader, order, self.lane, position), error))
                    skips_in_a_row += 1
                    if skips_in_a_row >= min(order.num_samples, _MAX_SKIPS_IN_A_ROW):
                        raise UserError(
                            f"data.sets '{order.name}': {skips_in_a_row} samples in a row cannot be used, the last: "
                            f"{skips[-1].key}: {error}; mend the set or take it out"
                        ) from None
        return _Piece(tuple(samples), tuple(skips), self.account())


class Loader:
    """Iterates `(Batch, State)` from the state's batch to `num_batches`. One iteration per loader.

    Args:
        prepared: from `prepare`.
        seed: of order and augmentation.
        num_batches: of the whole training; progress (blend, augmentation) is batch / num_batches.
        rank: this process's place among `world` ranks that share the lanes.
        state: as yielded, or as `merge_states` makes it from all ranks' states; null starts at the beginning.
        on_skip: called for every skipped sample when its batch is yielded.

    Raises:
        UserError: the state is of another seed, number of lanes or other data; too many samples are skipped.
    """

    def __init__(
        self,
        prepared: PreparedData,
        *,
        seed: int,
        num_batches: int,
        rank: int = 0,
        world: int = 1,
        state: State | None = None,
        on_skip: Callable[[Skip], None] = lambda skip: None,
    ) -> None:
        config = prepared.config
        assert 0 <= rank < world and num_batches > 0
        self.config, self.seed, self.num_batches, self.on_skip = config, seed, num_batches, on_skip
        self.num_per_lane = config.global_batch_samples // config.num_lanes
        self.readers: tuple[SetReader, ...] = prepared.open_training()
        self.orders = [
            SetOrder(r.config.name, r.num_per_shard, seed, config.num_lanes, config.shuffle) for r in self.readers
        ]
        self.blend = Blend([r.config for r in self.readers], seed, config.num_lanes, self.num_per_lane)
        self.source = SampleSource(config, prepared.tokenizer, prepared.strides, ctc=prepared.ctc, seed=seed)
        self._digests = {r.config.name: r.shards.digest for r in self.readers}
        if state is not None:
            self._check_state(state)
        accounts = {} if state is None else state["lanes"]
        own = lanes_of_rank(rank, world, config.num_lanes)
        if state is not None and (missing := [lane for lane in own if str(lane) not in accounts]):
            raise UserError(f"data state: lanes {missing} are missing; merge the states of all ranks before resuming")
        self._lanes = [_Lane(lane, accounts.get(str(lane), {}), self) for lane in own]
        self._first_batch: int = 0 if state is None else state["batch"]
        self.state: State = self._state(self._first_batch, [lane.account() for lane in self._lanes])
        self._threads: list[Thread] = []
        self._stop = Event()
        self._queues: list[Queue[_Piece | BaseException]] = [Queue(config.prefetch_batches) for _ in self._lanes]

    @property
    def num_skipped(self) -> dict[str, int]:
        """Skips by reason in this rank's lanes since the start of the training, as of the last yielded batch."""
        return merge_counts([a["skipped"] for a in self.state["lanes"].values()])

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        self._start_threads()
        try:
            for batch in range(self._first_batch, self.num_batches):
                pieces = [self._take(i, batch) for i in range(len(self._lanes))]
                self.state = self._state(batch + 1, [p.account for p in pieces])
                for skip in (s for p in pieces for s in p.skips):
                    self.on_skip(skip)
                if any(p.skips for p in pieces):
                    num_seen = sum(p.account["num_seen"] for p in pieces)
                    check_skipped(num_seen, self.num_skipped, self.config.max_skipped_fraction)
                yield Batch(tuple(s for p in pieces for s in p.samples)), self.state
        finally:
            self.close()

    def _take(self, index: int, batch: int) -> _Piece:
        if not self._threads:
            return self._lanes[index].piece(batch)
        piece = self._queues[index].get()
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def _start_threads(self) -> None:
        assert not self._threads and not self._stop.is_set(), "a loader is iterated once"
        num_threads = min(self.config.num_workers, len(self._lanes))
        for worker in range(num_threads):
            mine = range(worker, len(self._lanes), num_threads)
            thread = Thread(target=self._work, args=(mine,), name=f"data-{worker}", daemon=True)
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def _work(self, mine: Sequence[int]) -> None:
        for batch in range(self._first_batch, self.num_batches):
            for index in mine:
                item: _Piece | BaseException
                try:
                    item = self._lanes[index].piece(batch)
                except BaseException as error:  # handed to the training thread, which raises it
                    item = error
                if not self._put(index, item) or isinstance(item, BaseException):
                    return

    def _put(self, index: int, item: _Piece | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queues[index].put(item, timeout=_POLL_SEC)
                return True
            except Full:
                continue
        return False

    def _state(self, batch: int, accounts: Sequence[dict[str, Any]]) -> State:
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "num_lanes": self.config.num_lanes,
            "batch": batch,
            "sets": dict(self._digests),
            "lanes": {str(lane.lane): account for lane, account in zip(self._lanes, accounts, strict=True)},
        }

    def _check_state(self, state: State) -> None:
        if state.get("version") != STATE_VERSION:
            raise UserError(f"data state: version {state.get('version')!r}, this program reads {STATE_VERSION}")
        for key, name, value in (("seed", "seed", self.seed), ("num_lanes", "data.num_lanes", self.config.num_lanes)):
            if state[key] != value:
                raise UserError(f"{name} = {value}: the checkpoint was made with {state[key]}; resume with that")
        for name, digest in self._digests.items():
            if state["sets"].get(name, digest) != digest:
                raise UserError(
                    f"data.sets '{name}': its shards changed since the checkpoint; restore them or rename it"
                )


def merge_states(states: Sequence[State]) -> State:
    """One state from all ranks' states of the same batch; any number of ranks can start from it."""
    first = states[0]
    common = [{k: v for k, v in s.items() if k != "lanes"} for s in states]
    assert all(c == common[0] for c in common), "states of different batches or data"
    lanes = {lane: account for s in states for lane, account in s["lanes"].items()}
    assert len(lanes) == sum(len(s["lanes"]) for s in states), "two states hold the same lane"
    return {**first, "lanes": lanes}


class SkipLog:
    """Appends skipped samples to a JSONL file; give it to `Loader(on_skip=…)`. The file appears with the first skip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, skip: Skip) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(skip), ensure_ascii=False) + "\n")
