"""Runs of `earshot import`, their results, and recordings in formats that need PyAV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.import_data import main


def run(form: str, source: Path, out: Path, *options: str, jobs: int = 1) -> int:
    return main(["--from", form, str(source), str(out), "--jobs", str(jobs), *options])


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def skipped(out: Path) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["where"], line["reason"]) for line in found]


def av_bytes(kind: str, codec: str, seconds: float = 1.0, rate: int = 48_000) -> bytes:
    """Return the content of an audio file with a tone, written with PyAV."""
    import io

    av = pytest.importorskip("av")
    tone = (8000 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)).astype(np.int16)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", bit_rate=128_000)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()
