"""Tests that imported speech LLMs compute the same as the published models, and that bad folders are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from model.audio_tower import AudioTower
from model.batch import Ragged
from model.hub.configuration import audio_config
from model.hub.modeling import EarshotForCausalLM
from tests.tools.exportable import write_checkpoint
from tests.tools.published_models import INSTRUCTION, MODELS, SPECIAL, TEXT, WINDOW_SAMPLES, Reference, ultravox
from tools import export, import_model, transcribe
from trainer.config.load import dump, load_recipe
from trainer.export.published.table import PUBLISHED
from trainer.export.tokenizer import read_processor
from trainer.parity_cases import tiny_model
from trainer.run_tokenizer import DIGEST, adopt, of_export

NOTHING: Mapping[str, Any] = {}
# The lengths of clips. The last window is full, nearly full, or ends within a pair of frames or within a mel frame.
LENGTHS = (9_613, 16_300, WINDOW_SAMPLES - 700, WINDOW_SAMPLES)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Return a published model of every architecture, each with its import in a folder `imported` next to it."""
    found = {}
    for name, write in MODELS.items():
        root = tmp_path_factory.mktemp(name)
        found[name] = write(root / "original")
        assert import_model.main([str(root / "original"), str(root / "imported")]) == 0
    return found


def wave(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)


def difference(reference: Reference, imported: Path, samples: int) -> float:
    """Return the largest difference between the logits of both models for a clip, and check that tokens are equal."""
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


def test_qwen3_asr_has_thirteen_audio_tokens_per_second(references: dict[str, Reference]) -> None:
    """Check the number of tokens for lengths at which it changes.

    The last group of each second is shorter, and a frame with less than 10 ms of audio has no token.
    """
    reference = references["qwen3_asr"]
    processor = read_processor(reference.folder.parent / "imported")
    for samples in (1, 8_000, 8_160, 15_840, 15_999, 16_000, 16_159, 16_160, 17_280, 17_281, 17_440, 33_000, 160_001):
        ids, _ = reference.logits(wave(max(8_000, samples)))
        assert processor.count_audio_tokens(samples) == ids.count(SPECIAL.index("<|audio_pad|>")), samples
    assert [processor.count_audio_tokens(16_000 * seconds) for seconds in (1, 2, 10)] == [13, 26, 130]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_added_experts_do_not_change_the_embeddings_at_first(references: dict[str, Reference], name: str) -> None:
    """Check that added experts have no effect, because their features pass through a projection that starts at zero."""
    imported = references[name].folder.parent / "imported"
    config = audio_config(json.loads((imported / "config.json").read_text())["audio"])
    recipe = load_recipe(str(imported / "recipe.yaml"), ["data.tokenizer.train_vocab_size=64"])
    tensors = {n.removeprefix("audio."): t for n, t in load_file(imported / "model.safetensors").items()}
    width = recipe.model.llm.config["hidden_size"]
    more = replace(tiny_model(), primary=config.primary, adapter=config.adapter, losses={}, ctc_weight=0.0)
    more = replace(more, router=replace(more.router, join="add"))
    alone, added = AudioTower(config, width, 80).eval(), AudioTower(more, width, 80).eval()
    alone.load_state_dict({n: t for n, t in tensors.items() if n in alone.state_dict()})
    missing, _ = added.load_state_dict({n: t for n, t in tensors.items() if n in alone.state_dict()}, strict=False)
    assert any(n.startswith("experts.wavlm.") for n in missing) and "stream_projection.weight" in missing
    audio = Ragged.of([torch.from_numpy(wave(n)) for n in (WINDOW_SAMPLES, 20_000)])
    prompts = Ragged(torch.tensor([1, 2, 3]), (2, 1))
    before, after = (tower(audio, prompts) for tower in (alone, added))
    assert after.routing is not None and before.embeddings.values.equal(after.embeddings.values)


def test_an_imported_model_transcribes(
    references: dict[str, Reference], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "clip.wav", wave(LENGTHS[0]), 16_000)
    folder = references["qwen2_audio"].folder.parent / "imported"
    assert transcribe.main([str(folder), str(tmp_path / "clip.wav"), "--prompt", INSTRUCTION]) == 0
    printed = capsys.readouterr().out.strip()
    processor = read_processor(folder)
    model = EarshotForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.generation_config.eos_token_id == [SPECIAL.index("</s>"), SPECIAL.index("<|im_end|>")]
    assert model.generation_config.suppress_tokens == list(range(len(processor.tokenizer), TEXT["vocab_size"]))
    sound, _ = soundfile.read(tmp_path / "clip.wav", dtype="float32")
    with torch.no_grad():
        tokens = model.generate(**processor(audio=sound, text=INSTRUCTION))
    assert processor.batch_decode(tokens)[0].strip() == printed
    _, wanted = references["qwen2_audio"].logits(sound)
    assert tokens[0, 0] == wanted[-1, : len(processor.tokenizer)].argmax()


def test_clips_of_several_windows(references: dict[str, Reference]) -> None:
    reference = references["audioflamingo3"]
    assert difference(reference, reference.folder.parent / "imported", WINDOW_SAMPLES + 9_700) < 1e-4


def test_the_llm_may_be_in_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = ultravox(tmp_path / "original", tmp_path / "llm")
    command = [str(tmp_path / "original"), str(tmp_path / "imported")]
    assert import_model.main(command) == 2
    wanted = "names the LLM (meta-llama/somewhere) instead of containing it; specify its folder"
    assert wanted in capsys.readouterr().err
    assert import_model.main([*command, "--part", str(tmp_path / "llm")]) == 0
    assert difference(reference, tmp_path / "imported", LENGTHS[0]) < 1e-4


def test_ultravox_up_to_version_0_4_1(tmp_path: Path) -> None:
    reference = ultravox(tmp_path / "original", is_old=True)
    assert import_model.main([str(tmp_path / "original"), str(tmp_path / "imported")]) == 0
    assert difference(reference, tmp_path / "imported", LENGTHS[0]) < 1e-4


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """Import a folder, check that it is refused with one line, and return this line."""
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
        (
            {"model_type": "granite_speech"},
            "is an unknown architecture; the known ones are qwen2_audio, ultravox, voxtral",
        ),
        ({"projector_ln_mid": False}, "multi_modal_projector.ln_mid.weight is not a tensor of Ultravox"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size = 100; only None is supported"),
        ({"text_config": {**config["text_config"], "model_type": "bloom"}}, "supported families are"),
        ({"text_config": 3}, "does not describe the LLM"),
        (
            {"stack_factor": 4},
            "multi_modal_projector.linear_1.weight has shape (24, 128), but (24, 64) according to config.json",
        ),
    ):
        write(changed)
        assert expected in refusal(capsys, folder), changed
    norm = "multi_modal_projector.ln_mid.weight"
    write({}, **{norm: torch.zeros(0)})
    assert f"lacks {norm}; download it again" in refusal(capsys, folder)
    write({}, **{"audio_tower.extra": torch.zeros(3)})
    assert "audio_tower.extra is not a tensor of Ultravox" in refusal(capsys, folder)
    write({})
    assert "none of <|x|> is a token" in refusal(capsys, folder, "--placeholder", "<|x|>")
    (folder / "model.safetensors").unlink()
    assert "contains no model.safetensors" in refusal(capsys, folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json: is not a JSON object" in refusal(capsys, folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(capsys, folder)


@pytest.mark.parametrize("name", MODELS)
def test_the_original_layout_is_exported(references: dict[str, Reference], name: str, tmp_path: Path) -> None:
    original = references[name].folder
    write_run_of(original.parent / "imported", tmp_path / "run")
    command = [str(tmp_path / "run"), str(tmp_path / "out"), "--original", str(original), "--dtype", "fp32"]
    assert export.main(command) == 0
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", original))
    assert found.keys() == before.keys()
    assert all(torch.equal(found[tensor], before[tensor]) for tensor in before)
    files = {p.name for p in original.iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", original)]
    assert configs[0] == configs[1]
    if name != "ultravox":
        again = type(references[name].model).from_pretrained(tmp_path / "out").eval()
        assert references[name].logits(wave(LENGTHS[0]), again)[1].equal(references[name].logits(wave(LENGTHS[0]))[1])


def test_low_rank_adapters_are_merged(references: dict[str, Reference], tmp_path: Path) -> None:
    original = references["voxtral"].folder
    layer = "llm.model.layers.1.self_attn.q_proj"
    a, b = torch.randn(1, 32), torch.randn(32, 1)
    lora = f"lora=[{{pattern: '{layer}', rank: 1, alpha: 3}}]"
    factors = {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
    write_run_of(original.parent / "imported", tmp_path / "run", lora, more=factors)
    command = [str(tmp_path / "run"), str(tmp_path / "out"), "--original", str(original), "--dtype", "fp32"]
    assert export.main(command) == 0
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", original))
    assert found.keys() == before.keys()
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], before[name] + 3 * b @ a)
    assert all(torch.equal(found[other], before[other]) for other in before if other != name)


def write_run_of(
    imported: Path,
    run_dir: Path,
    *overrides: str,
    more: Mapping[str, torch.Tensor] = NOTHING,
    fields: Mapping[str, object] = NOTHING,
) -> None:
    """Write a run with one checkpoint of imported weights.

    Args:
        imported: The folder of the imported model.
        run_dir: The run folder.
        overrides: Overrides of the recipe.
        more: Tensors that are added or replaced.
        fields: Fields of the LLM's config that are added or replaced.
    """
    config = json.loads((imported / "config.json").read_text())
    recipe = load_recipe(str(imported / "recipe.yaml"), ["data.tokenizer.train_vocab_size=64", *overrides])
    tokenizer = of_export(str(imported))
    extra = {
        "recipe": dump(adopt(recipe, tokenizer)),
        "model": {key: config[key] for key in ("audio", "vocab_size")}
        | {"text_config": config["text_config"] | fields},
        "tokenizer": str(imported),
        DIGEST: config[DIGEST],
    }
    tensors = {**load_file(imported / "model.safetensors"), **more}
    write_checkpoint(run_dir / "checkpoints" / "step-00000040", tensors, extra)


def test_another_model_is_not_exported_in_the_original_layout(
    references: dict[str, Reference], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_of(references["qwen2_audio"].folder.parent / "imported", tmp_path / "run")
    for name, expected in (
        ("audioflamingo3", "the run lacks audio.adapter.linear.bias; use the folder that the run was imported from"),
        ("voxtral", "the run lacks audio.adapter.linear.weight"),
    ):
        command = [str(tmp_path / "run"), str(tmp_path / "out"), "--original", str(references[name].folder)]
        assert export.main(command) == 2
        assert expected in capsys.readouterr().err
    original = references["qwen2_audio"].folder
    write_run_of(original.parent / "imported", tmp_path / "changed", fields={"rms_norm_eps": 0.5})
    assert export.main([str(tmp_path / "changed"), str(tmp_path / "out"), "--original", str(original)]) == 2
    assert "the run changed rms_norm_eps of the LLM's config" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
