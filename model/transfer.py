"""Transfers of small arrays from the host to the device, without blocking the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Tensor | NDArray[Any] | Sequence[Any], device: torch.device) -> Tensor:
    """Return `values` as a tensor on `device`. The copy runs while the host continues.

    In contrast, `torch.tensor(values, device=device)` waits until the device has finished all earlier work.
    """
    host = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    if host.device == device or device.type == "cpu":
        return host.to(device)
    if device.type == "cuda":
        host = host.pin_memory()  # A copy from pageable memory is not asynchronous.
    return host.to(device, non_blocking=True)
