"""Gathering of the audio side's weights, and reduction of their gradients, once per update.

The audio side consists of the encoders, the router, the adapter and the projector.

By default, DeepSpeed ZeRO-3 gathers the parameters of a module around each of the module's calls, and reduces gradients
in small buckets. With this module, one collective per process group gathers all parameters before the first forward
pass after an update. The parameters stay gathered until the next update. The `grad` of each parameter is a view of one
flat fp32 buffer, so autograd adds gradients up without running Python code for each of them. One collective per process
group reduces the gradients at the end of the backward pass. DeepSpeed still manages the partitions of weights,
gradients and optimizer state between updates, and computes the update itself.

Shapes: n ranks in the process group, k elements in one rank's slice of a parameter, S elements in all slices of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from model.audio_output import AudioOutput
from trainer.engine.ds_config import BUCKET_ELEMENTS

_ALIGNMENT = 64
"""Every gathered parameter begins at a multiple of this number of elements, because fast kernels require alignment."""


class _Buffer(NamedTuple):
    """Memory that is sent or received."""

    whole: Tensor
    """The slices of one rank [S], or of all ranks [n, S]. The memory exists only while it is used."""
    views: list[Tensor]
    """The views of the parameters' slices, [k] or [n, k]."""


class Bucket:
    """A group of parameters that one collective gathers, and whose gradients one collective reduces.

    A slice of ZeRO-3 contains k = ceil(numel / n) elements. The slices of all ranks therefore contain n·k elements, of
    which the last n·k - numel are padding.

    Args:
        parameters: The parameters, partitioned by ZeRO-3 over the ranks of one process group.
        places: For trainable parameters, the tensors [k] to which this rank's slices of the reduced gradients are
            written. Empty for frozen parameters.
        device: The device of the whole weights.
        copies: The ranks that hold copies of this rank's slices, and sum their gradients; None if there are no others.
    """

    def __init__(
        self,
        parameters: Sequence[Any],
        places: list[Tensor],
        device: torch.device,
        copies: dist.ProcessGroup | None = None,
    ) -> None:
        assert not places or len(places) == len(parameters)
        self.parameters, self.places, self.device, self.copies = parameters, places, device, copies
        self.group: dist.ProcessGroup = parameters[0].ds_process_group
        self.num_ranks = dist.get_world_size(self.group)
        self.slices = [p.ds_tensor.ds_numel for p in parameters]
        self._padded = [-(-self.num_ranks * k // _ALIGNMENT) * _ALIGNMENT for k in self.slices]
        self._whole = torch.empty(sum(self._padded), dtype=parameters[0].dtype, device=device)
        self._weights, self._weight_rows = self._views(self._whole)
        self._nothing = self._whole[:0]
        self._is_current = False
        # Creating views of thousands of parameters is slow, so they are kept from step to step, without their memory.
        self._shards = [p.ds_tensor for p in parameters]
        self._mine, self._everyone = (self._buffer(rows, self._whole.dtype) for rows in ((), (self.num_ranks,)))
        if not places:
            return
        self._summed = torch.empty(len(self._whole), dtype=torch.float32, device=device)
        self._gradients, self._gradient_rows = self._views(self._summed)
        _free(self._summed)
        self._reduced, self._ordered = (self._buffer(rows, torch.float32) for rows in ((), (self.num_ranks,)))
        for parameter in parameters:
            parameter.grad_dtype = None  # This permits fp32 gradients of parameters in half precision.

    def _buffer(self, rows: tuple[int, ...], dtype: torch.dtype) -> _Buffer:
        """Return a buffer [*rows, S] without memory, and its views, one per parameter."""
        whole = torch.empty(*rows, sum(self.slices), dtype=dtype, device=self.device)
        views = list(whole.split(self.slices, dim=-1))
        _free(whole)
        return _Buffer(whole, views)

    def _views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the views of a flat buffer that have the shapes of the parameters, and those [n, k] of the slices."""
        parts = flat.split(self._padded)
        return (
            [p[: one.ds_numel].view(one.ds_shape) for p, one in zip(parts, self.parameters, strict=True)],
            [p[: self.num_ranks * k].view(-1, k) for p, k in zip(parts, self.slices, strict=True)],
        )

    @property
    def is_gathered(self) -> bool:
        """True if the parameters have their full shapes on this rank."""
        return self.parameters[0].ds_status is ZeroParamStatus.AVAILABLE

    def gather(self) -> None:
        """Gather the parameters. If their current values are still in memory, nothing is sent.

        Collective: every rank of the bucket's process group must call it.
        """
        if self.is_gathered:
            return
        if not self._is_current:
            _allocate(self._mine.whole)
            torch._foreach_copy_(self._mine.views, self._shards)
            _allocate(self._everyone.whole)
            dist.all_gather_into_tensor(self._everyone.whole.view(-1), self._mine.whole, group=self.group)
            _free(self._mine.whole)
            torch._foreach_copy_(self._weight_rows, self._everyone.views)
            _free(self._everyone.whole)
            self._is_current = True
        for parameter, weight in zip(self.parameters, self._weights, strict=True):
            parameter.data = weight
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def release(self, *, are_stale: bool) -> None:
        """Return the parameters to the partitioned state, in which DeepSpeed expects them.

        Args:
            are_stale: True if the slices are about to get new values, which the next `gather` must then send.
        """
        self._is_current = self._is_current and not are_stale
        if self.is_gathered:
            for parameter in self.parameters:
                parameter.data = self._nothing
                parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def begin_backward(self) -> None:
        """Let the next backward pass add gradients to the bucket's fp32 buffer. The parameters must be whole."""
        _allocate(self._summed)
        self._summed.zero_()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def reduce(self) -> None:
        """Sum the gradients over all ranks that hold the parameters, and write this rank's slices to `places`.

        Collective: every rank of the bucket's process group and of `copies` must call it.
        """
        for parameter in self.parameters:
            parameter.grad = None
        _allocate(self._ordered.whole)
        torch._foreach_copy_(self._ordered.views, self._gradient_rows)
        _free(self._summed)
        _allocate(self._reduced.whole)
        mine = self._reduced.whole
        dist.reduce_scatter_tensor(mine, self._ordered.whole.view(-1), group=self.group)
        _free(self._ordered.whole)
        if self.copies is not None:
            dist.all_reduce(mine, group=self.copies)
        torch._foreach_copy_(self.places, self._reduced.views)
        _free(self._reduced.whole)


def _allocate(buffer: Tensor) -> None:
    """Allocate the memory of a buffer that has none. Its values are undefined."""
    buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())


def _free(buffer: Tensor) -> None:
    """Free the memory of a buffer. Its views remain, and are valid again after `_allocate`."""
    buffer.untyped_storage().resize_(0)


class WholeWeights:
    """The audio side's parameters, which stay gathered from the first forward pass after an update to the next update.

    Collective: every rank of the world must create one.

    DeepSpeed's own hooks for modules, parameters and gradients are removed.

    Args:
        engine: DeepSpeed's engine, which has partitioned all parameters.
        device: The device of the whole weights.
        copies: The ranks that hold copies of this rank's slices; None if there are no others.
    """

    calls_are_collective = False
    """An encoder call involves no other rank, so the number of calls may differ between ranks."""

    def __init__(self, engine: Any, device: torch.device, copies: dist.ProcessGroup | None = None) -> None:
        self._engine, self._zero, self.tower = engine, engine.optimizer, engine.module
        self._zero.parameter_offload._remove_module_hooks()
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        self._zero._grad_acc_hooks.clear()
        for module in self.tower.modules():
            # DeepSpeed's own dictionaries check at every access whether a parameter must be gathered.
            module._parameters = dict(module._parameters)
        places = self._places()
        learned = [p for group in self._zero.fp16_groups for p in group]
        frozen = [p for p in self.tower.parameters() if id(p) not in places]
        self.learned = [Bucket(b, [places[id(p)] for p in b], device, copies) for b in buckets(learned)]
        self.frozen = [Bucket(b, [], device) for b in buckets(frozen)]

    def _places(self) -> dict[int, Tensor]:
        """Return the tensors in DeepSpeed's memory to which the reduced gradients are written.

        Returns:
            The tensor [k] of each trainable parameter, by the parameter's `id`.
        """
        zero = self._zero
        found: dict[int, Tensor] = {}
        for i, group in enumerate(zero.fp16_groups):
            whole = zero.fp32_partitioned_groups_flat[i].grad if zero.offload_optimizer else self._flat(i)
            found |= dict(zip(map(id, group), whole.split([p.ds_tensor.ds_numel for p in group]), strict=True))
        return found

    def _flat(self, group: int) -> Tensor:
        """Return the reduced gradients of DeepSpeed's sub-group number `group`."""
        sizes = self._zero.fp16_partitioned_groups_flat_numel
        return self._zero.grad_partitions_flat_buffer.narrow(0, sum(sizes[:group]), sizes[group])

    def gather(self) -> None:
        """Gather all parameters.

        Collective: every rank of the world must call it.
        """
        for bucket in (*self.learned, *self.frozen):
            bucket.gather()

    def forward(self, *args: Any, **kwargs: Any) -> AudioOutput:
        """Compute the tower's forward pass.

        Collective: every rank of the world must call it.
        """
        self.gather()
        output: AudioOutput = self.tower(*args, **kwargs)
        return output

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the sum of `loss` over all ranks.

        Collective: every rank of the world must call it.
        """
        for bucket in self.learned:
            bucket.begin_backward()
        loss.backward()
        for bucket in self.learned:
            bucket.reduce()
        if not self._zero.offload_optimizer:  # With offload, gradients have been written to the fp32 parameters.
            self._zero.averaged_gradients = {i: [self._flat(i)] for i in range(len(self._zero.fp16_groups))}

    def before_features_return(self) -> None:
        """Do nothing, because no gradient is reduced during the backward pass."""

    def step(self) -> None:
        """Update the partitions. The next forward pass gathers the new weights.

        Collective: every rank of the world must call it.
        """
        self.release(are_loaded=False)
        self._engine.step()

    def release(self, *, are_loaded: bool) -> None:
        """Free the gathered weights, because the partitions are about to get new values.

        Args:
            are_loaded: True if a checkpoint is loaded, so that frozen parameters also get new values.
        """
        for bucket in self.learned:
            bucket.release(are_stale=True)
        for bucket in self.frozen:
            bucket.release(are_stale=are_loaded)


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[Any]]:
    """Divide parameters into buckets of one process group and at most `BUCKET_ELEMENTS` elements.

    A single larger parameter has its own bucket. The buckets of a process group are in the same order on all of its
    ranks.
    """
    by_group: dict[int, list[Any]] = {}
    for parameter in parameters:
        by_group.setdefault(id(parameter.ds_process_group), []).append(parameter)  # type: ignore[attr-defined]
    for members in by_group.values():
        bucket: list[Any] = []
        for parameter in members:
            if bucket and sum(p.ds_numel for p in bucket) + parameter.ds_numel > BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket
