"""The corpus of the golden run. Its clips are computed with integers, so they have the same bytes on all machines."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
WORDS = ("red", "green", "blue", "white")


def write_corpus(folder: Path) -> None:
    """Write `golden.jsonl` and its WAV files into `folder`: eight ASR samples for training and two for testing."""
    rows = []
    for i in range(10):
        name = f"clip-{i}.wav"
        _write_clip(folder / name, num_samples=3_200 + 400 * i, seed=i)
        rows.append(
            {
                "id": f"golden-{i}",
                "audio": name,
                "task": "asr",
                "split": "train" if i < 8 else "test",
                "subset": "golden",
                "source": "golden",
                "instruction": "Write what you hear.",
                "answer": f"{WORDS[i % 4]} {WORDS[(i + 1) % 4]}",
                "language": "en",
            }
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "golden.jsonl").write_text(text, encoding="utf-8")


def _write_clip(path: Path, num_samples: int, seed: int) -> None:
    """Write a mono 16-bit WAV file with a square wave and noise from a linear congruential generator."""
    noise, state = np.empty(num_samples, dtype=np.int64), 12_345 + 977 * seed
    for i in range(num_samples):
        state = (1_103_515_245 * state + 12_345) % 2**31
        noise[i] = (state >> 16) % 2_000 - 1_000
    period = 40 + 8 * seed
    square = np.where(np.arange(num_samples) % period < period // 2, 6_000, -6_000)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((square + noise).astype("<i2").tobytes())
