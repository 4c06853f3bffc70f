"""Tests that `bench.gpu_check` completes on a CPU with small shapes, and that its real shapes are realistic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_models import FAMILIES, REAL, audio_sample, text_sample
from model.encoders.registry import encoder_flops
from model.lengths import TokenRate, num_samples

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_parts_run_on_a_cpu() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu_check", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["passed"] and len(found["goals"]) == 3 * len(FAMILIES) and found["shapes"] == "SMALL"
    parts = {"llm_layer", "step"} | {f"{kind}" for f in FAMILIES for kind in (f"parity_{f}", f"{f}_layer")}
    assert set(found["seconds"]) == parts
    assert found["llm_layer"]["planned_bytes"] > 0 and found["step"]["num_kernels"] > 100


def test_real_shapes_are_those_of_published_models() -> None:
    # A layer takes 24 h² FLOPs per frame, plus attention. Whisper-large-v3's 32 layers take about 2 TFLOP for 30 s.
    per_layer = encoder_flops(REAL.encoder("whisper", 2), num_samples(30)) - encoder_flops(
        REAL.encoder("whisper", 1), num_samples(30)
    )
    assert 0.055e12 < per_layer < 0.085e12
    sample = audio_sample(REAL, 1, TokenRate((2, 2)))
    assert sample.audio_mask.sum() > 300 and sample.num_targets == 13
    assert text_sample(0, 64).num_targets == 33
