"""Tests of exporting a run with low-rank adapters, either merged into the weights or as a folder for peft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.config import LLMConfig, LoraConfig, is_factor
from model.errors import UserError
from model.llm.reference import build_reference
from model.lora import Adapters
from model.speech_llm import SpeechLLM
from tests.tools.exportable import tensors_of, write_manifest, write_run
from tests.trainer.test_checkpoint_start import INITIAL, check, shards_of
from tools import export
from trainer.checkpoint.origin import open_origin
from trainer.checkpoint.start import check_adapters, fill_weights
from trainer.parity_cases import tiny_model

LORA = (
    LoraConfig("llm.*", rank=2, alpha=3),
    LoraConfig("llm.*.k_proj", rank=3, alpha=6),
    LoraConfig("audio.experts.hubert.*_proj", rank=2),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SpeechLLM]:
    root = tmp_path_factory.mktemp("lora")
    return root, write_run(root / "run", lora=LORA)


def merged(oracle: SpeechLLM) -> dict[str, Tensor]:
    """Return the tensors of an export with merged adapters, W + (alpha / rank)·B·A."""
    tensors, found = tensors_of(oracle), {}
    for name, tensor in tensors.items():
        part = Adapters(LORA).of_layer(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if not is_factor(name):
            layer = name.removesuffix(".weight")
            found[name] = tensor.detach()
            if part is not None and f"{layer}.lora_A" in tensors:
                found[name] = tensor + part.scale * tensors[f"{layer}.lora_B"] @ tensors[f"{layer}.lora_A"]
    return found


def test_adapters_of_experts_that_transformers_stores_together_are_merged(tmp_path: Path) -> None:
    lora = (LoraConfig("llm.*.mlp.experts.2.*", rank=2, alpha=3),)
    write_run(tmp_path / "run", model=tiny_model("gpt_oss", num_layers=2), lora=lora)
    command = [str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"]
    assert export.main([*command, "--verify", str(write_manifest(tmp_path))]) == 0


def test_adapters_are_merged_and_the_export_is_verified(made: tuple[Path, SpeechLLM], tmp_path: Path) -> None:
    root, oracle = made
    manifest = write_manifest(tmp_path)
    command = [str(root / "run"), str(tmp_path / "out"), "--dtype", "fp32", "--merge", "--verify", str(manifest)]
    assert export.main(command) == 0
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), merged(oracle)
    assert found.keys() == {name for name in wanted if not name.startswith("audio.ctc_head.")}
    for name, tensor in found.items():
        assert torch.allclose(tensor, wanted[name], rtol=0, atol=1e-6), name
    plain = tensors_of(oracle)
    changed = {name for name, tensor in found.items() if not tensor.equal(plain[name])}
    assert len([n for n in changed if n.startswith("llm.")]) == 7 * 4 and any("hubert" in name for name in changed)


def check_peft(run: Path, base: Any, oracle: SpeechLLM) -> Path:
    """Check that `base` has the oracle's logits after peft has loaded the run's adapters.

    Returns:
        The folder of the exported adapters.
    """
    peft = pytest.importorskip("peft")
    out = run.parent / "adapter"
    assert export.main([str(run), str(out), "--dtype", "fp32", "--llm-only", "--adapter"]) == 0
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, plain = oracle.llm(input_ids=ids).logits, base(input_ids=ids).logits
        found = peft.PeftModel.from_pretrained(base, out).eval()(input_ids=ids).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert float((plain - wanted).abs().max()) > 1e-2 * float(wanted.abs().max()), "the adapters must change the logits"
    return out


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_peft_loads_the_adapter_on_the_stock_model(family: str, made: tuple[Path, SpeechLLM], tmp_path: Path) -> None:
    # One pattern sets a different rank for k_proj, which Phi-3 does not have.
    root, oracle = made if family == "llama" else (tmp_path, write_run(tmp_path / "run", family, lora=LORA))
    base: Any = build_reference(LLMConfig(config=tiny_model(family).llm.config), seed=1)
    stored = dict(oracle.llm.named_parameters())
    base.load_state_dict({n: stored[n] for n in base.state_dict() if n in stored}, strict=False)
    out = check_peft(root / "run", base, oracle)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in out.iterdir()}
    assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["r"] == 2 and set(settings["rank_pattern"].values()) == ({3} if family == "llama" else set())


EXPERT_LORA = {
    "mixtral": ("llm.*", "llm.*.layers.1.*.experts.1.*", "llm.*.experts.2.w3"),
    "qwen2_moe": ("llm.*", "llm.*.shared_expert.down_proj", "llm.*.experts.2.up_proj"),
    "qwen3_moe": ("llm.*", "llm.*.mlp.down_proj", "llm.*.experts.2.up_proj"),
    "gpt_oss": ("llm.*.layers.0.*.experts.2.down_proj", "llm.*.layers.1.*.experts.[13].gate_proj", "llm.*.q_proj"),
}
"""The patterns of adapters with the ranks 2, 3 and 1 for each family. Layer 1 of the Qwen3-MoE is dense. In GPT-OSS,
transformers stores experts' projections in one parameter, and only some experts of some parameters have adapters."""


@pytest.mark.parametrize("family", sorted(EXPERT_LORA))
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_peft_loads_adapters_of_experts_on_the_stock_model(family: str, tmp_path: Path) -> None:
    settings = zip(EXPERT_LORA[family], (2, 3, 1), (3, 2, 4), strict=True)
    lora = tuple(LoraConfig(pattern, rank=rank, alpha=alpha) for pattern, rank, alpha in settings)
    model = tiny_model(family, num_layers=2)
    write_run(tmp_path / "plain", model=model)
    assert export.main([str(tmp_path / "plain"), str(tmp_path / "base"), "--dtype", "fp32", "--llm-only"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    check_peft(tmp_path / "run", base, write_run(tmp_path / "run", model=model, lora=lora))


def test_an_adapter_that_is_not_the_whole_difference_is_refused(
    made: tuple[Path, SpeechLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--llm-only", "--adapter"]) == 2
    assert "the LLM has no adapters" in capsys.readouterr().err
    assert export.main([str(made[0] / "run"), str(tmp_path / "out"), "--adapter"]) == 2
    assert "add --llm-only" in capsys.readouterr().err


def test_a_run_starts_with_new_adapters_and_never_drops_any(made: tuple[Path, SpeechLLM], tmp_path: Path) -> None:
    root, oracle = made
    tensors = tensors_of(oracle)
    origin = open_origin(str(root / "run"), exported=False)
    check_adapters(origin, set(tensors), tiny_model(), origin.lora)
    with pytest.raises(UserError, match="holds the adapter .*, which the recipe's section lora does not ask for"):
        check_adapters(origin, {n for n in tensors if not is_factor(n)}, tiny_model(), ())
    assert origin.lora, "the checkpoint's recipe must contain the settings"
    doubled = [replace(part, alpha=2 * part.alpha) for part in origin.lora]
    with pytest.raises(UserError, match="was trained with alpha / rank = 8, but lora .* has 16; set alpha to 16, or"):
        check_adapters(origin, set(tensors), tiny_model(), doubled)
    same = [replace(part, rank=2 * part.rank, alpha=2 * part.alpha) for part in origin.lora]
    check_adapters(origin, set(tensors), tiny_model(), same)
    shards = shards_of(tensors)
    assert fill_weights(origin, shards, tiny_model()) == ()
    check(shards, tensors)
    write_run(tmp_path / "plain")
    shards = [s for s in shards_of(tensors) if is_factor(s.name)]
    new = fill_weights(open_origin(str(tmp_path / "plain"), exported=False), shards, tiny_model())
    assert set(new) == {"adapters of llm", "adapters of audio.experts.hubert"}
    check(shards, {s.name: torch.full(s.shape, INITIAL) for s in shards})
    name = "llm.model.layers.0.self_attn.q_proj.lora_A"
    with pytest.raises(UserError, match="set lora as it was for these weights"):
        fill_weights(origin, shards_of({name: torch.zeros(5, 32)}), tiny_model())
