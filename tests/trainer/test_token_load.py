"""Tests of the load of FFN experts in the LLM's layers: sums, shares, files and limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch

from model.errors import UserError
from model.llm.experts import choose
from model.llm.mixture import Mixture
from tests.trainer.data_corpus import row
from tests.trainer.expert_usage_run import write_run
from tools import profile_experts
from trainer.data.prepare import PreparedData
from trainer.data.shard_writer import Groups
from trainer.engine.router_meter import TokenMeter
from trainer.expert_usage.tokens import TokenProfile
from trainer.telemetry.token_history import HISTORY_NAME, MIN_LINES, TokenHistory, read_history
from trainer.telemetry.token_load import (
    MAX_KINDS,
    OTHER,
    UNNAMED,
    SampleKinds,
    TokenGroup,
    TokenLoad,
    add_up,
    token_metrics,
)

EXPERTS, LAYERS = ("speech", "sound", "text"), (1, 3)
KINDS = SampleKinds((("asr", "en"), ("sqa", "en"), ("asr", "pl")))


def load(step: int, chosen: dict[tuple[int, int], list[int]]) -> TokenLoad:
    """Return the load of two steps. `chosen` has, by (kind, modality), how often each expert was chosen per layer."""
    sums = np.zeros((len(KINDS.pairs) * 2, len(LAYERS), 2 + 3 * len(EXPERTS)))
    for (kind, modality), counts in chosen.items():
        tokens = sum(counts) / 2
        row = [tokens, 0.5 * tokens, *counts, *(c / 2 for c in counts), *(c / 2 for c in counts)]
        sums[2 * kind + modality] = row
    return TokenLoad.of(step, 2, EXPERTS, LAYERS, KINDS, sums)


def test_shares_sum_to_one_for_every_layer_task_and_modality() -> None:
    found = load(2, {(0, 0): [0, 2, 8], (0, 1): [30, 10, 0], (1, 1): [5, 5, 0]})
    groups = {TokenGroup("asr", "text", "en"), TokenGroup("asr", "audio", "en"), TokenGroup("sqa", "audio", "en")}
    assert set(found.cells) == groups
    for cell in found.cells.values():
        np.testing.assert_allclose(cell.share.sum(-1), 1)
    audio = found.total(modality="audio")
    assert audio is not None and audio.chosen.tolist() == [[35, 15, 0]] * 2
    assert found.total(task="sqa", modality="text") is None
    assert found.dead == () and found.overload == pytest.approx(3 * 35 / 60)
    metrics = token_metrics(found)
    assert metrics["ffn_expert/asr/audio/speech/share"] == 0.75 and metrics["ffn_expert/num_dead"] == 0
    assert metrics["ffn_expert/asr/audio/speech/weight"] == pytest.approx(15 / 20)


def test_loads_are_added_and_survive_a_file(tmp_path: Path) -> None:
    loads = [load(2, {(0, 1): [6, 2, 0]}), load(4, {(0, 1): [2, 6, 0], (1, 0): [2, 2, 0]})]
    (tmp_path / HISTORY_NAME).write_text("".join(json.dumps(one.to_json()) + "\n" for one in loads))
    both = add_up(read_history(tmp_path / HISTORY_NAME))
    assert (both.step, both.num_steps) == (4, 4) and both.dead == ("1/text", "3/text")
    assert both.cells[TokenGroup("asr", "audio", "en")].chosen.tolist() == [[8, 8, 0]] * 2
    assert read_history(tmp_path / "none.jsonl") == []
    (tmp_path / HISTORY_NAME).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"line 1: is not a record of the load of experts .*restore the file"):
        read_history(tmp_path / HISTORY_NAME)


def test_a_long_history_is_merged_without_losing_tokens(tmp_path: Path) -> None:
    path = tmp_path / HISTORY_NAME
    history = TokenHistory(path, 0, max_bytes=20_000)
    loads = [load(2 * n, {(0, 1): [n, 2, 0], (1, n % 2): [1, 1, 2]}) for n in range(1, 301)]
    for one in loads:
        history.saved_step = one.step // 101 * 101
        history.append(one.to_json())
        assert path.stat().st_size < 30_000
    found = read_history(path)
    assert MIN_LINES // 2 < len(found) < 100 and found[-1].num_steps == 2 and found[0].num_steps > 2
    assert add_up(found).to_json() == add_up(loads).to_json()
    assert [a.step for a in found[:-1]] == [b.step - b.num_steps for b in found[1:]]
    history.close()
    TokenHistory(path, 505).close()  # after a resume from the newest checkpoint, every token is still counted
    assert add_up(read_history(path)).to_json() == add_up(loads[:252]).to_json()


def test_null_experts_are_counted_together_and_are_not_dead() -> None:
    mixture = Mixture(("speech", "text"), 2, 8, (1,), normalize=True, num_null=2)
    meter = TokenMeter(mixture, 2, torch.device("cpu"))
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.05, 0.45, 0.4], [0.5, 0.1, 0.3, 0.1]]).log()
    meter.add(1, choose(logits, mixture), torch.tensor([0, 1, 1]))
    meter.num_steps = 1
    with patch("torch.distributed.all_reduce"):
        num_steps, sums = meter.take(cast(Any, SimpleNamespace(world=None)))
    found = TokenLoad.of(1, num_steps, meter.names, mixture.layers, SampleKinds((("asr", "en"),)), sums)
    assert found.experts == ("speech", "text", "null")
    total = found.total()
    assert total is not None
    assert total.chosen.tolist() == [[2, 0, 4]] and total.first.tolist() == [[2, 0, 1]]
    np.testing.assert_allclose(total.weights, [[2, 0, 0]])
    assert found.dead == ("1/text",) and found.overload == 2.0
    assert token_metrics(found)["ffn_expert/asr/audio/null/share"] == 0.75


def test_drift_compares_quarters_of_the_steps() -> None:
    early, late = load(2, {(0, 1): [4, 0, 0]}), [load(n, {(0, 1): [0, 4, 0]}) for n in (12, 14, 16)]
    middle = replace(load(10, {(0, 1): [4, 0, 0]}), num_steps=8)  # eight steps were merged into one line
    assert TokenProfile("run", (early, middle, *late)).drift == {"audio": 1.0}


def test_languages_are_counted_where_there_are_several() -> None:
    found = load(2, {(0, 0): [0, 2, 8], (0, 1): [30, 10, 0], (2, 1): [0, 0, 10]})
    assert found.totals("task", "modality")["asr", "audio"].chosen.tolist() == [[30, 10, 10]] * 2
    assert list(found.totals("language")) == [("en",), ("pl",)]
    polish = found.total(modality="audio", language="pl")
    assert polish is not None and polish.chosen.tolist() == [[0, 0, 10]] * 2
    metrics = token_metrics(found)
    assert metrics["ffn_expert/asr/audio/speech/share"] == 0.6
    assert metrics["ffn_expert/language/en/audio/speech/share"] == 0.75
    assert metrics["ffn_expert/language/pl/audio/text/share"] == 1.0
    assert not any("language" in name for name in token_metrics(load(2, {(0, 0): [0, 2, 8]})))
    tree = found.to_json()
    assert {cell.pop("language") for cell in tree["cells"]} == {"en", "pl"}
    tree["cells"] = tree["cells"][:2]  # earlier versions did not count languages
    assert {group.language for group in TokenLoad.from_json(tree).cells} == {UNNAMED}


def test_the_most_frequent_languages_are_counted_separately() -> None:
    counts = {("asr", f"l{i:02d}"): 100 - i for i in range(MAX_KINDS + 5)} | {("sqa", ""): 1000}
    kinds = SampleKinds.of(("asr", "sqa"), counts)
    assert len(kinds.pairs) == MAX_KINDS + 2
    assert kinds == SampleKinds.of(("asr", "sqa"), dict(reversed(counts.items())))
    assert kinds.pairs[kinds.place("sqa", None)] == ("sqa", UNNAMED)
    assert kinds.pairs[kinds.place("asr", "l00")] == ("asr", "l00")
    assert kinds.pairs[kinds.place("asr", f"l{MAX_KINDS:02d}")] == ("asr", OTHER)
    assert kinds.pairs[kinds.place("sqa", "en")] == ("sqa", OTHER)


def test_the_profile_shows_the_experts_of_the_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    chosen = {(0, 1): [8, 2, 0], (2, 1): [8, 2, 0], (0, 0): [0, 2, 18]}
    loads = [load(100, chosen), load(200, chosen)]
    (run / HISTORY_NAME).write_text("".join(json.dumps(one.to_json()) + "\n" for one in loads))
    assert profile_experts.main([str(run), "--fail-on", "overload=2.0"]) == 0
    shown = capsys.readouterr().out
    assert "share of the choices of each task and modality" in shown and "speech" in shown
    assert "share of the choices of each language and modality" in shown and "pl" in shown
    assert {p.name for p in (run / "profile").glob("ffn*")} == {"ffn_experts.json", "ffn-experts-asr.png"}
    tree = json.loads((run / "profile" / "ffn_experts.json").read_text())
    assert tree["groups"]["asr/audio"]["share"][0] == [0.8, 0.2, 0.0]
    assert [cell["language"] for cell in tree["cells"]] == ["en", "pl", "en"]
    assert tree["mix"][1][0] == [1.0, 0.666667, 0.0] and tree["drift"] == {"text": 0.0, "audio": 0.0}
    assert profile_experts.main([str(run), "--fail-on", "overload=1.1"]) == 1
    assert "overload 1.350 > 1.1" in capsys.readouterr().err


def test_a_limit_for_experts_needs_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_experts.main([str(write_run(tmp_path)), "--fail-on", "overload=2"]) == 2
    assert "the LLM of the run has no experts; remove this limit" in capsys.readouterr().err


def test_a_language_that_is_null_is_none() -> None:
    groups = Groups()
    for number, language in enumerate(("en", None, "")):
        groups.entry(str(number), {**row(str(number)), "language": language}, 1.0, "0" * 16, ())
    index = SimpleNamespace(groups=groups.lines())
    config = SimpleNamespace(split="train", tasks=(), subsets=())
    data = SimpleNamespace(datasets=(SimpleNamespace(config=config, shards={"train": ("", index)}),))
    assert PreparedData.num_by_language(cast(PreparedData, data)) == {("asr", "en"): 1, ("asr", ""): 2}
