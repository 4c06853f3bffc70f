"""The table of all losses. A new loss needs a module and an entry in `LOSSES`."""

from __future__ import annotations

import math

from model.config import ModelConfig
from model.errors import UserError
from model.losses.base import Loss
from model.losses.ctc import CTC
from model.losses.distillation import Distillation
from model.losses.next_token import NextToken
from model.losses.router import ExpertBalance, RouterZ
from model.losses.routing import RoutingLoss

LOSSES: dict[str, Loss] = {
    "next_token": NextToken(),
    "routing": RoutingLoss(),
    "ctc": CTC(),
    "distillation": Distillation(),
    "expert_balance": ExpertBalance(),
    "router_z": RouterZ(),
}
"""All known losses by name. Plug-ins may add entries."""


def active_losses(config: ModelConfig) -> tuple[Loss, ...]:
    """Return the losses of a model, in the order of the table.

    Raises:
        UserError: If `model.losses` contains an unknown loss, an unknown option or an invalid value.
    """
    check_losses(config)
    return tuple(loss for loss in LOSSES.values() if loss.is_active(config))


def text_fields(config: ModelConfig) -> tuple[str, ...]:
    """Return the fields of the manifests that the losses of a model read as token ids."""
    return tuple(sorted({field for loss in active_losses(config) for field in loss.text_fields}))


def check_losses(config: ModelConfig) -> None:
    """Check `model.losses`.

    Raises:
        UserError: If the section contains an unknown loss, an unknown option or an invalid value.
    """
    known = [name for name, loss in LOSSES.items() if loss.options]
    for name, given in config.losses.items():
        if name not in known:
            raise UserError(
                f"model.losses.{name}: no loss has this name; use one of {', '.join(known)}, or install the plug-in "
                "that defines it"
            )
        for key, value in given.items():
            if key not in LOSSES[name].options:
                options = ", ".join(LOSSES[name].options)
                raise UserError(f"model.losses.{name}.{key}: unknown option; known options are {options}")
            if not 0 <= value < math.inf:
                raise UserError(f"model.losses.{name}.{key} = {value}: must be a number of at least 0")
        LOSSES[name].check(config)
