"""Tests that signals are recorded once, and that a save that takes too long is reported."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from trainer.run.lifecycle import StopRequest, deadline


def test_repeated_signals_do_not_end_the_process() -> None:
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first SIGINT, after Slurm's warning
        assert stop.signal == signal.SIGUSR1 and abs(time.monotonic() - stop.time_sec) < 5


def test_a_second_interrupt_is_obeyed_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest().listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_deadline_counts_from_the_signal() -> None:
    late = threading.Event()
    with deadline(0.3, time.monotonic() - 0.2, late.set):
        assert late.wait(5.0)
    late.clear()
    with deadline(0.1, time.monotonic(), late.set):
        pass
    assert not late.wait(0.3)
