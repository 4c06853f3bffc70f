"""Tests of the arguments that `earshot parity` refuses. tests/distributed/test_parity.py tests what it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import parity
from trainer.parity import build_oracle
from trainer.parity_cases import tiny_model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--steps", "-1"], "--steps -1: must be at least 0"),
        (
            ["--pack-multiple", "6"],
            "--pack-multiple 6: must be a multiple of 8, so that packs can be divided among tensor-parallel and",
        ),
        (["--deepspeed", "nope.json"], "nope.json: no such file"),
        (["--deepspeed", "bad.json"], "zero_optimization.overlap_comm = 'perhaps'"),
    ],
)
def test_bad_arguments_are_one_line_errors(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "bad.json").write_text('{"zero_optimization": {"stage": 3, "overlap_comm": "perhaps"}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parity, "start_ranks", lambda *a: pytest.fail("ranks were started"))
    assert parity.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize("adapter", ["pooling_perceptron", "swiglu_post_norm"])
def test_added_features_take_part_in_the_comparison(adapter: str) -> None:
    """Check that the projection of expert features is not zero, because experts would otherwise have no gradient."""
    projection = build_oracle(tiny_model(adapter=adapter)).audio.stream_projection
    assert projection is not None and projection.weight.abs().min() > 0
