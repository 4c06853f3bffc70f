"""Tests of the summary that `--dry-run` prints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from model.llm.names import hf_shapes
from trainer.__main__ import main
from trainer.config.llm_checks import known_llm_config
from trainer.config.load import load_recipe
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.dry_run import describe
from trainer.plan.sizes import parameter_sizes, sized_model


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a dry run used the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.slow
def test_70b_on_a_laptop(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mowe_70b", "--dry-run", "--no-data", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "128 ranks = TP 4 x PP 4 x DP 8" in out
    rows = {tuple(line.split()) for line in out.splitlines()}
    assert ("3", *(f"{32 * stage + 12}-{32 * stage + 15}" for stage in range(4))) in rows
    assert ("llm", "70.55", "B", "70.55", "B", "0") in rows  # meta-llama/Meta-Llama-3-70B has 70,553,706,496
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [8, 16])
def test_the_published_mowe(num_ranks: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mowe_published", "--dry-run", "--no-data", f"parallel.num_ranks={num_ranks}"]) == 0
    out = capsys.readouterr().out
    assert f"{num_ranks} ranks = TP 2 x PP 1 x DP {num_ranks // 2}" in out
    rows = {tuple(line.split()) for line in out.splitlines()}
    # The encoder of openai/whisper-large-v2 has 636,784,640 parameters. Its positions are not trained.
    assert ("audio.primary", "636.78", "M", "634.86", "M", "1.92", "M") in rows
    # Adapters of rank 16 on q, k, v and o of 32 layers have
    # 32 * 16 * (3 * 4096 + 1024 + 1024 + 5 * 4096 - 4096) parameters.
    assert ("llm", "8.04", "B", "13.63", "M", "8.03", "B") in rows


@pytest.mark.slow
def test_the_lengths_of_packs_are_printed() -> None:
    found = describe(load_recipe("mowe_70b"))
    assert "an LLM pack up to 10240 tokens, padded to a multiple of 4 (the tensor-parallel ranks)." in found
    found = describe(load_recipe("mowe_70b", ["train.pack_multiple_tokens=1024"]))
    assert "an LLM pack up to 10240 tokens, padded to a multiple of 1024, which gives 10 different lengths." in found


def test_the_reproducibility_of_a_resumed_run_is_printed() -> None:
    found = describe(load_recipe("debug"))
    assert (
        "train.deterministic = false: a resumed run is bit-identical on CPUs and equal up to rounding on CUDA." in found
    )
    found = describe(load_recipe("debug", ["train.deterministic=true"]))
    assert "train.deterministic = true: a resumed run is bit-identical on CPUs, and on CUDA for" in found


def num_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_llama_3_70b_has_its_published_size() -> None:
    hf_config = known_llm_config(load_recipe("mowe_70b").model.llm)
    assert hf_config is not None
    assert num_parameters(hf_shapes(hf_config)) == 70_553_706_496


def test_frozen_part_is_not_trained_and_has_no_optimizer_state() -> None:
    recipe = load_recipe("debug", ["optim.parts=[{pattern: 'audio.primary.*', frozen: true}]"])
    sizes = parameter_sizes(sized_model(recipe), recipe.optim)
    assert all((size.learned == 0) == name.startswith("audio.primary.") for name, size in sizes.items())
    assert "audio states" in describe(recipe)


def test_an_idle_pattern_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.parts\[0\]\.pattern = audio\.primry\.\*: matches no parameter"):
        describe(load_recipe("debug", ["optim.parts=[{pattern: 'audio.primry.*', lr: 1}]"]))


def test_a_hub_id_without_sizes_is_refused() -> None:
    overrides = ["model.experts.0.weights=facebook/hubert-base-ls960", "model.experts.0.config={}"]
    with pytest.raises(UserError, match=r"model\.experts\[0\]\.weights = facebook/hubert-base-ls960: a plan does not"):
        describe(load_recipe("debug", overrides))


def test_a_local_checkpoint_needs_no_sizes_in_the_recipe(tmp_path: Path) -> None:
    from transformers import HubertConfig, Wav2Vec2FeatureExtractor

    expected = load_recipe("debug")
    HubertConfig(**expected.model.experts[0].config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    recipe = load_recipe("debug", [f"model.experts.0.weights={tmp_path}", "model.experts.0.config={}"])
    assert describe(recipe) == describe(expected)


def test_tokenizer_is_checked_if_it_is_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_sentencepiece(["some words of text"] * 9, 40, tmp_path / "t.model", "<other>")
    arguments = ["debug", "--dry-run", "--no-data", "--verbose", f"data.tokenizer.path={tmp_path / 't.model'}"]
    assert main(arguments) == 2
    assert "<SpeechHere>" in capsys.readouterr().err
    assert main([*arguments, "data.tokenizer.placeholder=<other>"]) == 0
    assert main([*arguments, "data.tokenizer.placeholder=<other>", "model.llm.config.vocab_size=16"]) == 2
    assert "tokens, but the LLM has 16" in capsys.readouterr().err
