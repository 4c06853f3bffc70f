"""Load training batches as tensors.

Example:
    with Loader(SampleStream(prepared, seed=1, num_batches=1000, rank=r, world=w, state=saved)) as loader:
        for batch, state in loader:
            ...  # A new loader with `state` continues with the next batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from model.batch import Batch, Sample
from trainer.data.dataset_reader import Skip
from trainer.data.sample import EncodedSample
from trainer.data.state import State
from trainer.data.stream import SampleStream

log = logging.getLogger(__name__)


class Loader:
    """An iterable over this rank's part of every global batch, as `(Batch, State)` pairs.

    Like its stream, a loader can be iterated only once. It raises the same errors as the stream.

    Args:
        stream: The stream of samples, whose arrays the loader converts to tensors.
    """

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream

    @property
    def state(self) -> State:
        """The data state after the last yielded batch."""
        return self.stream.state

    @property
    def num_skipped(self) -> dict[str, int]:
        """The number of samples that this rank's lanes have skipped, by reason; see `SampleStream.num_skipped`."""
        return self.stream.num_skipped

    @property
    def epochs(self) -> dict[str, float]:
        """The number of samples that this rank's lanes have read from each dataset, divided by the dataset's size."""
        return self.stream.epochs

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.close()

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        for samples, state in self.stream:
            yield Batch(tuple(to_sample(s) for s in samples)), state


def to_sample(encoded: EncodedSample) -> Sample:
    """Convert the arrays of a sample to tensors that share memory with them."""
    return Sample(
        key=encoded.key,
        task=encoded.meta["task"],
        clips=tuple(torch.from_numpy(c) for c in encoded.clips),
        token_ids=torch.from_numpy(encoded.token_ids),
        audio_mask=torch.from_numpy(encoded.audio_mask),
        labels=torch.from_numpy(encoded.labels),
        prompt_ids=torch.from_numpy(encoded.instruction_ids),
        clip_prompt_ids=tuple(map(torch.from_numpy, encoded.clip_instruction_ids)),
        texts={name: torch.from_numpy(ids) for name, ids in encoded.texts.items()},
        meta=encoded.meta,
        answer_text=encoded.answer,
        pieces=torch.from_numpy(encoded.pieces),
        is_transcription=encoded.is_transcription,
    )


class SkipLog:
    """A callback for `SampleStream(on_skip=...)` that appends every skipped sample to a JSONL file.

    The file is created when the first sample is skipped. If the file cannot be written, the line is logged instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, skip: Skip) -> None:
        line = json.dumps(asdict(skip), ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s), so this line is missing: %s", self.path, error, line)
