"""Tests of the modules that a rank imports."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tools.parity_measure import Comparison, measure
from trainer.engine.imports import lean_imports
from trainer.parallel.topology import Topology

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


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_step_with_both_engines_loads_no_compiler() -> None:
    arguments = Comparison(Topology(1, 1, 1), kinds=("mixed",)).arguments()
    assert run_ranks(1, loads_compiler, arguments, timeout_sec=100) == [False]


def loads_compiler(**arguments: Any) -> bool:
    """Compare a topology with the oracle, and return whether this loaded torch's compiler."""
    measure(**arguments)
    return "torch._inductor.compile_fx" in sys.modules


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
