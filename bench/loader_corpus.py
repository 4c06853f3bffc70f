"""Speech of realistic lengths for the benchmarks of the loader, as shards and in lhotse's Shar format.

The speech consists of joined utterances of the kit, a set of small public recordings in the folder $KIT_DIR.
"""

from __future__ import annotations

import io
import json
import os
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from model.lengths import SAMPLE_RATE
from trainer.data.decode import decode_audio
from trainer.data.shard_writer import ShardWriter, write_index
from trainer.storage.store import Store

KIT = Path(os.environ.get("KIT_DIR", Path(__file__).parents[2] / "shared" / "kit"))
MEDIAN_SEC, SIGMA, LONGEST_SEC = 7.0, 0.5, 30.0
"""The parameters of the log-normal durations. They are typical of read and spontaneous speech."""


@dataclass(frozen=True)
class Utterance:
    """A sample with encoded audio."""

    key: str
    data: bytes
    """The audio as FLAC, 16 kHz, mono."""
    seconds: float
    metadata: dict[str, Any]


def durations(num: int, seed: int = 1) -> list[float]:
    """Return log-normal durations in seconds, of at most `LONGEST_SEC`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_SEC), SIGMA, num)
    return np.clip(drawn, 1.0, LONGEST_SEC).tolist()


def utterances(num: int, subsets: Sequence[str] = ("nemo", "timit_sample", "ljspeech")) -> list[Utterance]:
    """Return `num` utterances with log-normal lengths, which are consecutive parts of the kit's concatenated speech."""
    rows = [json.loads(line) for line in (KIT / "asr.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if r["subset"] in subsets]
    speech = np.concatenate([decode_audio((KIT / r["audio"]).read_bytes()) for r in rows])
    made, at = [], 0
    for number, seconds in enumerate(durations(num)):
        count = round(seconds * SAMPLE_RATE)
        clip = np.take(speech, range(at, at + count), mode="wrap")
        at = (at + count) % len(speech)
        buffer = io.BytesIO()
        soundfile.write(buffer, clip, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        metadata = {
            "task": "asr",
            "split": "train",
            "instruction": "Transcribe the speech in this recording.",
            "answer": rows[number % len(rows)]["answer"],
            "language": "en",
            "source": "kit",
            "subset": "joined",
        }
        made.append(Utterance(f"u{number:06d}", buffer.getvalue(), count / SAMPLE_RATE, metadata))
    return made


def write_dataset(store: Store, samples: Sequence[Utterance], per_shard: int) -> None:
    """Write samples as a dataset of shards, which webdataset can also read."""
    shards = []
    for start in range(0, len(samples), per_shard):
        writer = ShardWriter(store, len(shards))
        for u in samples[start : start + per_shard]:
            writer.add(u.key, [("flac", u.data)], u.metadata, u.seconds)
        shards.append(writer.finish())
    write_index(store, shards)


def write_shar(folder: Path, samples: Sequence[Utterance], per_shard: int) -> None:
    """Write samples in lhotse's Shar format, with the same encoded audio as in `write_dataset`."""
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.shar import SharWriter

    folder.mkdir(parents=True)
    with SharWriter(str(folder), fields={"recording": "original"}, shard_size=per_shard) as writer:
        for u in samples:
            recording = Recording.from_bytes(u.data, recording_id=u.key)
            text = SupervisionSegment(u.key, u.key, 0.0, recording.duration, text=u.metadata["answer"])
            cut = MonoCut(u.key, 0.0, recording.duration, 0, supervisions=[text], recording=recording)
            cut.custom = {k: v for k, v in u.metadata.items() if k != "answer"}
            writer.write(cut)


def silent_wave(seconds: float) -> bytes:
    """Return a WAV file of silence, which is cheap to decode."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(bytes(2 * round(seconds * SAMPLE_RATE)))
    return buffer.getvalue()


def linked_dataset(folder: Path, real: Path, num_copies: int) -> None:
    """Write a dataset of `num_copies` links to the first shard of `real`, and an index that lists them."""
    index = json.loads((real / "shards.json").read_text())
    shard = index["shards"][0]
    folder.mkdir(parents=True)
    lines = []
    for number in range(num_copies):
        name = f"shard-{number:06d}"
        for ending in (".tar", ".idx.json"):
            (folder / f"{name}{ending}").symlink_to((real / shard["name"].replace(".tar", ending)).resolve())
        lines.append({**shard, "name": f"{name}.tar"})
    index |= {"shards": lines, "num_samples": num_copies * shard["num_samples"]}
    (folder / "shards.json").write_text(json.dumps(index))


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield `items` in lists of `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
