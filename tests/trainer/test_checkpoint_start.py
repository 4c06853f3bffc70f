"""Tests of runs that start from a checkpoint or an export: which weights they read, which parts are new, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.errors import UserError
from tests.tools.exportable import tensors_of, write_run
from tools import export
from trainer.checkpoint import origin as origins
from trainer.checkpoint.layout import PARAM, Shard
from trainer.checkpoint.origin import Origin, is_export, open_origin
from trainer.checkpoint.rect import matrix_of, rects_of_range
from trainer.checkpoint.start import fill_weights
from trainer.parity_cases import tiny_model
from trainer.storage.store import LocalStore

MODEL = tiny_model()
EMBEDDING = "llm.model.embed_tokens.weight"
INITIAL = 7.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return a folder with a run and its export in several files, and the tensors of the run."""
    root = tmp_path_factory.mktemp("start")
    oracle = write_run(root / "run")
    assert export.main([str(root / "run"), str(root / "out"), "--dtype", "fp32", "--shard-gib", "3e-5"]) == 0
    return root, tensors_of(oracle)


def shards_of(tensors: dict[str, Tensor]) -> list[Shard]:
    """Return the slices of all tensors on three ranks, filled with `INITIAL`."""
    shards = []
    for name, tensor in tensors.items():
        whole = matrix_of(tuple(tensor.shape))
        for rank in range(3):
            start, stop = (tensor.numel() * n // 3 for n in (rank, rank + 1))
            for _, rect in rects_of_range(whole, start, stop):
                values = torch.full((rect.rows, rect.cols), INITIAL)
                shards.append(Shard(name, tuple(tensor.shape), rect, {PARAM: values}, 0))
    return shards


def check(shards: list[Shard], wanted: dict[str, Tensor]) -> None:
    for shard in shards:
        whole = matrix_of(shard.shape)
        matrix = wanted[shard.name].detach().reshape(whole.rows, whole.cols)
        assert shard.values[PARAM].equal(matrix[shard.rect.within(whole)].float()), (shard.name, shard.rect)


@pytest.mark.parametrize("exported", [False, True])
def test_every_weight_is_used_and_new_parts_are_listed(made: tuple[Path, dict[str, Tensor]], exported: bool) -> None:
    root, tensors = made
    url = str(root / ("out" if exported else "run"))
    assert is_export(url) == exported
    wanted = dict(tensors)
    if exported:  # exports have no CTC head
        wanted |= {n: torch.full_like(t, INITIAL) for n, t in tensors.items() if n.startswith("audio.ctc_head.")}
    rows = torch.full((5, tensors[EMBEDDING].shape[1]), INITIAL)
    wanted[EMBEDDING] = torch.cat([tensors[EMBEDDING].detach(), rows])
    shards = shards_of(wanted)
    new = fill_weights(open_origin(url, exported), shards, MODEL)
    assert set(new) == {"5 rows of model.embed_tokens.weight", *(["the head of the loss ctc"] if exported else [])}
    check(shards, wanted)


def test_experts_that_an_export_stores_together_are_read_separately(tmp_path: Path) -> None:
    """Check GPT-OSS. Its exports have transformers' joined tensors, from which a run reads the experts' matrices."""
    tensors = tensors_of(write_run(tmp_path / "run", model=tiny_model("gpt_oss", num_layers=2)))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["llm.model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 32, 2 * 48)
    assert not any(".experts.0." in name for name in stored if name.startswith("llm."))
    wanted = {name: tensor for name, tensor in tensors.items() if not name.startswith("audio.ctc_head.")}
    shards = shards_of(wanted)
    assert fill_weights(open_origin(str(tmp_path / "out"), True), shards, tiny_model("gpt_oss", num_layers=2)) == ()
    check(shards, wanted)


def test_mismatch_is_named_with_the_recipe_key(made: tuple[Path, dict[str, Tensor]]) -> None:
    root, tensors = made
    origin: Origin = open_origin(str(root / "out"), exported=True)
    for name, key in (
        (EMBEDDING, "model.llm"),
        ("audio.projector.weight", "model.adapter or model.llm"),
        (next(n for n in tensors if n.startswith("audio.primary.")), "model.primary"),
        (next(n for n in tensors if n.startswith("audio.experts.")), "model.experts"),
    ):
        other = {name: torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)}
        with pytest.raises(UserError, match=rf"out: {name} has shape .*, but this run needs .*; set {key} as it was"):
            fill_weights(origin, shards_of(other), MODEL)
    fewer = {EMBEDDING: tensors[EMBEDDING][:-1]}
    with pytest.raises(UserError, match="set model.llm as it was"):
        fill_weights(origin, shards_of(fewer), MODEL)
    with pytest.raises(UserError, match="holds no audio.adapter.other; set model.adapter as it was"):
        fill_weights(origin, shards_of({"audio.adapter.other": torch.zeros(3)}), MODEL)


def test_an_encoder_is_added_to_an_export(made: tuple[Path, dict[str, Tensor]]) -> None:
    root, tensors = made
    model = replace(MODEL, experts=(*MODEL.experts, replace(MODEL.experts[0], name="another")))
    name = "audio.router.independent.logits"
    old = tensors[name].detach()
    wanted = {name: torch.cat([old, old.mean(0, keepdim=True)]), "audio.experts.another.x": torch.full((4,), INITIAL)}
    shards = shards_of(wanted)
    assert fill_weights(open_origin(str(root / "out"), True), shards, model) == ("encoder another",)
    check(shards, wanted)


def test_encoders_and_a_router_are_added_to_a_model_without_them(tmp_path: Path) -> None:
    plain = replace(MODEL, experts=())
    before = tensors_of(write_run(tmp_path / "run", model=plain))
    origin = open_origin(str(tmp_path / "run"), exported=False)
    more = replace(MODEL, router=replace(MODEL.router, join="add"))
    new = {name: torch.full((4, 3), INITIAL) for name in ("audio.router.dependent.weight", "audio.experts.hubert.x")}
    new["audio.stream_projection.weight"] = torch.full((4, 3), INITIAL)
    shards = shards_of({**before, **new})
    names = [f"encoder {e.name}" for e in MODEL.experts]
    assert fill_weights(origin, shards, more) == (*names, "the router")
    check(shards, {**before, **new})
    name = next(name for name in before if name.startswith("audio.adapter."))
    with pytest.raises(UserError, match="set model.router.join: add, if encoders were added, or model.adapter as it"):
        fill_weights(origin, shards_of({name: torch.zeros(3, 3)}), MODEL)


def test_an_export_is_read_from_a_bucket(made: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    root, tensors = made
    monkeypatch.setattr(
        origins, "open_store", lambda url: LocalStore(root / url.removeprefix("s3://bucket").strip("/"))
    )
    assert is_export("s3://bucket/out") and not is_export("s3://bucket/run")
    wanted = {n: t for n, t in tensors.items() if not n.startswith("audio.ctc_head.")}
    shards = shards_of(wanted)
    assert fill_weights(open_origin("s3://bucket/out", True), shards, MODEL) == ()
    check(shards, wanted)


def test_another_kind_of_folder_is_a_one_line_error(made: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    assert export.main([str(made[0] / "run"), str(tmp_path / "llm"), "--llm-only"]) == 0
    with pytest.raises(
        UserError,
        match="does not train.*, and name the weights of an LLM without encoders in model.llm.weights",
    ):
        open_origin(str(tmp_path / "llm"), exported=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_origin(str(tmp_path), exported=False)
