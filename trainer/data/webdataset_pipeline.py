"""A pipeline of the webdataset library that reads the project's shards, for use outside the trainer.

The trainer does not use it, because the pipeline cannot resume at exactly the same position on another number of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from model.errors import UserError
from trainer.data.decode import decode_audio
from trainer.data.metadata import check_metadata, with_last_turn
from trainer.data.shards import read_index
from trainer.data.tar_samples import arrange, metadata_of
from trainer.storage.open import open_store
from trainer.storage.store import LocalStore


def shard_pipeline(url: str, *, split: str | None = None, shuffle: int = 0, seed: int | None = None) -> Any:
    """Return a `webdataset.DataPipeline` (a PyTorch `IterableDataset`) over the samples in the shards.

    Shards are divided among the ranks of `torch.distributed` and the workers of a DataLoader. There should be at least
    as many shards as there are workers on all ranks, because a worker without a shard yields nothing.

    Args:
        url: The folder or bucket URL of the shards.
        split: The split to read; None for all.
        shuffle: The size of the buffer from which samples are drawn at random; 0 for the order of the shards.
        seed: The seed for shuffling the shards; None for their stored order.

    Returns:
        The pipeline. Each sample is a dictionary with the keys `__key__`, `audio` (a list of `[T]` float32 arrays at
        16 kHz) and `fields` (the fields of the manifest). The pipeline raises SampleError if a sample cannot be used.

    Raises:
        UserError: If webdataset is not installed, or the index cannot be read.
    """
    try:
        import webdataset as wds
    except ImportError:
        raise UserError("shard_pipeline needs the package webdataset; pip install 'earshot[import]'") from None
    index = read_index(open_store(url))
    stages = [
        wds.SimpleShardList([shard.name for shard in index.shards], seed=seed),
        wds.split_by_node,
        wds.split_by_worker,
        partial(_open, url=url),
        wds.tariterators.tar_file_expander,
        wds.tariterators.group_by_keys,
        partial(_decoded, split=split, defaults=dict(index.defaults)),
    ]
    return wds.DataPipeline(*stages, *([wds.shuffle(shuffle)] if shuffle else []))


def _open(shards: Iterable[dict[str, Any]], url: str) -> Iterator[dict[str, Any]]:
    """Open the shards one after another. Each worker opens the store itself, because stores cannot be shared."""
    store = open_store(url)
    for shard in shards:
        name = shard["url"]
        if isinstance(store, LocalStore):
            with open(store.folder / name, "rb") as file:
                yield {**shard, "stream": file}
        else:
            yield {**shard, "stream": io.BytesIO(store.get(name))}


def _decoded(
    samples: Iterable[Mapping[str, Any]], split: str | None, defaults: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for sample in samples:
        files = {name: data for name, data in sample.items() if not name.startswith("__")}
        names = list(files)
        clips, json_place, txt_place = arrange(names)
        json_text, text = (None if place is None else files[names[place]] for place in (json_place, txt_place))
        fields = with_last_turn(metadata_of(defaults, json_text, text))
        if split is not None and fields.get("split") != split:
            continue
        check_metadata(fields, len(clips))
        audio = [decode_audio(files[names[place]]) for place in clips]
        yield {"__key__": sample["__key__"], "audio": audio, "fields": fields}
