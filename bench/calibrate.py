"""Measure the device speeds that the plan needs: matmuls, attention, memory bandwidth and kernel-launch overhead.

    python -m bench.calibrate [--device cuda|cpu] [--out device.json] [--like h100]
    earshot plan RECIPE --accelerator device.json

The measurements take about a minute on a GPU or a CPU. Values that cannot be measured on one device (links, memory
size, devices per node) are copied from the accelerator `--like`. The last line is the JSON object that `--out` stores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.plan.op_traffic import op_traffic

_ROUNDS = 3
_SECONDS_PER_SHAPE = 0.2
_GPU_SIDES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288)
_CPU_SIDES = (32, 64, 128, 256, 512, 1024)
_RESIDUAL_LAYERS = 16


def measured_seconds(call: Callable[[], Any], device: torch.device, round_sec: float = _SECONDS_PER_SHAPE) -> float:
    """Return the mean time of a call in seconds, in the fastest of three rounds of `round_sec` seconds each."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    start = time.perf_counter()
    call()
    wait()
    count = max(1, int(round_sec / max(1e-6, time.perf_counter() - start)))
    least = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        least = min(least, (time.perf_counter() - start) / count)
    return least


def calibrate(
    device: torch.device,
    dtype: torch.dtype,
    like: Any,
    peak_tflops: float | None = None,
    round_sec: float = _SECONDS_PER_SHAPE,
) -> Any:
    """Return an accelerator with the measured rates of `device`.

    Args:
        device: The device to measure.
        dtype: The dtype of matmuls and attention.
        like: The accelerator that provides the values that cannot be measured.
        peak_tflops: The peak rate in TFLOP/s, relative to which measured rates are stored. None uses the data sheet's
            rate on a GPU, and the rate of the fastest matmul on a CPU.
        round_sec: The length of a round in seconds. Each measurement has three rounds.
    """
    sides = _GPU_SIDES if device.type == "cuda" else _CPU_SIDES
    rates = [(side / 3, _product_rate(side, device, dtype, round_sec)) for side in sides]
    if peak_tflops is None:
        listed = like.tflops if dtype == torch.bfloat16 else like.fp32_tflops
        peak_tflops = listed if device.type == "cuda" else max(rate for _, rate in rates) / 1e12
    peak = peak_tflops * 1e12
    size = torch.empty((), dtype=dtype).element_size()
    # As in `Accelerator.matrix`, the FLOPs per byte are those of a bf16 matmul, regardless of the measured dtype.
    table = tuple((round(at, 3), round(min(1.0, rate / peak), 4)) for at, rate in rates)
    memory = _memory_rate(device, round_sec)
    known = dataclasses.asdict(like)
    return type(like)(
        **{
            **known,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "tflops": peak_tflops if size == 2 or device.type == "cpu" else like.tflops,
            "fp32_tflops": peak_tflops if size == 4 or device.type == "cpu" else like.fp32_tflops,
            "matrix": table,
            "attention_efficiency": round(min(1.0, _attention_rate(device, dtype, round_sec) / peak), 4),
            "memory_tb_s": round(memory / 1e12, 6),
            "memory_efficiency": 1.0,
            "kernel_us": round(_kernel_seconds(device, round_sec) * 1e6, 3),
        }
    )


def _product_rate(side: int, device: torch.device, dtype: torch.dtype, round_sec: float) -> float:
    """Return the FLOP/s of a matmul of two square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * side**3 / measured_seconds(lambda: a @ b, device, round_sec)


def _attention_rate(device: torch.device, dtype: torch.dtype, round_sec: float) -> float:
    """Return the FLOP/s of causal attention in the forward pass, counting only the scores that the mask keeps."""
    heads, tokens, width = (16, 4096, 128) if device.type == "cuda" else (4, 1024, 64)
    q, k, v = (torch.randn(1, heads, tokens, width, device=device, dtype=dtype) for _ in range(3))
    seconds = measured_seconds(
        lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True), device, round_sec
    )
    return 2.0 * heads * width * tokens**2 / seconds


def _memory_rate(device: torch.device, round_sec: float) -> float:
    """Return the rate of element-wise operations in training, in bytes that they read and write per second.

    Two tensors are added twice: once into a new tensor, as in a forward pass, and once into this existing tensor, as in
    a backward pass, whose results take the memory of activations that are no longer needed. On a GPU, PyTorch keeps the
    memory of freed tensors, so both are equally fast. On a CPU, the C library returns the memory of such large tensors
    to the operating system, and mapping the pages of a new tensor takes several times as long as the addition.
    """
    count = 2**28 if device.type == "cuda" else 2**24
    a, b = (torch.ones(count, device=device) for _ in range(2))

    def add_twice() -> None:
        result = a + b
        torch.add(a, b, out=result)

    return 2 * 3.0 * a.nbytes / measured_seconds(add_twice, device, round_sec)


def _kernel_seconds(device: torch.device, round_sec: float) -> float:
    """Return the time of an operation on a few elements in training, including the work of autograd, in seconds."""
    x, scale, bias = (torch.ones(8, device=device, requires_grad=True) for _ in range(3))

    def train() -> None:
        y = x
        for _ in range(_RESIDUAL_LAYERS):
            y = y + functional.gelu(functional.layer_norm(y, (8,), scale, bias))
        y.backward(x.detach())
        x.grad = scale.grad = bias.grad = None

    with _Kernels() as found:
        train()
    return measured_seconds(train, device, round_sec) / found.count


class _Kernels(TorchDispatchMode):
    """A counter of the kernels that operations launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += op_traffic(func, args, kwargs or {}, out, math.inf)[1]
        return out


def main() -> int:
    """Run the command and return the exit code."""
    from trainer.plan.accelerator import parse_accelerator

    parser = argparse.ArgumentParser(
        prog="python -m bench.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for the result")
    parser.add_argument(
        "--like",
        default="h100",
        metavar="NAME",
        help="accelerator from which values that are not measured are copied (default: h100)",
    )
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="peak rate relative to which rates are stored")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = calibrate(device, dtype, parse_accelerator(options.like), options.peak_tflops)
    for at, share in found.matrix:
        print(f"{at:8.1f} FLOPs per byte: {share:6.1%} of {found.tflops:.4g} TFLOP/s")
    print(
        f"attention {found.attention_efficiency:.1%}, memory {found.memory_tb_s:.4g} TB/s, "
        f"kernel launch {found.kernel_us:.1f} us"
    )
    text = json.dumps(dataclasses.asdict(found))
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
