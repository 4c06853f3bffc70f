"""Where the host waits for a GPU in a step: torch's own count, by the function of this project that asked for it.

`bench.gpu_check` reports it; docs/gpu.md has the table that it should equal.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BACKWARD = "backward"
"""Site of what autograd's own threads do: they have no frame of this project."""
_MESSAGE = "called a synchronizing CUDA operation"
_WAY_TO_THE_DEVICE = "model/transfer.py"
"""Stands for whoever calls it."""


def site_of(frame: FrameType | None, left_out: Collection[str] = ()) -> str:
    """Return `file:function` of the innermost frame, from `frame` outwards, that is this project's and not in the files
    `left_out`."""
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(ROOT) and ".venv" not in path.parts:
            file = path.relative_to(ROOT).as_posix()
            if file not in (_WAY_TO_THE_DEVICE, *left_out) and not name.startswith(("<", "__torch_function__")):
                return BACKWARD if file.startswith(("tests/", "bench/")) else f"{file}:{name}"
        frame = frame.f_back
    return BACKWARD


def host_waits(work: Callable[[], Any], set_mode: Callable[[str], None] | None = None) -> dict[str, int]:
    """Return how often the host waits for the GPU while `work` runs, by site, the most frequent first.

    Args:
        work: what is watched; collectives that wait are not seen.
        set_mode: `torch.cuda.set_sync_debug_mode`, unless given.
    """
    set_mode = set_mode or torch.cuda.set_sync_debug_mode  # type: ignore[assignment]
    assert set_mode is not None
    found: Counter[str] = Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if _MESSAGE in str(message):
            found[site_of(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        set_mode("warn")
        try:
            work()
        finally:
            set_mode("default")
    return dict(found.most_common())
