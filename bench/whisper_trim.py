"""Measure how much Whisper's features change if it processes short windows instead of the 30 s windows of its
pre-training.

    python -m bench.whisper_trim ~/.cache/earshot/models/whisper-base

The script encodes 20 recordings of the kit (a set of small public recordings, in the folder $KIT_DIR) with
`length_mode: full`, and with `length_mode: trim` and increasing trailing silence. It prints the relative RMS of the
difference as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder
from model.encoders.registry import build_encoder
from trainer.data.decode import decode_audio

SILENCES_SEC = (0.0, 0.5, 1.0, 2.0, 4.0)
CLIPS = {"timit_sample": 6, "ljspeech": 4, "digit_strings": 6, "wake_words": 4}
"""The number of encoded recordings from the test split of each of the kit's subsets."""


def main() -> None:
    """Measure every model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="DIR", nargs="+", help="Hugging Face folders with Whisper's weights")
    parser.add_argument("--kit", type=Path, default=Path(os.environ.get("KIT_DIR", "../shared/kit")))
    options = parser.parse_args()
    clips = read_clips(options.kit)
    print("| model | trailing silence, s | median | smallest | largest |\n|---|---:|---:|---:|---:|")
    for folder in options.models:
        for silence_sec, found in measure(folder, clips).items():
            values = f"{np.median(found):.2f} | {min(found):.2f} | {max(found):.2f}"
            print(f"| {Path(folder).name} | {silence_sec:g} | {values} |", flush=True)


def read_clips(kit: Path) -> list[Tensor]:
    """Return the waveforms [T] at 16 kHz of recordings that are evenly spaced over each subset's test split."""
    rows = [json.loads(line) for line in (kit / "asr.jsonl").read_text(encoding="utf-8").splitlines()]
    clips = []
    for subset, count in CLIPS.items():
        found = [row for row in rows if row["subset"] == subset and row["split"] == "test"]
        for row in found[:: max(1, len(found) // count)][:count]:
            clips.append(torch.from_numpy(decode_audio((kit / row["audio"]).read_bytes())))
    return clips


@torch.no_grad()
def measure(folder: str, clips: list[Tensor]) -> dict[float, list[float]]:
    """Return, for each length of silence, the relative RMS difference of every clip from `length_mode: full`."""
    whole = build_encoder(EncoderConfig("whisper", "whisper", weights=folder)).eval()
    wanted = [_features(whole, clip) for clip in clips]
    results = {}
    for silence_sec in SILENCES_SEC:
        config = EncoderConfig(
            "whisper", "whisper", weights=folder, length_mode="trim", trailing_silence_sec=silence_sec
        )
        encoder = build_encoder(config).eval()
        pairs = [(_features(encoder, clip), want) for clip, want in zip(clips, wanted, strict=True)]
        results[silence_sec] = [float((found - want).norm() / want.norm()) for found, want in pairs]
    return results


def _features(encoder: AudioEncoder, clip: Tensor) -> Tensor:
    return encoder(Ragged(clip, (len(clip),))).values


if __name__ == "__main__":
    main()
