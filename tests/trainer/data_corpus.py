"""Helpers that write small corpora of noise clips and text-only samples, as manifests or shards."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from trainer.data.config import DataConfig, DatasetConfig, TokenizerConfig
from trainer.data.shard_writer import ShardWriter, write_index
from trainer.storage.open import open_store

RATE = 16_000


def audio_bytes(seconds: float, seed: int = 0, kind: str = "FLAC", rate: int = RATE, channels: int = 1) -> bytes:
    """Return the content of an audio file with noise."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    buffer = io.BytesIO()
    subtype = {"OPUS": "OPUS"}.get(kind)
    soundfile.write(buffer, noise, rate, format="OGG" if kind == "OPUS" else kind, subtype=subtype)
    return buffer.getvalue()


def row(key: str, **fields: Any) -> dict[str, Any]:
    """Return one row of a manifest. Its `audio` is None unless `fields` contain a different value."""
    base = {"id": key, "audio": None, "task": "asr", "split": "train", "subset": "noise", "source": "tests"}
    return {**base, "instruction": f"What is said in {key}?", "answer": f"word {key}", "language": "en", **fields}


def write_manifest(folder: Path, rows: Iterable[dict[str, Any]], name: str = "set.jsonl") -> Path:
    """Write a manifest to `folder`, and return its path."""
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def clip_rows(folder: Path, num: int, *, prefix: str = "clip", seconds: float = 0.1, **fields: Any) -> list[dict]:
    """Write `num` FLAC clips of different lengths to `folder`, and return one row for each clip."""
    rows = []
    for i in range(num):
        name = f"{prefix}-{i}.flac"
        (folder / name).write_bytes(audio_bytes(seconds + 0.01 * (i % 7), seed=i))
        rows.append(row(f"{prefix}-{i}", audio=name, **fields))
    return rows


def write_shards(
    folder: Path, samples: Iterable[tuple[dict[str, Any], list[tuple[str, bytes]]]], per_shard: int
) -> Path:
    """Write shards of unchecked samples, as other programs may write them, to a local folder, and return it."""
    write_shards_to(str(folder), samples, per_shard)
    return folder


def write_shards_to(
    url: str, samples: Iterable[tuple[dict[str, Any], list[tuple[str, bytes]]]], per_shard: int
) -> None:
    """Write shards of unchecked samples to a folder or a bucket."""
    store, items = open_store(url), list(samples)
    shards = []
    for start in range(0, len(items), per_shard):
        writer = ShardWriter(store, len(shards))
        for metadata, clips in items[start : start + per_shard]:
            writer.add(metadata["id"], clips, metadata, 0.1 * len(clips))
        shards.append(writer.finish())
    write_index(store, shards)


def data_config(root: Path, *datasets: DatasetConfig, **fields: Any) -> DataConfig:
    """Return a data section with two lanes, batches of two samples, and a trained tokenizer of at most 64 pieces."""
    base: dict[str, Any] = {
        "root": str(root),
        "datasets": datasets,
        "cache_dir": str(root / "cache"),
        "eval_splits": (),
        "num_lanes": 2,
        "global_batch_samples": 2,
        "num_workers": 0,
        "tokenizer": TokenizerConfig(train_vocab_size=64, template="{audio}{instruction}"),
    }
    return DataConfig(**{**base, **fields})
