"""Tests of the places in a step where the host waits for the device, on a pretended device.

The table in docs/gpu.md lists these places. The waits of DeepSpeed and of Megatron's optimizers are not counted.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from bench.gpu_waits import BACKWARD, ROOT, host_waits, site_of
from model.batch import IGNORE, Batch
from tests.distributed.harness import run_ranks
from tests.pretended_device import DEVICE, PretendedDevice
from tests.step_on_device import build_step
from trainer import parity_cases
from trainer.config.evaluation import EvalConfig
from trainer.parallel import exchange, values
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.groups import Groups, build_groups, connect
from trainer.parallel.topology import Topology
from trainer.training.evaluate import answer

STEP_WAITS = {
    "model/router.py:on_host": 1,  # the router's choice, which determines the ranks that encode
    "model/losses/ctc.py:ctc_sum": 1,  # within torch's CTC loss, which moves the lengths itself
    "trainer/training/send.py:send": 1,  # the positions of audio tokens in this rank's packs
    "trainer/training/step.py:report": 1,  # losses
    "trainer/training/step.py:update": 1,  # the gradient norm, which decides about the update
}
"""The waits per step. They do not depend on the number of clips, experts, gates or micro-batches."""
MOST_PER_STEP, MOST_PER_MICROBATCH = 10, 2
FIRST_STEP_WAITS = {"model/encoders/log_mel.py:mel_filters": 1}
"""The waits for constants, which occur only once per process."""
NEW_TOKENS = 4


MOST_COLLECTIVES = 2
"""The largest number of collectives per step in which the hosts of all ranks exchange numbers (docs/scale.md)."""


@contextmanager
def host_collectives() -> Iterator[list[str]]:
    """Return a context manager whose list receives the names of all collectives on CPU tensors or numbers."""
    found: list[str] = []

    def recorded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **options: Any) -> Any:
            if not isinstance(first, torch.Tensor) or first.device.type == "cpu":
                found.append(name)
            return original(first, *args, **options)

        return call

    with ExitStack() as stack:
        places: list[tuple[Any, str]] = [(exchange, "all_gather_numbers"), (exchange, "broadcast_bytes")]
        places += [(values, "gather_bytes"), (values, "broadcast_bytes"), (dist, "all_reduce"), (dist, "broadcast")]
        places += [(dist, "all_gather"), (dist, "all_gather_into_tensor"), (dist, "all_to_all_single")]
        for module, name in places:
            stack.enter_context(patch.object(module, name, recorded(name, getattr(module, name))))
        yield found


def begin() -> tuple[Groups, Any, Batch]:
    """Set up the process groups of a single rank, and return them with the tiny model and its batch."""
    rank, _, device = connect(timeout_sec=60)
    groups = build_groups(Topology(1, 1, 1), rank, device, parity_cases.SEED)
    model = parity_cases.tiny_model()
    return groups, model, Batch(tuple(parity_cases.make_samples("mixed", 1, model.adapter.rate)[0]))


def steps() -> dict[str, Any]:
    """Run two steps on the pretended device and the first one also on the CPU, and return what was recorded."""
    groups, model, batch = begin()
    expected = build_step(model, groups, on_device=False)(0, batch)
    with PretendedDevice() as device:
        step = build_step(model, groups, on_device=True)
        with megatron_calls(DEVICE):
            first = step(0, batch)
            waits = [dict(device.waits)]
            device.waits.clear()
            device.transfers.clear()
            with host_collectives() as collectives:
                step(1, batch)
            waits.append(dict(device.waits))
    return {
        "waits": waits,
        "kinds": [f"{site}: {operation}" for site, operation in device.kinds],
        "transfers": dict(device.transfers),
        "collectives": collectives,
        "found": (first.loss, first.grad_norm, *first.losses.values()),
        "expected": (expected.loss, expected.grad_norm, *expected.losses.values()),
    }


@pytest.mark.timeout(180)
def test_step_waits_at_the_places_in_the_table() -> None:
    (seen,) = run_ranks(1, steps, timeout_sec=160)
    assert seen["found"] == pytest.approx(seen["expected"], rel=1e-5)
    first, second = seen["waits"]
    assert second == STEP_WAITS, seen["kinds"]
    assert first == {**STEP_WAITS, **FIRST_STEP_WAITS}, seen["kinds"]
    assert sum(second.values()) <= MOST_PER_STEP
    assert seen["collectives"] == ["all_gather_numbers"] * MOST_COLLECTIVES
    assert not set(second) & {"trainer/engine/microbatches.py:loss", "model/llm/packing.py:layout"}, (
        "waits per micro-batch"
    )
    # The number of transfers does not depend on the number of experts.
    assert (
        seen["transfers"]["model/mixture.py:mix"] == seen["transfers"]["model/connectors/convolutions.py:forward"] == 1
    )


def test_documented_table_is_current() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert {
        site: int(n) for site, n in re.findall(r"^\| `([^`]+:[^`]+)` \| (\d+) \|", text, re.MULTILINE)
    } == STEP_WAITS


def answers() -> dict[str, Any]:
    """Decode the same prompts on the CPU and on the pretended device."""
    groups, model, batch = begin()
    prompts = []
    for sample in batch.samples:
        length = sample.num_tokens - int((sample.labels != IGNORE).sum()) + 1
        cut = {name: getattr(sample, name)[:length] for name in ("token_ids", "audio_mask", "labels")}
        prompts.append(replace(sample, **cut))
    tokenizer = cast(Any, SimpleNamespace(end_ids=(-1,), vocab_size=parity_cases.VOCAB_SIZE))
    config = EvalConfig(max_new_tokens=NEW_TOKENS)
    plain = build_step(model, groups, on_device=False)
    expected = answer(plain, Batch(tuple(prompts)), tokenizer, config)
    with PretendedDevice() as device:
        step = build_step(model, groups, on_device=True)
        with megatron_calls(DEVICE):
            found = answer(step, Batch(tuple(prompts)), tokenizer, config)
    kinds = [f"{site}: {operation}" for site, operation in device.kinds]
    return {"waits": dict(device.waits), "kinds": kinds, "found": found, "expected": expected}


@pytest.mark.timeout(180)
def test_decoding_waits_once_per_token() -> None:
    (seen,) = run_ranks(1, answers, timeout_sec=160)
    assert seen["found"] == seen["expected"] and all(len(tokens) == NEW_TOKENS for tokens in seen["found"])
    per_token = seen["waits"].pop("trainer/engine/generate.py:_forward")
    assert per_token == NEW_TOKENS
    assert seen["waits"] == {
        "model/router.py:on_host": 1,
        "trainer/training/send.py:send": 1,
        **FIRST_STEP_WAITS,
    }, seen["kinds"]


def test_waits_reported_by_torch_are_counted_by_site() -> None:
    """Check how `bench.gpu_check` counts torch's warnings about waits. The test emits the warnings itself."""
    modes: list[str] = []

    def work() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)

    assert host_waits(work, modes.append) == {BACKWARD: 2}
    assert modes == ["warn", "default"]
    assert site_of(sys._getframe(), excluded=("tests/test_host_syncs.py",)) == BACKWARD
