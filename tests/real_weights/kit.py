"""Functions that read the kit, which is a folder of real recordings (KIT_DIR)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.decode import decode_audio

KIT = Path(os.environ.get("KIT_DIR", Path(__file__).parents[3] / "shared" / "kit"))


def rows_of(kit: Path, subset: str, split: str = "test") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (kit / "asr.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["subset"] == subset and row["split"] == split]


def clip_of(kit: Path, row: dict[str, Any]) -> Tensor:
    return torch.from_numpy(decode_audio((kit / row["audio"]).read_bytes()))
