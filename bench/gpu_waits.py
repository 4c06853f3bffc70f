"""Count how often the host waits for a GPU in a step, by the function of this project that causes the wait.

PyTorch reports the waits. `bench.gpu_check` prints the counts, which should equal the table in docs/gpu.md.
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
"""The site of waits on the threads of autograd, whose stacks contain no function of this project."""
_MESSAGE = "called a synchronizing CUDA operation"
_WAY_TO_THE_DEVICE = "model/transfer.py"
"""A file whose functions are skipped, so that a wait is attributed to their callers."""


def site_of(frame: FrameType | None, excluded: Collection[str] = ()) -> str:
    """Return the innermost function of this project on the stack as `file:function`; `BACKWARD` if there is none.

    Args:
        frame: The innermost frame of the stack.
        excluded: Files whose functions are skipped.
    """
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(ROOT) and ".venv" not in path.parts:
            file = path.relative_to(ROOT).as_posix()
            if file not in (_WAY_TO_THE_DEVICE, *excluded) and not name.startswith(("<", "__torch_function__")):
                return BACKWARD if file.startswith(("tests/", "bench/")) else f"{file}:{name}"
        frame = frame.f_back
    return BACKWARD


def host_waits(work: Callable[[], Any], set_mode: Callable[[str], None] | None = None) -> dict[str, int]:
    """Count how often the host waits for the GPU while a function runs.

    Args:
        work: The function. Waits in collectives are not counted.
        set_mode: A replacement for `torch.cuda.set_sync_debug_mode` in tests; None for that function.

    Returns:
        The number of waits at each site, in descending order.
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
