"""Tests of the modules that a rank imports."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from trainer.engine.imports import lean_imports

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_rank_loads_neither_trackers_nor_a_compiler() -> None:
    code = """
    import gc, sys
    from trainer.engine.imports import lean_imports
    with lean_imports():
        import trainer.build
    assert "deepspeed" in sys.modules and "megatron.core" in sys.modules
    unwanted = {"mlflow", "wandb", "torch._inductor.compile_fx"} & set(sys.modules)
    assert not unwanted, unwanted
    assert gc.isenabled() and gc.get_freeze_count() > 0
    import mlflow
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_functions_decorated_meanwhile_are_compiled_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_now(function, **options):  # type: ignore[no-untyped-def]
        compiled.append((function.__name__, options))
        return lambda *args: function(*args) + 1

    monkeypatch.setattr(torch, "compile", compile_now)
    with lean_imports():

        @torch.compile
        def plain(x: int) -> int:
            return x

        @torch.compile(dynamic=True)
        def with_options(x: int) -> int:
            return 2 * x

    assert torch.compile is compile_now and not compiled
    assert (plain(1), plain(2), with_options(3)) == (2, 3, 7)
    assert compiled == [("plain", {}), ("with_options", {"dynamic": True})]
