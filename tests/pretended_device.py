"""A pretended device, with which tests on a machine without a GPU detect errors that only occur on a GPU.

Within `PretendedDevice()`, tensors on `DEVICE` keep their values on the CPU, but report a different device. An
operation that mixes them with a CPU tensor raises an error, as on a GPU. Every operation that would make the host wait
for a GPU is counted under the function of this project that causes it:

    with PretendedDevice() as device:
        tower = put(tower)
        tower(...)
    device.waits   # {"model/router.py:on_host": 1, …}

The device has the type `meta`, the only type without hardware that autograd supports. The CPU's kernels compute all
values, so tests with this device do not cover the numerics, speed, memory or collectives of a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from bench.gpu_waits import ROOT, site_of
from model.encoders.log_mel import mel_filters

DEVICE = torch.device("meta")
_THIS_FILE = Path(__file__).resolve().relative_to(ROOT).as_posix()

_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "bincount",
}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_MIXES = {"_to_copy", "copy_", "_ctc_loss", "_cudnn_ctc_loss", "_ctc_loss_backward"}
"""The operations that accept tensors on both devices. The lengths of a CTC loss, for example, are on the host."""

Thing = TypeVar("Thing")


class DeviceTensor(Tensor):
    """A tensor on the pretended device; `host` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        found: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
            requires_grad=False,
        )
        found.host = host
        return found  # type: ignore[no-any-return]

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"DeviceTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        """The data of the tensor. Megatron also assigns it."""
        return DeviceTensor(self.host.detach())

    @data.setter
    def data(self, new: Tensor) -> None:
        assert isinstance(new, DeviceTensor), "the tensor would leave the device"
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.host = new.host

    def tolist(self) -> Any:
        """Return the values, and count that the host waits for them."""
        _note("waits", "tolist")
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Raise the error for a GPU tensor."""
        raise TypeError("cannot convert a tensor on the device to NumPy: copy it to the host first")


def put(thing: Thing) -> Thing:
    """Put a tensor on the device, or every parameter and buffer of a module, in place."""
    if isinstance(thing, nn.Module):
        for module in thing.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = nn.Parameter(DeviceTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                    for key, value in vars(parameter).items():
                        setattr(moved, key, value)
                    module._parameters[name] = moved
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = DeviceTensor(buffer)
        return thing
    assert isinstance(thing, Tensor), type(thing)
    return DeviceTensor(thing)  # type: ignore[return-value]


class PretendedDevice:
    """A context in which `DEVICE` exists."""

    current: PretendedDevice | None = None

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        """`file:function` → how often the host waited for the device there."""
        self.transfers: Counter[str] = Counter()
        """`file:function` → number of copies to the device for which the host did not wait."""
        self.kinds: Counter[tuple[str, str]] = Counter()
        """Waits by site and operation, for the error messages of failing tests."""
        self._modes = (_Dispatch(), _Functions())

    def __enter__(self) -> PretendedDevice:
        assert PretendedDevice.current is None, "a PretendedDevice is already active"
        PretendedDevice.current = self
        mel_filters.cache_clear()  # cached by device, and the plan's tracing uses a device of this type too
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        PretendedDevice.current = None
        mel_filters.cache_clear()


class _Dispatch(TorchDispatchMode):
    """A mode that handles the creation of tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """A mode that handles `torch.tensor(…, device=…)`, whose copy is invisible at lower levels."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_ours(kwargs.get("device")):
            del kwargs["device"]
            _note("waits", "tensor")
            return DeviceTensor(func(*args, **kwargs))
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the host's values, after checking that a GPU would accept its tensors."""
    name = func.overloadpacket.__name__
    flat, _ = tree_flatten((args, kwargs))
    ours = [a for a in flat if isinstance(a, DeviceTensor)]
    others = [a for a in flat if isinstance(a, Tensor) and not isinstance(a, DeviceTensor)]
    target = kwargs.get("device")
    if not ours and not _is_ours(target):
        return func(*args, **kwargs)
    if name == "_to_copy":
        return _copied(func, args, kwargs)
    _check(name, args, kwargs, ours, others)
    asked = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    if target is not None:
        asked["device"] = torch.device("cpu")
    found = func(*_stripped(args), **_stripped(asked))
    if target is not None and not _is_ours(target):
        return found
    found = tree_map(lambda t: DeviceTensor(t) if isinstance(t, Tensor) else t, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if ours and func.namespace == "aten" else found


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Handle `Tensor.to` and similar methods."""
    source, target = args[0], kwargs.get("device")
    there = isinstance(source, DeviceTensor)
    asked = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    found: Tensor = func(*_stripped(args), **asked)
    goes = there if target is None else _is_ours(target)
    if goes and not there:
        _note("transfers" if kwargs.get("non_blocking") else "waits", "to the device")
    if there and not goes:
        _note("waits", "to the host")
    return DeviceTensor(found) if goes else found


def _check(name: str, args: Any, kwargs: Any, ours: Sequence[Any], others: Sequence[Tensor]) -> None:
    """Raise an error if a GPU would raise one, and count the operation if the host would wait for it."""
    mixed = [t for t in others if t.dim() > 0]
    if ours and mixed and name not in _MIXES:
        allowed = name in _INDEXING and isinstance(args[0], DeviceTensor)  # a GPU accepts indices on the host
        if not allowed:
            raise RuntimeError(
                f"{name}: expected all tensors on one device, but one of shape {tuple(mixed[0].shape)} is on the CPU"
            )
        _note("waits", f"{name} by indices of the host")
    if name in _WAITS:
        _note("waits", name)
    if name in _INDEXING and not _is_fill(name, args):
        if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            _note("waits", "boolean index")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _note("waits", name)
    if name == "segment_reduce" and not kwargs.get("unsafe"):
        _note("waits", "segment_reduce checks its lengths")
    if name == "copy_" and isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
        _note("waits", "copy_")
    if name == "_ctc_loss":
        _note("waits", "ctc_loss copies its lengths")


def _is_fill(name: str, args: Any) -> bool:
    """Return whether an operation is `x[mask] = number`, which torch runs as `masked_fill_` with a host number."""
    return name.startswith(("index_put", "_index_put")) and bool(args[2].dim() == 0)


def _stripped(tree: Any) -> Any:
    return tree_map(lambda a: a.host if isinstance(a, DeviceTensor) else a, tree)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _note(what: str, operation: str) -> None:
    device = PretendedDevice.current
    if device is not None:
        site = site_of(sys._getframe(1), excluded=(_THIS_FILE,))
        getattr(device, what)[site] += 1
        if what == "waits":
            device.kinds[site, operation] += 1
