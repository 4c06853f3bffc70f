from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from model.llm.names import hf_shapes
from trainer.__main__ import main
from trainer.config.checks import known_llm_config
from trainer.config.load import load_recipe
from trainer.dry_run import audio_sizes, describe, llm_stage_shapes


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a dry run reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_70b_on_a_laptop(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mowe_70b", "--dry-run", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "128 ranks = TP 8 x PP 4 x DP 4" in out
    rows = {tuple(line.split()) for line in out.splitlines()}
    assert ("3", "24-31", "56-63", "88-95", "120-127") in rows
    assert ("llm", "70.55", "B", "70.55", "B") in rows  # meta-llama/Meta-Llama-3-70B: 70,553,706,496
    assert not torch.distributed.is_initialized()


def num_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_llama_3_70b_has_its_published_size() -> None:
    hf_config = known_llm_config(load_recipe("mowe_70b").model.llm)
    assert hf_config is not None
    assert num_parameters(hf_shapes(hf_config)) == 70_553_706_496


@pytest.mark.parametrize("name", ["mowe_70b", "kit_cpu", "debug"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_stages_hold_the_llm_between_them(name: str, tp: int, pp: int) -> None:
    hf_config = known_llm_config(load_recipe(name).model.llm)
    assert hf_config is not None
    whole = hf_shapes(hf_config)
    stages = [llm_stage_shapes(hf_config, tp, pp, stage) for stage in range(pp)]
    assert {n for stage in stages for n in stage} == set(whole)
    twice = num_parameters({"": whole["model.embed_tokens.weight"]}) if pp > 1 and hf_config.tie_word_embeddings else 0
    norms = sum(math.prod(s) for stage in stages for n, s in stage.items() if "norm" in n)
    held = sum(map(num_parameters, stages))
    assert (held - norms) * tp + norms == num_parameters(whole) + twice


def test_a_frozen_part_is_not_learned_and_takes_no_optimizer_state() -> None:
    recipe = load_recipe("debug", ["optim.parts=[{pattern: 'audio.primary.*', frozen: true}]"])
    hf_config = known_llm_config(recipe.model.llm)
    assert hf_config is not None
    sizes = audio_sizes(recipe, hf_config)
    assert all((size.learned == 0) == name.startswith("audio.primary.") for name, size in sizes.items())
    assert "audio states" in describe(recipe)


def test_an_idle_pattern_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.parts\[0\]\.pattern = audio\.primry\.\*: matches no parameter"):
        describe(load_recipe("debug", ["optim.parts=[{pattern: 'audio.primry.*', lr: 1}]"]))


def test_a_hub_id_without_sizes_is_refused() -> None:
    overrides = ["model.experts.0.weights=facebook/hubert-base-ls960", "model.experts.0.config={}"]
    with pytest.raises(
        UserError, match=r"model\.experts\[0\]\.weights = facebook/hubert-base-ls960: a dry run does not"
    ):
        describe(load_recipe("debug", overrides))


def test_a_local_checkpoint_needs_no_sizes_in_the_recipe(tmp_path: Path) -> None:
    from transformers import HubertConfig, Wav2Vec2FeatureExtractor

    expected = load_recipe("debug")
    HubertConfig(**expected.model.experts[0].config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    recipe = load_recipe("debug", [f"model.experts.0.weights={tmp_path}", "model.experts.0.config={}"])
    assert describe(recipe) == describe(expected)
