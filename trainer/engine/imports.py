"""Faster imports of DeepSpeed and Megatron-core, so that ranks start sooner."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lean_imports() -> Iterator[None]:
    """Make the first import of DeepSpeed and Megatron-core faster within the block.

    DeepSpeed and Megatron-core try to import mlflow, wandb and TensorBoard. These imports take seconds, and wandb
    replaces `sys.stdout`. Training needs none of the three packages, so their imports fail within the block.
    Megatron-core decorates its fused functions with `torch.compile`, which loads torch's compiler in every process.
    Within the block, the compiler is not loaded before one of these functions is called. The imports create about
    700,000 objects that are never freed, so the garbage collector is paused within the block and ignores these objects
    afterwards.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with _without("mlflow"), _without("wandb"), _without("tensorboard"), _deferred_compile():
            yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Make imports of a package fail within the block, unless the package has already been imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextmanager
def _deferred_compile() -> Iterator[None]:
    """Replace `torch.compile` within the block with a version that compiles a function when it is first called."""
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compile_now(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
