"""A common interface to the state of different implementations of Adam.

All implementations store moments per parameter. Some count the updates per parameter, others per parameter group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.layout import EXP_AVG, EXP_AVG_SQ

_PER_PARAMETER = (torch.optim.Adam, torch.optim.AdamW)


def moments(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Return the moments of a parameter, and create them as zeros if it has had no update yet.

    Returns:
        `exp_avg` and `exp_avg_sq`, each of the parameter's shape.
    """
    state = optimizer.state[parameter]
    if not state:
        state[EXP_AVG], state[EXP_AVG_SQ] = (torch.zeros_like(parameter.data) for _ in range(2))
        if isinstance(optimizer, _PER_PARAMETER):
            # The fused implementation reads the number of updates on the device.
            state["step"] = torch.tensor(0.0, device=parameter.device if optimizer.defaults["fused"] else None)
    return {kind: state[kind] for kind in (EXP_AVG, EXP_AVG_SQ)}


def num_updates(optimizer: Any, parameter: Tensor) -> int:
    """Return the number of updates of a parameter.

    The caller must call `moments` first, which creates missing state.
    """
    if isinstance(optimizer, _PER_PARAMETER):
        return int(optimizer.state[parameter]["step"])
    return int(_group_of(optimizer, parameter).get("step", 0))


def set_num_updates(optimizer: Any, parameter: Tensor, step: int) -> None:
    """Set the number of updates of a parameter to `step`."""
    if isinstance(optimizer, _PER_PARAMETER):
        # The value is set in place, so that every parameter keeps a counter of its own.
        optimizer.state[parameter]["step"].fill_(float(step))
    else:
        _group_of(optimizer, parameter)["step"] = step


def reset(optimizer: Any, parameter: Tensor) -> None:
    """Set the moments and the number of updates of a parameter to zero."""
    for values in moments(optimizer, parameter).values():
        values.zero_()
    set_num_updates(optimizer, parameter, 0)


def _group_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
