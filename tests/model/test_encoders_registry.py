"""Tests that encoder weights are loaded, and that bad encoder configs and checkpoints cause errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.registry import build_encoder, encoder_dim, encoder_windowing
from model.errors import UserError

STACK: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "max_source_positions": 100,
}


def whisper(path: Path, **fields: Any) -> EncoderConfig:
    return EncoderConfig("ear", "whisper", weights=str(path), window_sec=2.0, config=fields)


def stack(path: Path, family: Any, **fields: Any) -> EncoderConfig:
    return EncoderConfig("ear", family, weights=str(path), config=fields)


def save(model: Any, path: Path, do_normalize: bool | None = True) -> Path:
    model.save_pretrained(path)
    if do_normalize is not None:
        Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(path)
    return path


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors in a folder's safetensors file, or remove them if `changes` has None for them."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        assert name in tensors, sorted(tensors)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def same(encoder: Any, source: torch.nn.Module) -> None:
    """Check that every parameter equals the parameter of the same name in `source`."""
    expected = dict(source.named_parameters())
    for name, parameter in encoder.encoder.named_parameters():
        assert parameter.dtype is torch.float32 and torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("cls", [WhisperModel, WhisperForConditionalGeneration])
def test_loads_whisper_from_either_layout(cls: Any, tmp_path: Path) -> None:
    model = cls(WhisperConfig(**WHISPER))
    encoder = build_encoder(whisper(save(model, tmp_path, None)))
    same(encoder, model.get_encoder())
    assert encoder.training and encoder_dim(whisper(tmp_path)) == 32


def test_loads_half_precision_as_fp32(tmp_path: Path) -> None:
    model = WhisperModel(WhisperConfig(**WHISPER)).half()
    same(build_encoder(whisper(save(model, tmp_path, None))), model.encoder.float())


@pytest.mark.parametrize("do_normalize", [True, False])
def test_loads_conv_stacks_with_their_normalisation(do_normalize: bool, tmp_path: Path) -> None:
    """Load checkpoints with and without a task head, and check that all pre-training noise is switched off."""
    hubert = HubertForCTC(HubertConfig(**STACK))
    encoder: Any = build_encoder(stack(save(hubert, tmp_path / "h", do_normalize), "hubert"))
    same(encoder, hubert.hubert)
    wavlm = WavLMModel(WavLMConfig(**STACK))
    other: Any = build_encoder(stack(save(wavlm, tmp_path / "w", do_normalize), "wavlm"))
    same(other, wavlm)
    assert encoder.do_normalize is other.do_normalize is do_normalize
    config = encoder.encoder.config
    assert config.hidden_dropout == config.layerdrop == 0.0 and not config.apply_spec_augment
    assert {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    audio = Ragged.of([torch.randn(4_000)])
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "w")
    values = extractor(audio.values.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    wanted = wavlm.eval()(values).last_hidden_state[0]
    torch.testing.assert_close(other(audio).values[: wanted.shape[0]], wanted, atol=1e-4, rtol=1e-4)


def test_loads_old_weight_norm_names_of_the_hub(tmp_path: Path) -> None:
    model = WavLMModel(WavLMConfig(**STACK))
    save(model, tmp_path)
    prefix = "encoder.pos_conv_embed.conv."
    new = {
        "weight_g": prefix + "parametrizations.weight.original0",
        "weight_v": prefix + "parametrizations.weight.original1",
    }
    old = load_file(tmp_path / "model.safetensors")
    for name, now in new.items():
        old[prefix + name] = old.pop(now)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(build_encoder(stack(tmp_path, "wavlm")), model)


def test_recipe_overrides_the_checkpoint(tmp_path: Path) -> None:
    path = save(HubertForCTC(HubertConfig(**STACK)), tmp_path, False)
    encoder: Any = build_encoder(stack(path, "hubert", do_normalize=True, hidden_dropout=0.25))
    assert encoder.do_normalize and encoder.encoder.config.hidden_dropout == 0.25


def test_seed_decides_random_weights() -> None:
    config = EncoderConfig("ear", "wavlm", config=STACK)
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_encoder(config).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_missing_and_mismatching_weights(tmp_path: Path) -> None:
    save(WavLMModel(WavLMConfig(**STACK)), tmp_path)
    edit(tmp_path, **{"encoder.layers.1.attention.q_proj.weight": None})
    with pytest.raises(UserError, match=r"'ear'.*lack encoder\.layers\.1\.attention\.q_proj\.weight.*checkpoint"):
        build_encoder(stack(tmp_path, "wavlm"))
    save(WavLMModel(WavLMConfig(**STACK)), tmp_path)
    edit(tmp_path, **{"encoder.layers.1.attention.k_proj.weight": torch.zeros(32, 16)})
    with pytest.raises(UserError, match=r"k_proj\.weight, whose shape is \(32, 16\) instead of \(32, 32\)"):
        build_encoder(stack(tmp_path, "wavlm"))


def test_broken_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'ear'.*weights = .*nowhere.*config\.json"):
        build_encoder(whisper(tmp_path / "nowhere"))
    save(WhisperModel(WhisperConfig(**WHISPER)), tmp_path, None)
    with pytest.raises(UserError, match="hold a whisper model; set family = whisper"):
        build_encoder(stack(tmp_path, "hubert"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load them"):
        build_encoder(whisper(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match="cannot load them"):
        build_encoder(whisper(tmp_path))


def test_normalisation_is_never_guessed_for_a_checkpoint(tmp_path: Path) -> None:
    path = save(HubertForCTC(HubertConfig(**STACK)), tmp_path, None)
    with pytest.raises(UserError, match=r"preprocessor_config\.json.*config\.do_normalize"):
        build_encoder(stack(path, "hubert"))
    build_encoder(stack(path, "hubert", do_normalize=False))
    (path / "preprocessor_config.json").write_text(json.dumps({"feature_size": 1}))
    encoder: Any = build_encoder(stack(path, "hubert"))
    assert encoder.do_normalize


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            EncoderConfig("ear", "hubert", config={"hiden_size": 32}),
            "config.hiden_size is unknown; did you mean hidden_size",
        ),
        (EncoderConfig("ear", "whisper", config={"do_normalize": 1}), "do_normalize = 1; set it to true or false"),
        (EncoderConfig("ear", "hubert", config={"layerdrop": 0.1}), "config.layerdrop = 0.1; must be 0"),
        (EncoderConfig("ear", "whisper", config={"encoder_layerdrop": 0.1}), "encoder_layerdrop = 0.1; must be 0"),
        (EncoderConfig("ear", "wavlm", config={"apply_spec_augment": True}), "apply_spec_augment"),
        (EncoderConfig("ear", "wavlm", config={"add_adapter": True}), "add_adapter"),
        (EncoderConfig("ear", "hubert", config={"conv_pos_batch_norm": True}), "conv_pos_batch_norm"),
        (EncoderConfig("ear", "hubert", config={"conv_stride": [5, 2, 2, 2, 2, 2, 1]}), "multiply to 160"),
        (EncoderConfig("ear", "hubert", config={"hidden_size": "big"}), "hidden_size"),
        (EncoderConfig("ear", "hubert", config={**STACK, "num_attention_heads": 5}), "num_heads"),
        (EncoderConfig("ear", "hubert", window_sec=1.005), "multiple of 0.02"),
        (EncoderConfig("ear", "whisper", window_sec=40.0), "window_sec = 40.0; must not exceed 30 s"),
        (EncoderConfig("ear", "whisper", config=WHISPER), r"must not exceed 2 s \(100 positions\)"),
        (EncoderConfig("ear", "whisper", window_sec=10.0), "must equal 30 s"),
        (EncoderConfig("ear", "whisper", window_sec=10.0, length_mode="masked"), "equal 30 s .* length_mode masked"),
        (EncoderConfig("ear", "mert"), "choose one of whisper, .*hubert, wavlm"),
    ],
)
def test_bad_configs(config: EncoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_encoder(config)
    assert "'ear'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["whisper", "hubert", "wavlm"])
def test_random_weights_are_drawn_as_transformers_draws_them(family: Any) -> None:
    fields = WHISPER if family == "whisper" else STACK
    ours = build_encoder(EncoderConfig("ear", family, config=fields, window_sec=2.0)).encoder
    theirs: Any = {
        "whisper": lambda: WhisperModel(WhisperConfig(**fields)).encoder,
        "hubert": lambda: HubertModel(HubertConfig(**fields)),
        "wavlm": lambda: WavLMModel(WavLMConfig(**fields)),
    }[family]()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        spread, wanted = float(parameter.detach().std()), float(expected[name].detach().std())
        assert spread == pytest.approx(wanted, rel=0.5, abs=1e-3), name
    if family == "whisper":
        torch.testing.assert_close(ours.embed_positions.weight, theirs.embed_positions.weight)


@pytest.mark.parametrize(
    ("family", "mode", "clips"),
    [
        ("whisper", {"length_mode": "full"}, (16_000, 4_000, 70_000)),
        ("whisper", {"length_mode": "trim"}, (16_000, 4_000, 70_000)),
        ("whisper", {"length_mode": "trim"}, (100,)),
        ("whisper", {"length_mode": "trim", "trailing_silence_sec": 0.5}, (16_000, 4_000)),
        ("whisper", {"length_mode": "trim", "trailing_silence_sec": 0.5}, (16_000, 70_000)),
        ("hubert", {}, (16_000, 4_000, 70_000)),
        ("wavlm", {}, (100, 50)),
    ],
)
def test_encoder_reports_what_its_call_computes(family: Any, mode: dict[str, Any], clips: tuple[int, ...]) -> None:
    fields = WHISPER if family == "whisper" else STACK
    config = EncoderConfig("ear", family, window_sec=2.0, config=fields, **mode)
    encoder = build_encoder(config)
    assert encoder.windowing == encoder_windowing(config)
    seen: list[int] = []
    samples_per_column = 160 if family == "whisper" else 1  # the input is a mel spectrogram or the waveform
    encoder.encoder.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[0] * args[0].shape[-1] * samples_per_column)
    )
    with torch.no_grad():
        encoder(Ragged(torch.randn(sum(clips)), clips))
    (computed,) = seen
    # The length of Whisper's spectrograms is rounded up to a multiple of 10 ms.
    assert encoder.windowing.computed_samples(clips) <= computed < encoder.windowing.computed_samples(clips) + 160 * 6


@pytest.mark.parametrize("family", ["whisper", "hubert"])
def test_what_an_encoder_does_not_use_is_not_reported(tmp_path: Path, family: str) -> None:
    records: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        if family == "whisper":
            save(WhisperForConditionalGeneration(WhisperConfig(**WHISPER)), tmp_path)
            build_encoder(whisper(tmp_path))
        else:
            save(HubertForCTC(HubertConfig(**STACK)), tmp_path)
            build_encoder(stack(tmp_path, "hubert"))
    finally:
        logger.removeHandler(handler)
    assert not [text for text in records if "UNEXPECTED" in text or "LOAD REPORT" in text]
