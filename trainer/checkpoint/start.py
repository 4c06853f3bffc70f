"""A new run that begins with another one's weights; encoders may have been added or removed since.

Only weights are taken: optimizers, schedule, generators and data begin anew. An added encoder keeps its initial (or
pre-trained) weights; its entries in the router are the mean of the others', and come into force gradually
(`model.router.ENTRY_OFFSET`): the loss of the first step is that of the model that was there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from trainer.checkpoint.catalog import read_extra
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.layout import PARAM, Shard, matrix_of
from trainer.checkpoint.reader import Reader, read_manifest

_ENTERING = "audio.router.steps_to_enter"
_BY_EXPERT = (
    "audio.router.independent.logits",
    "audio.router.dependent.weight",
    "audio.router.dependent.bias",
    _ENTERING,
)
"""Tensors with one row per expert."""


@torch.no_grad()
def fill_weights(
    folder: Folder, shards: Sequence[Shard], model: ModelConfig, heartbeat: Callable[[str], None] = lambda what: None
) -> tuple[str, ...]:
    """Fill the weights of this rank's `shards` of `model` from the checkpoint in `folder`; `heartbeat` is told of each.

    Returns:
        Names of the encoders that are new.

    Raises:
        UserError: another part of the model has other sizes, or is missing.
    """
    reader = Reader(folder, read_manifest(folder))
    before = tuple(e["name"] for e in read_extra(folder)["model"]["audio"]["experts"])
    now = tuple(e.name for e in model.experts)
    added = tuple(name for name in now if name not in before)
    own = tuple(f"audio.experts.{name}." for name in added)
    for shard in shards:
        heartbeat(f"the read of {shard.name}")
        if shard.name in _BY_EXPERT:
            rows = _rows(reader, shard, before, now, model.router.added_encoder_warmup_steps)
            whole = matrix_of(shard.shape)
            shard.values[PARAM].copy_(rows.view(whole.rows, whole.cols)[shard.rect.within(whole)])
        elif not (own and shard.name.startswith(own)):
            _check(reader, shard)
            reader.read_rect(shard.name, PARAM, shard.rect, shard.values[PARAM])
    return added


def _rows(
    reader: Reader, shard: Shard, before: Sequence[str], now: Sequence[str], added_encoder_warmup_steps: int
) -> Tensor:
    """The tensor [experts now, …], from that of the experts before; fp32."""
    _check(reader, shard, (len(before), *shard.shape[1:]))
    whole = matrix_of((len(before), *shard.shape[1:]))
    old = torch.empty(whole.rows, whole.cols, dtype=reader.dtype(shard.name, PARAM))
    reader.read_rect(shard.name, PARAM, whole, old)
    old = old.float()
    new = torch.full_like(old[0], float(added_encoder_warmup_steps)) if shard.name == _ENTERING else old.mean(0)
    return torch.stack([old[before.index(name)] if name in before else new for name in now])


def _check(reader: Reader, shard: Shard, shape: tuple[int, ...] | None = None) -> None:
    entry, wanted = reader.manifest.tensors.get(shard.name), shape or shard.shape
    if entry is None:
        raise UserError(f"checkpoint.start_from: {reader.folder.url} holds no {shard.name}; only encoders may be added")
    if entry.shape != wanted:
        raise UserError(
            f"checkpoint.start_from: {reader.folder.url}: {shard.name} has shape {entry.shape}, here it is {wanted}; "
            "only encoders may differ: restore the other sizes"
        )
