"""Tests of the reported encoder load, compared with the routing in a single process, and of the trace of phases."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from model.batch import Batch
from model.lengths import SAMPLE_RATE
from tests.distributed.harness import run_ranks
from trainer import parity, parity_cases
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import Topology
from trainer.parallel.values import gather_values
from trainer.parity_cases import DS_CONFIG
from trainer.telemetry.expert_load import ExpertLoad, group_of
from trainer.telemetry.trace import WAIT, ProfileConfig, Trace

KINDS = ("mixed", "rank_without_audio", "text_only", "fewer_samples_than_ranks", "mixed")
LATE_SEC = 0.2


def expected(oracle: Any, step: Any, number: int, batch: Batch) -> ExpertLoad:
    """Return the load that the whole batch causes in one process."""
    seconds = [n / SAMPLE_RATE for n in batch.clips.lengths]
    owners = [batch.samples[i] for i in batch.clip_owner]
    groups = [group_of(s.task, s.meta, sec) for s, sec in zip(owners, seconds, strict=True)]
    audio = oracle.embed_audio(batch, step.router_noise(number, batch))
    routing = None if audio is None else audio.routing
    return ExpertLoad.of(routing, groups, seconds, list(oracle.audio.experts))


def body(folder: str) -> list[dict[str, Any]]:
    rank, world, device = connect()
    groups = build_groups(Topology(world, 1, 1), rank, device, parity_cases.SEED)
    model = parity_cases.tiny_model()
    step = parity.build_step(model, groups, DS_CONFIG, len(KINDS))
    oracle = parity.build_oracle(model)
    gather = partial(gather_values, group=groups.world)
    trace = Trace(ProfileConfig("2:4"), step.timer, Path(folder), rank, groups.world, gather)
    rows = []
    for number, kind in enumerate(KINDS):
        samples = parity_cases.make_samples(kind, world, model.adapter.rate, seed=number)
        wanted = expected(oracle, step, number, Batch(tuple(s for one in samples for s in one)))
        trace.begin(number + 1)
        with step.timer("load"):
            time.sleep(LATE_SEC * rank)
        step.forward_backward(
            number, Batch(tuple(samples[rank]))
        )  # no update follows, so that the expected values remain the same
        step.audio.discard()
        costs = step.audio.take_costs()
        step.meter.add_step({name: (c.compute_sec, 0.0, 0.0, 0.0) for name, c in costs.items()}, 0.0)
        load = step.take_load(number + 1)
        trace.end(number + 1, last=False)
        step.timer.take()
        if load is not None:
            found = {"kind": kind, "found": load.load.to_json(), "wanted": wanted.to_json()}
            rows.append(found | {"costs": load.costs.to_json(), "step": load.step})
    return rows


@pytest.mark.timeout(150)
def test_two_ranks_report_what_one_process_routes(tmp_path: Path) -> None:
    rows, others = run_ranks(2, body, {"folder": str(tmp_path)}, timeout_sec=120)
    assert others == [] and [row["kind"] for row in rows] == list(KINDS)
    for row in rows:
        found, wanted = (ExpertLoad.from_json(row[key]).cells for key in ("found", "wanted"))
        assert found.keys() == wanted.keys() and (row["kind"] == "text_only") == (not found)
        for group, load in wanted.items():
            assert found[group].num_clips == load.num_clips
            assert found[group].routed_clips.tolist() == load.routed_clips.tolist()
            for name in ("audio_sec", "entropy", "probs", "weights", "routed_sec"):
                assert getattr(found[group], name) == pytest.approx(getattr(load, name), abs=1e-5), name
        compute = row["costs"]["compute_sec"]
        assert row["costs"]["encoders"] == ["whisper", "hubert", "wavlm", "whisper_tiny"]
        # A rank without clips for an encoder does not call it, so its time may be 0.
        assert [len(ranks) for ranks in compute] == [2, 2, 2, 2] and min(map(min, compute)) >= 0
        assert all(max(ranks) > 0 for ranks in compute) or row["kind"] != "mixed"
    check_trace(tmp_path)


def check_trace(folder: Path) -> None:
    merged = json.loads((folder / "trace.json").read_text())["traceEvents"]
    parts = [json.loads((folder / f"rank{r}.json").read_text())["traceEvents"] for r in range(2)]
    assert merged == parts[0] + parts[1]
    spans = [[e for e in part if e["ph"] == "X"] for part in parts]
    for rank, own in enumerate(spans):
        assert {e["pid"] for e in own} == {rank}
        assert {e["args"]["step"] for e in own} == {2, 3}
        assert {"step 2", "step 3", "load", "plan", "encode", "llm", "backward", WAIT} <= {e["name"] for e in own}
        for i, a in enumerate(own):
            for b in own[:i]:
                first, second = sorted((a, b), key=lambda e: (e["ts"], -e["dur"]))
                end = first["ts"] + first["dur"]
                apart, inside = second["ts"] >= end - 0.01, second["ts"] + second["dur"] <= end + 0.01
                assert apart or inside, (first, second)
    # Rank 1 loads late. The wait of rank 0 ends when this load ends, on the clock that all ranks share.
    for step in (2, 3):
        late = next(e for e in spans[1] if e["name"] == "load" and e["args"]["step"] == step)
        waits = [e for e in spans[0] if e["name"] == WAIT and e["args"]["step"] == step]
        longest = max(waits, key=lambda e: e["dur"])
        assert longest["dur"] == pytest.approx(LATE_SEC * 1e6, rel=0.3)
        assert longest["ts"] + longest["dur"] == pytest.approx(late["ts"] + late["dur"], abs=0.1 * LATE_SEC * 1e6)
