"""Published speech LLMs: the imported model computes what the original computes, and bad folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.hub.modeling import EarshotForCausalLM
from tests.tools.published_models import INSTRUCTION, MODELS, WINDOW_SAMPLES, Reference, ultravox
from tools import import_model
from trainer.export.published.table import PUBLISHED
from trainer.export.tokenizer import read_processor

# The last window is full, nearly full, or ends in the middle of a pair of frames or of a mel frame.
LENGTHS = (9_613, 16_300, WINDOW_SAMPLES - 700, WINDOW_SAMPLES)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Return the original of every architecture, imported into a folder `imported` next to it."""
    found = {}
    for name, write in MODELS.items():
        root = tmp_path_factory.mktemp(name)
        found[name] = write(root / "original")
        assert import_model.main([str(root / "original"), str(root / "imported")]) == 0
    return found


def wave(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)


def difference(reference: Reference, imported: Path, samples: int) -> float:
    """Return the largest difference of a logit for a clip, after checking that the tokens are equal."""
    processor = read_processor(imported)
    model = EarshotForCausalLM.from_pretrained(imported, dtype=torch.float32).eval()
    ids, wanted = reference.logits(wave(samples))
    inputs = processor(audio=wave(samples), text=INSTRUCTION)
    assert inputs["input_ids"][0].tolist() == ids
    assert wanted.abs().max() > 0.5 and len(set(wanted.argmax(-1).tolist())) > 1
    with torch.no_grad():
        return float((model(**inputs).logits[0] - wanted).abs().max())


def test_every_architecture_is_tested() -> None:
    assert set(MODELS) == set(PUBLISHED)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_original(references: dict[str, Reference], name: str) -> None:
    imported = references[name].folder.parent / "imported"
    for samples in LENGTHS:
        assert difference(references[name], imported, samples) < 1e-4, samples


def test_clips_of_several_windows(references: dict[str, Reference]) -> None:
    reference = references["audioflamingo3"]
    assert difference(reference, reference.folder.parent / "imported", WINDOW_SAMPLES + 9_700) < 1e-4


def test_the_llm_may_be_in_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = ultravox(tmp_path / "original", {"llm": tmp_path / "llm"})
    command = [str(tmp_path / "original"), str(tmp_path / "imported")]
    assert import_model.main(command) == 2
    assert "names the LLM (meta-llama/somewhere) instead of containing it; give its folder" in capsys.readouterr().err
    assert import_model.main([*command, "--part", str(tmp_path / "llm")]) == 0
    assert difference(reference, tmp_path / "imported", LENGTHS[0]) < 1e-4


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """Return the only line with which the import of a folder ends."""
    capsys.readouterr()
    assert import_model.main([str(folder), str(folder.parent / "out"), *options]) == 2
    assert [p.name for p in folder.parent.iterdir() if "out" in p.name and not p.name.endswith(".lock")] == []
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_what_does_not_fit_is_refused_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "original"
    ultravox(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def write(changed: dict[str, object], **other: torch.Tensor) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        kept = {name: tensor for name, tensor in {**tensors, **other}.items() if tensor.numel()}
        save_file(kept, folder / "model.safetensors")

    for changed, expected in (
        ({"model_type": "granite_speech"}, "unknown architecture; known are qwen2_audio, ultravox, voxtral"),
        ({"projector_ln_mid": False}, "projector_ln_mid = False; only True is supported"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size = 100; only None is supported"),
        ({"text_config": {**config["text_config"], "model_type": "bloom"}}, "supported families are"),
        ({"text_config": 3}, "does not describe the LLM"),
        (
            {"stack_factor": 4},
            "multi_modal_projector.linear_1.weight has shape (24, 128), by config.json it is (24, 64)",
        ),
    ):
        write(changed)
        assert expected in refusal(capsys, folder), changed
    norm = "multi_modal_projector.ln_mid.weight"
    write({}, **{norm: torch.zeros(0)})
    assert f"lacks {norm}; download it again" in refusal(capsys, folder)
    write({}, **{"audio_tower.extra": torch.zeros(3)})
    assert "audio_tower.extra: not a tensor of Ultravox" in refusal(capsys, folder)
    write({})
    assert "none of <|x|> is a token" in refusal(capsys, folder, "--placeholder", "<|x|>")
    (folder / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal(capsys, folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json: not a JSON object" in refusal(capsys, folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(capsys, folder)
