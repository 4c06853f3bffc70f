"""Access to the tensors of the audio modules (`AudioTower`) in the memory of DeepSpeed ZeRO-3.

ZeRO-3 flattens each parameter and cuts it into slices of equal size, one for each rank of the parameter's own group
(`ds_process_group`). The last slices are padded. Ranks outside the group hold no part of the parameter, unless the
ranks are divided into several blocks (`parallel.audio_shard`), which hold copies. The slices of trainable parameters
are stored one after another in the fp32 buffer of their sub-group. Adam's moments are stored in buffers with the same
layout. A frozen parameter is not in these buffers, and its slice is the tensor `ds_tensor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from model.errors import UserError
from trainer.checkpoint import adam
from trainer.checkpoint.layout import PARAM, Shard, Slices
from trainer.checkpoint.rect import matrix_of

if TYPE_CHECKING:
    from trainer.engine.encoders import AudioEngine
    from trainer.parallel.groups import Groups

_PREFIX = "audio."


def shards(engine: AudioEngine) -> list[Shard]:
    """Return all shards that this rank holds, as views of the engine's memory.

    After writing to the views, every rank must call `refresh`.

    Raises:
        UserError: If the engine keeps parameters or optimizer state on NVMe.
    """
    zero = engine.zero
    if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
        raise UserError(
            "zero_optimization.offload_*.device = nvme: checkpoints cannot save state on NVMe; set it to cpu or none"
        )
    slices: dict[int, tuple[dict[str, Tensor], int | None]] = {}
    for i, parameters in enumerate(zero.fp16_groups):
        slices |= _slices_of_group(zero, i, parameters)
    found: list[Shard] = []
    for name, parameter in engine.named_parameters():
        flats, step = slices.get(id(parameter), ({PARAM: parameter.ds_tensor.data}, None))  # type: ignore[attr-defined]
        found += _shards_of(name, parameter, flats, step, _is_saved_here(name, engine.groups))
    return [*found, *_buffers(engine.tower, engine.groups)]


def _is_saved_here(name: str, groups: Groups) -> bool:
    """Return whether this rank saves its part of a tensor. Other blocks of ranks may hold copies of the same part."""
    return groups.topology.saving_block(name) == groups.rank // groups.topology.shard_ranks


def set_steps(engine: AudioEngine, steps: dict[str, int]) -> None:
    """Set the number of updates of every trainable parameter.

    All parameters in a ZeRO-3 sub-group must have the same number.
    """
    names = {id(p): name for name, p in engine.named_parameters()}
    for i, parameters in enumerate(engine.zero.fp16_groups):
        wanted = {steps[names[id(p)]] for p in parameters}
        assert len(wanted) == 1, f"parameters of one group were updated {sorted(wanted)} times"
        adam.set_num_updates(_adam_of(engine.zero, i), engine.zero.fp32_partitioned_groups_flat[i], wanted.pop())


def reset_moments(engine: AudioEngine) -> None:
    """Set Adam's moments and the number of updates of every trainable parameter to zero."""
    for i, flat in enumerate(engine.zero.fp32_partitioned_groups_flat):
        adam.reset(_adam_of(engine.zero, i), flat)


def refresh(engine: AudioEngine) -> None:
    """Copy the fp32 weights to the weights that the forward pass reads.

    Collective: every rank of the world must call it.
    """
    engine.release_weights()
    zero = engine.zero
    zero.checkpoint_event_prologue()  # This frees gathered parameters, including those that persist between steps.
    for i in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(i)
    zero.checkpoint_event_epilogue()  # This gathers the persistent parameters again.


def _slices_of_group(zero: Any, i: int, parameters: list[Any]) -> dict[int, tuple[dict[str, Tensor], int | None]]:
    flat, optimizer = zero.fp32_partitioned_groups_flat[i], _adam_of(zero, i)
    moments = adam.moments(optimizer, flat)
    step = adam.num_updates(optimizer, flat)
    found: dict[int, tuple[dict[str, Tensor], int | None]] = {}
    at = 0
    for parameter in parameters:
        numel = parameter.partition_numel()
        kinds = {kind: whole[at : at + numel] for kind, whole in {PARAM: flat.data, **moments}.items()}
        found[id(parameter)] = (kinds, step)
        at += numel
    assert at == flat.numel(), (at, flat.numel())
    return found


def _adam_of(zero: Any, i: int) -> Any:
    # With a partial offload, DeepSpeed uses a second optimizer for the sub-groups on the accelerator.
    partial = zero.offload_optimizer and zero.subgroup_to_device[i] != "cpu"
    return zero.backup_optimizer if partial else zero.optimizer


def _shards_of(
    name: str, parameter: Any, flats: dict[str, Tensor], step: int | None, saved_here: bool
) -> Iterator[Shard]:
    shape, slice_numel = tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel
    ranks = dist.get_process_group_ranks(parameter.ds_process_group)
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    slices = Slices(range(ranks[0], ranks[-1] + 1, stride), slice_numel)
    assert list(slices.ranks) == ranks, f"{name}: the ranks {ranks} are not evenly spaced"
    for offset, rect in slices.rect_of(matrix_of(shape), dist.get_rank(parameter.ds_process_group)):
        cut = slice(offset, offset + rect.numel)
        values = {kind: flat[cut].view(rect.rows, rect.cols) for kind, flat in flats.items()}
        yield Shard(name, shape, rect, values, step, saved_here, frozen=step is None, slices=slices)


def _buffers(tower: nn.Module, groups: Groups) -> Iterator[Shard]:
    for prefix, module in tower.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                rect, full = matrix_of(tuple(buffer.shape)), ".".join(filter(None, (prefix, name)))
                values = {PARAM: buffer.view(rect.rows, rect.cols)}
                saved_here = _is_first_holder(tower, prefix) and _is_saved_here(_PREFIX + full, groups)
                yield Shard(_PREFIX + full, tuple(buffer.shape), rect, values, None, saved_here)


def _is_first_holder(tower: nn.Module, path: str) -> bool:
    """Return whether this rank is the first among the ranks of its block that hold the module at `path`.

    A module is held by the ranks in the process group of its parameters. For a module without parameters, the
    parameters of the nearest enclosing module are used.
    """
    while path and next(tower.get_submodule(path).parameters(), None) is None:
        path = path.rpartition(".")[0]
    parameter: Any = next(tower.get_submodule(path).parameters())
    return dist.get_rank(parameter.ds_process_group) == 0
