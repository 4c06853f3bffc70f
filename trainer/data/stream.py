"""The sample stream of a rank, which yields the rank's part of every global batch as NumPy arrays.

A global batch consists of one lane batch from every lane. A lane draws, decodes and tokenizes its samples one after
another. A skipped sample therefore affects only its own lane, and the order does not depend on timing. It depends only
on the seed, the dataset weights and the state. Each lane batch includes the state of its lane after the batch, so that
the state of the stream does not count samples that were only prepared in advance.

This module does not load torch; `trainer.data.loader` converts the samples to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from model.errors import UserError
from model.lengths import TokenRate
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.dataset_reader import DatasetReader, Skip, check_skipped
from trainer.data.errors import SampleError
from trainer.data.lanes import DatasetMixture, DatasetOrder, lanes_of_rank
from trainer.data.prepare import PreparedData, open_shards
from trainer.data.sample import EncodedSample
from trainer.data.shards import Selection, ShardIndex
from trainer.data.source import Cursor, SampleSource
from trainer.data.state import LaneState, State, new_state, num_skipped, open_state
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.data.workers import Workers

_MAX_SKIPS_IN_A_ROW = 1000
"""The number of consecutive skips after which a lane stops the run. The limit is higher for large shards and lower for
small datasets."""


@dataclass(frozen=True)
class LaneBatch:
    """The samples that one lane contributes to a global batch, and the state of the lane after that batch."""

    samples: tuple[EncodedSample, ...]
    skips: tuple[Skip, ...]
    lane_state: LaneState


@dataclass(frozen=True)
class StreamSpec:
    """The values that a decoding process needs to prepare the samples of its lanes. All of them can be pickled."""

    config: DataConfig
    datasets: tuple[tuple[DatasetConfig, str, ShardIndex, Selection], ...]
    """(config, URL, index, selection) of each dataset."""
    tokenizer_path: str
    rate: TokenRate
    text_fields: tuple[str, ...]
    ctc_pieces: int | None
    """See `PreparedData.ctc_pieces`."""
    max_tokens: int | None
    seed: int
    num_batches: int


class LaneGroup:
    """The lanes for which one process prepares samples.

    Args:
        spec: The description of the stream.
        lanes: The number of each lane → the state from which it starts.
        first_batch: The number of the batch that is requested first.
        readers: The open readers of the datasets; None to open them.
        tokenizer: The loaded tokenizer; None to load it.
    """

    def __init__(
        self,
        spec: StreamSpec,
        lanes: Mapping[int, LaneState],
        first_batch: int,
        readers: Sequence[DatasetReader] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        config = spec.config
        self.spec = spec
        self.readers = open_readers(spec) if readers is None else readers
        tokenizer = load_tokenizer(spec.tokenizer_path, config.tokenizer) if tokenizer is None else tokenizer
        self.source = SampleSource(
            config,
            tokenizer,
            spec.rate,
            text_fields=spec.text_fields,
            pieces=None if spec.ctc_pieces is None else tokenizer.pieces(spec.ctc_pieces),
            max_tokens=spec.max_tokens,
            seed=spec.seed,
        )
        self.orders = [order_of(r, config, spec.seed) for r in self.readers]
        self.num_per_lane = config.global_batch_samples // config.num_lanes
        datasets, sizes = [r.config for r in self.readers], [r.num_samples for r in self.readers]
        self.mixture = DatasetMixture(
            datasets, spec.seed, config.num_lanes, self.num_per_lane, sizes, config.temperature
        )
        self.lanes = [_Lane(lane, lane_state, self) for lane, lane_state in lanes.items()]
        if first_batch < spec.num_batches:
            self._read_ahead(first_batch)

    def lane_batches(self, batch: int) -> list[LaneBatch]:
        """Return the lane batches of global batch number `batch`. Batches must be requested in ascending order.

        Raises:
            UserError: If a dataset has no usable samples, or the store is unreachable or refuses a request.
        """
        return [lane.lane_batch(batch) for lane in self.lanes]

    def close(self) -> None:
        """Stop the threads that read in advance."""
        self.source.close()

    def _read_ahead(self, batch: int) -> None:
        """Start the reads of all lanes, so that they run at the same time. The reads for `batch` are started first."""
        progress = batch / self.spec.num_batches
        active = [i for i, weight in enumerate(self.mixture.weights_at(progress)) if weight > 0]
        for lane in self.lanes:
            for draw in range(self.num_per_lane):
                lane.cursor(self.mixture.choose(batch, lane.lane, draw, progress))
        for lane in self.lanes:
            for dataset in active:
                lane.cursor(dataset)


class _Lane:
    """One lane, with its state and its cursors."""

    def __init__(self, lane: int, lane_state: LaneState, group: LaneGroup) -> None:
        self.lane, self.group = lane, group
        self.num_seen, self.skipped = lane_state.num_seen, dict(lane_state.skipped)
        self._positions = dict(lane_state.positions)
        self._cursors: dict[int, Cursor] = {}

    def cursor(self, dataset: int) -> Cursor:
        """Return the lane's cursor in a dataset. The first call for each dataset starts to read from it."""
        if dataset not in self._cursors:
            group, order = self.group, self.group.orders[dataset]
            position = self._positions.get(order.name, 0)
            self._cursors[dataset] = Cursor(group.source, group.readers[dataset], order, self.lane, position)
        return self._cursors[dataset]

    def lane_batch(self, batch: int) -> LaneBatch:
        """Return the lane's samples for `batch`. A skipped sample is replaced by the next one of its dataset."""
        group, skips, samples = self.group, [], []
        progress = batch / group.spec.num_batches
        for draw in range(group.num_per_lane):
            cursor = self.cursor(group.mixture.choose(batch, self.lane, draw, progress))
            skips_in_a_row = 0
            while True:
                cursor.load()
                self.num_seen += 1
                try:
                    samples.append(group.source.training(cursor, progress))
                    break
                except SampleError as error:
                    self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
                    skips.append(cursor.reader.skip(cursor.shard, cursor.index, error))
                    skips_in_a_row += 1
                    self._check_progress(cursor, skips_in_a_row, skips[-1])
                finally:
                    cursor.position += 1
        self._positions |= {group.orders[i].name: c.position for i, c in self._cursors.items()}
        return LaneBatch(
            tuple(samples), tuple(skips), LaneState(dict(self._positions), self.num_seen, dict(self.skipped))
        )

    def _check_progress(self, cursor: Cursor, skips_in_a_row: int, last: Skip) -> None:
        # A lane must be able to pass a quarantined shard. Twice as many skips as samples mean that no sample is usable.
        max_skips = max(_MAX_SKIPS_IN_A_ROW, 2 * max(cursor.reader.num_per_shard))
        if skips_in_a_row >= min(2 * cursor.order.num_samples, max_skips):
            raise UserError(
                f"data.datasets '{last.set}': {skips_in_a_row} samples in a row cannot be used; the last one is "
                f"{last.shard} {last.key}: {last.reason}: {last.detail}; fix the dataset or remove it from the recipe"
            )


class SampleStream:
    """An iterable over this rank's part of every global batch, as (samples, state) pairs.

    Iteration starts at the next batch of `state` and ends after batch `num_batches` - 1. A stream can be iterated only
    once. If the iteration raises UserError, `state` remains the state after the last batch that was yielded.

    Args:
        prepared: The result of `prepare`.
        seed: The seed for the order of samples, for joining and for augmentation.
        num_batches: The number of batches in the whole run. Weights and augmentation depend on the progress, which is
            the number of the batch divided by `num_batches`.
        rank: The index of this process among the ranks that share the lanes.
        world: The number of these ranks.
        state: The state from which to start; None for the beginning of a run. It is either a state that this rank has
            yielded with the same `world`, or the result of `merge_states`.
        on_skip: A function that is called for every skipped sample before its batch is yielded.

    Raises:
        UserError: If the state belongs to a different seed, number of lanes or data. The iteration also raises
            UserError if too many samples are skipped, or the store is unreachable for too long.
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
        assert 0 <= rank < world and num_batches > 0
        self.config, self.seed, self.num_batches, self.on_skip = prepared.config, seed, num_batches, on_skip
        self.readers = prepared.open_training()
        self._tokenizer = prepared.tokenizer
        datasets = tuple((r.config, r.shards.store.url, r.shards.index, r.selection) for r in self.readers)
        self._spec = StreamSpec(
            self.config,
            datasets,
            prepared.tokenizer_path,
            prepared.rate,
            prepared.text_fields,
            prepared.ctc_pieces,
            prepared.max_tokens,
            seed,
            num_batches,
        )
        digests = {r.config.name: r.digest for r in self.readers}
        own = list(lanes_of_rank(rank, world, self.config.num_lanes))
        self._digests = digests
        self._first_batch, lane_states = open_state(state, own, seed, self.config.num_lanes, digests)
        self._lane_states = dict(zip(own, lane_states, strict=True))
        self.state: State = self._state(self._first_batch, lane_states)
        self._source: LaneGroup | Workers | None = None
        self._first_skips: dict[str, Skip] = {}

    @property
    def num_skipped(self) -> dict[str, int]:
        """The number of samples that this rank's lanes have skipped since the start of the run, by reason."""
        return num_skipped(self.state)

    @property
    def epochs(self) -> dict[str, float]:
        """Name of each dataset → the number of samples that this rank's lanes have read, divided by the dataset's size.

        The sum over all ranks is the number of epochs.
        """
        positions = self.state["positions"]
        return {r.config.name: sum(positions.get(r.config.name, ())) / r.num_samples for r in self.readers}

    def close(self) -> None:
        """Stop the threads and decoding processes."""
        if self._source is not None:
            self._source.close()

    def __iter__(self) -> Iterator[tuple[tuple[EncodedSample, ...], State]]:
        assert self._source is None, "a stream can be iterated once"
        self._source = self._open()
        try:
            for batch in range(self._first_batch, self.num_batches):
                lane_batches = self._source.lane_batches(batch)
                self.state = self._state(batch + 1, [p.lane_state for p in lane_batches])
                for skip in (s for p in lane_batches for s in p.skips):
                    self._first_skips.setdefault(skip.reason, skip)
                    self.on_skip(skip)
                if any(p.skips for p in lane_batches):
                    num_seen = sum(p.lane_state.num_seen for p in lane_batches)
                    limit = self.config.max_skipped_fraction
                    check_skipped(num_seen, self.num_skipped, limit, self._first_skips)
                yield tuple(s for p in lane_batches for s in p.samples), self.state
        finally:
            self.close()

    def _state(self, batch: int, lane_states: Sequence[LaneState]) -> State:
        by_lane = dict(zip(self._lane_states, lane_states, strict=True))
        return new_state(self.seed, self.config.num_lanes, self._digests, batch, by_lane)

    def _open(self) -> LaneGroup | Workers:
        num_workers = min(self.config.num_workers, len(self._lane_states))
        if num_workers == 0:
            return LaneGroup(self._spec, self._lane_states, self._first_batch, self.readers, self._tokenizer)
        config = replace(
            self.config,
            read_ahead_mib=self.config.read_ahead_mib // num_workers,
            cache_decoded_mib=self.config.cache_decoded_mib // num_workers,
        )
        spec = replace(self._spec, config=config)
        lanes = list(self._lane_states.items())
        parts = [dict(lanes[i::num_workers]) for i in range(num_workers)]
        return Workers(
            [(spec, part, self._first_batch) for part in parts],
            serve=serve,
            num_ahead=self.config.prefetch_batches,
            buffer_bytes=(self.config.buffer_mib << 20) // num_workers,
        )


def serve(spec: StreamSpec, lanes: Mapping[int, LaneState], first_batch: int) -> Iterator[list[LaneBatch]]:
    """Yield the lane batches of every global batch. Each decoding process runs this generator."""
    group = LaneGroup(spec, lanes, first_batch)
    for batch in range(first_batch, spec.num_batches):
        yield group.lane_batches(batch)


def open_readers(spec: StreamSpec) -> list[DatasetReader]:
    """Open the readers of all datasets without sending any request to their stores."""
    config = spec.config
    return [
        DatasetReader(dataset, open_shards(url, index, config), selection, config.read_kib << 10)
        for dataset, url, index, selection in spec.datasets
    ]


def order_of(reader: DatasetReader, config: DataConfig, seed: int) -> DatasetOrder:
    """Return the order in which lanes read a dataset."""
    return DatasetOrder(
        reader.config.name, reader.num_per_shard, seed, config.num_lanes, config.shuffle, reader.chunk_samples
    )
