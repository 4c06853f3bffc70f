"""Import both engines without what they load beside: in every rank, and at every restart, that takes seconds."""

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
    """Where what imports DeepSpeed and Megatron-core for the first time should do so.

    DeepSpeed's autotuner tries mlflow, which costs a second. Megatron-core decorates its fused functions with
    `torch.compile`, which loads torch's compiler in every process; here it is loaded at the first call of such a
    function. Some 700,000 objects that stay are made: nobody looks for garbage among them, now or later.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with _without("mlflow"), _deferred_compile():
            yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Where imports of a package fail, if it has not been imported yet."""
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
    """Where `torch.compile` compiles at the first call, not when it decorates."""
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
