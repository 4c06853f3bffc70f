"""Tests of the calibration of an accelerator's rates, with this machine's CPU as the accelerator."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import calibrate as bench
from trainer.plan.accelerator import KNOWN


def test_a_cpu_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_CPU_SIDES", (32, 64, 128))
    found = bench.calibrate(torch.device("cpu"), torch.float32, KNOWN["h100"], round_sec=0.005)
    assert [at for at, _ in found.matrix] == pytest.approx([32 / 3, 64 / 3, 128 / 3], abs=1e-3)
    shares = [share for _, share in found.matrix]
    assert max(shares) == pytest.approx(1) and all(0 < share <= 1 for share in shares)
    assert 0 < found.attention_efficiency <= 1 and 0 < found.memory_tb_s < 10 and found.kernel_us > 0
    assert (found.memory_gib, found.node_gb_s) == (KNOWN["h100"].memory_gib, KNOWN["h100"].node_gb_s)
    # For the shape of a measured product, the interpolation must return the measured share.
    assert found.matrix_share(64, 64, 64) == pytest.approx(shares[1], rel=1e-3)


def test_measured_rates_may_turn_out_better() -> None:
    device = dataclasses.replace(KNOWN["h100"], matrix=((64.0, 0.5), (256.0, 1.0)), memory_efficiency=1.0)
    better, worse = device.ranging(0.15), device.ranging(-0.15)
    for one, factor in ((better, 1.15), (worse, 0.85)):
        assert one.memory_efficiency == pytest.approx(factor) and one.matrix[1][1] == pytest.approx(factor)
        assert one.kernel_us == pytest.approx(device.kernel_us / factor)
