"""Tests of the load of encoder experts: sums over clips and ranks, metrics, and the history on disk."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch, Sample
from model.errors import UserError
from model.router import Routing
from trainer.telemetry.expert_load import ALL, BANDS, UNNAMED, ClipGroup, ExpertLoad, add_up, group_of, load_metrics
from trainer.telemetry.load_history import (
    HISTORY_NAME,
    MAX_SOURCES,
    OTHER_SOURCES,
    LoadInterval,
    LoadMeter,
    RankLoad,
    interval_metrics,
    read_history,
)
from trainer.telemetry.metrics import StepReport
from trainer.training.hooks import LoadHook

ASR = ClipGroup("asr", "en", "radio", "1-2 s")
ER = ClipGroup("er", UNNAMED, "stage", "2-5 s")


def routing(*rows: tuple[list[float], list[float]]) -> Routing:
    """Return the routing of clips with these probabilities. Each of two gates chooses its most probable expert."""
    probs = torch.tensor(rows, dtype=torch.float64)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.argmax(-1, keepdim=True), True)
    return Routing(probs, chosen, ("data_independent", "data_dependent"))


def three_clips() -> ExpertLoad:
    # The experts of the clips are {0, 1}, {0} and {0, 1}.
    routed = routing(([0.6, 0.4], [0.1, 0.9]), ([0.6, 0.4], [0.8, 0.2]), ([0.6, 0.4], [0.0, 1.0]))
    return ExpertLoad.of(routed, [ASR, ASR, ER], [1.5, 1.0, 4.0], ["hubert", "wavlm"])


def entropy(*probs: float) -> float:
    return -sum(p * math.log(p) for p in probs if p)


def test_a_routing_becomes_sums_per_group() -> None:
    load = three_clips()
    asr = load.cells[ASR]
    assert (asr.num_clips, asr.audio_sec) == (2, 2.5)
    assert asr.routed_clips.tolist() == [2, 1] and asr.routed_sec.tolist() == [2.5, 1.5]
    assert asr.clip_share.tolist() == [1.0, 0.5] and asr.audio_share.tolist() == [1.0, 0.6]
    assert asr.mean_weight == pytest.approx(np.array([[0.6, 0.0], [0.4, 0.45]]))
    assert asr.mean_entropy == pytest.approx([entropy(0.6, 0.4), (entropy(0.1, 0.9) + entropy(0.8, 0.2)) / 2])
    assert asr.entropy_of_mean == pytest.approx([entropy(0.6, 0.4), entropy(0.45, 0.55)])
    assert load.cells[ER].mean_entropy[1] == 0.0  # a probability of 0 adds nothing instead of NaN
    assert load.total().clip_share == pytest.approx([1.0, 2 / 3])
    assert list(load.by_task()) == [ALL, "asr", "er"] and load.by_task()["er"].num_clips == 1


def test_parts_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(40, 2, 3, generator=generator).softmax(-1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.topk(2).indices, True)
    groups = [(ASR, ER)[i % 2] for i in range(40)]
    seconds = torch.rand(40, generator=generator).tolist()

    def load(rows: slice) -> ExpertLoad:
        part = Routing(probs[rows], chosen[rows], ("data_independent", "data_dependent"))
        return ExpertLoad.of(part, groups[rows], seconds[rows], "abc")

    whole = load(slice(0, 40))
    joined = add_up(load(slice(i, i + 7)) for i in range(0, 40, 7))
    assert joined.cells.keys() == whole.cells.keys()
    for group, cell in whole.cells.items():
        assert joined.cells[group].num_clips == cell.num_clips == 20
        for name in ("entropy", "probs", "weights", "routed_clips", "routed_sec"):
            assert getattr(joined.cells[group], name) == pytest.approx(getattr(cell, name)), name
    assert add_up([]).cells == {} and (add_up([]) + whole) == whole


def test_loads_with_added_experts_are_summed_by_name() -> None:
    grown = ExpertLoad.of(routing(([0.2, 0.3, 0.5], [0.2, 0.7, 0.1])), [ASR], [1.0], ["wavlm", "hubert", "tiny"])
    both = three_clips() + grown
    assert both.experts == ("hubert", "wavlm", "tiny")
    assert both.cells[ASR].num_clips == 3 and both.cells[ASR].routed_clips.tolist() == [3, 1, 1]
    assert both.cells[ASR].weights[1] == pytest.approx([0.8 + 0.7, 0.9, 0.0])
    assert both.cells[ER].routed_clips.tolist() == [1, 1, 0]


def test_clips_of_a_model_without_experts_are_counted() -> None:
    load = ExpertLoad.of(None, [ASR, ASR], [1.0, 2.0], [])
    assert load.total().num_clips == 2 and load.total().audio_sec == 3.0 and load_metrics(load) == {}


def test_json_round_trip_and_refusal_of_other_json() -> None:
    load = three_clips()
    again = ExpertLoad.from_json(json.loads(json.dumps(load.to_json())))
    assert again.to_json() == load.to_json() and again.gates == load.gates
    tree = load.to_json()
    tree["experts"].append("one more")
    with pytest.raises(ValueError):
        ExpertLoad.from_json(tree)


@pytest.mark.parametrize(
    ("seconds", "band"), [(0.0, "0-1 s"), (0.999, "0-1 s"), (1.0, "1-2 s"), (29.9, "20-30 s"), (30.0, "30+ s")]
)
def test_a_clip_belongs_to_the_band_it_reaches(seconds: float, band: str) -> None:
    group = group_of("er", {"language": None, "source": "x"}, seconds)
    assert group == ClipGroup("er", UNNAMED, "x", band) and band in BANDS


def test_metrics_of_the_routing() -> None:
    metrics = load_metrics(three_clips())
    assert metrics["routing/num_dead"] == 0
    assert metrics["routing/all/wavlm/clip_share"] == pytest.approx(2 / 3)
    assert metrics["routing/asr/wavlm/audio_share"] == pytest.approx(0.6)
    assert metrics["routing/asr/wavlm/weight_data_dependent"] == pytest.approx(0.45)
    assert metrics["routing/er/entropy_data_independent"] == pytest.approx(entropy(0.6, 0.4))
    assert metrics["routing/asr/entropy_of_mean_data_dependent"] == pytest.approx(entropy(0.45, 0.55))
    lonely = ExpertLoad.of(routing(([0.6, 0.4], [0.9, 0.1])), [ASR], [1.0], ["hubert", "wavlm"])
    assert load_metrics(lonely)["routing/num_dead"] == 1


def sample(seconds: float, source: str) -> Sample:
    none = torch.zeros(0, dtype=torch.int64)
    clips = (torch.zeros(round(seconds * 16000)),) if seconds else ()
    meta = {"language": "en", "source": source}
    return Sample(source, "asr" if seconds else "text", clips, none, none.bool(), none, none, meta=meta)


def interval(step: int = 4) -> LoadInterval:
    """Return an interval of two steps on two ranks. The second rank has no clips of its own."""
    meter = LoadMeter(["hubert", "wavlm"], "whisper")
    meter.add_clips(Batch((sample(0, "x"), sample(1.5, "radio"))), routing(([0.6, 0.4], [0.1, 0.9])))
    meter.add_step({"whisper": (2.0, 0.5, 10, 20), "hubert": (1.0, 0.0, 0, 0)}, 5.0)
    meter.add_clips(Batch((sample(2.5, "radio"),)), routing(([0.6, 0.4], [0.8, 0.2])))
    meter.add_step({"whisper": (1.0, 0.0, 0, 0), "hubert": (1.0, 0.0, 0, 0), "wavlm": (2.0, 0.0, 0, 0)}, 4.0)
    nobody = Routing(torch.zeros(0, 2, 2), torch.zeros(0, 2, 2).bool(), ("data_independent", "data_dependent"))
    idle = LoadMeter(["hubert", "wavlm"], "whisper")
    for _ in range(2):
        idle.add_clips(Batch(()), nobody)
        idle.add_step({"whisper": (1.5, 0.0, 5, 0), "wavlm": (2.0, 0.25, 0, 0)}, 5.0)
    return meter.merge(step, [meter.take(), idle.take()])


def test_parts_of_ranks_become_an_interval() -> None:
    found = interval()
    assert (found.step, found.num_steps, found.step_sec) == (4, 2, 9.0)
    assert found.load.total().num_clips == 2 and found.load.total().audio_sec == 4.0
    costs = found.costs
    assert costs.encoders == ("whisper", "hubert", "wavlm") and costs.num_ranks == 2
    assert costs.compute_sec.tolist() == [[3.0, 3.0], [2.0, 0.0], [2.0, 4.0]]
    assert costs.wait_sec.tolist() == [[0.5, 0.0], [0.0, 0.0], [0.0, 0.5]]
    assert costs.sent_bytes.tolist() == [20, 0, 0] and costs.received_bytes.tolist() == [20, 0, 0]
    # The slowest ranks take max(2, 1.5) s for the primary encoder and max(1, 2) s for experts in step 1, and then
    # max(1, 1.5) s and max(3, 2) s in step 2.
    assert costs.slowest_sec == 4.0 + 4.5
    assert costs.imbalance == pytest.approx(8.5 / 7.0)


def test_metrics_of_an_interval() -> None:
    metrics = interval_metrics(interval())
    assert metrics["encoders/whisper/compute_sec"] == pytest.approx(1.5)
    assert metrics["encoders/whisper/wait_sec"] == pytest.approx(0.125)
    assert metrics["encoders/whisper/sent_bytes"] == 10 and metrics["encoders/wavlm/received_bytes"] == 0
    assert metrics["encoders/imbalance"] == pytest.approx(8.5 / 7.0)
    assert metrics["routing/asr/hubert/clip_share"] == 1.0


def test_take_resets_the_meter() -> None:
    meter = LoadMeter(["hubert"], None)
    meter.add_step({}, 1.0)
    assert meter.take().costs.shape == (1, 1, 4)
    empty = meter.take()
    assert empty.costs.shape == (0, 1, 4) and not empty.load.cells and empty.step_sec == 0
    merged = meter.merge(3, [empty, RankLoad(empty.load, empty.costs, 0.0)])
    assert merged.costs.imbalance == 1.0 and merged.num_steps == 0


def test_many_sources_do_not_fill_the_disk() -> None:
    meter = LoadMeter([], "whisper")
    for i in range(MAX_SOURCES + 9):
        meter.add_clips(Batch((sample(1.5, f"url-{i}"),)), None)
    load = meter.take().load
    assert len(load.cells) == MAX_SOURCES + 1 and load.total().num_clips == MAX_SOURCES + 9
    assert load.total(lambda g: g.source == OTHER_SOURCES).num_clips == 9


def test_the_history_is_kept_and_resumes(tmp_path: Path) -> None:
    hook = LoadHook(tmp_path, 0)
    for step in (2, 4, 6):
        hook.on_step(StepReport(step - 1, 1.0))
        hook.on_step(StepReport(step, 1.0, load=interval(step)))
    with (tmp_path / HISTORY_NAME).open("a") as file:
        file.write('{"step": 8, "num')  # an interrupted write
    assert [i.step for i in read_history(tmp_path / HISTORY_NAME)] == [2, 4, 6]
    resumed = LoadHook(tmp_path, 4)
    resumed.on_step(StepReport(6, 1.0, load=interval(6)))
    resumed.on_end({})
    history = read_history(tmp_path / HISTORY_NAME)
    assert [i.step for i in history] == [2, 4, 6]
    total = history[0] + history[1] + history[2]
    assert total.load.total().num_clips == 6 and total.costs.slowest_sec == pytest.approx(3 * 8.5)
    assert total.num_steps == 6 and total.step_sec == 27.0


def test_history_survives_a_full_disk(tmp_path: Path) -> None:
    hook = LoadHook(tmp_path, 0)
    hook.on_step(StepReport(2, 1.0, load=interval(2)))
    whole = (tmp_path / HISTORY_NAME).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 20, limits[1]))  # leaves space for a part of a line
        hook.on_step(StepReport(4, 1.0, load=interval(4)))
        assert (tmp_path / HISTORY_NAME).stat().st_size == whole
        with pytest.raises(OSError, match="too large"):
            hook.on_end({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    hook.on_step(StepReport(6, 1.0, load=interval(6)))
    hook.on_end({})
    assert [i.step for i in read_history(tmp_path / HISTORY_NAME)] == [2, 4, 6]


def test_a_foreign_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / HISTORY_NAME
    with pytest.raises(UserError, match="no routing history"):
        read_history(path)
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_history(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"expert_load\.jsonl line 1: is not a routing record"):
        read_history(path)
    other = interval().to_json() | {"gates": ["other", "names"]}
    path.write_text(json.dumps(interval().to_json()) + "\n" + json.dumps(other) + "\n")
    with pytest.raises(UserError, match="line 2: the gates"):
        read_history(path)
