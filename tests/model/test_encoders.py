"""Tests that encoders compute the same as transformers on single unpadded clips, and the same in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WavLMModel,
    WhisperFeatureExtractor,
    WhisperModel,
)

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, normalized
from model.encoders.log_mel import log_mel, num_mel_frames, padded_log_mel
from model.encoders.registry import build_encoder, encoder_dim, encoder_flops
from model.lengths import num_frames

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
STACK: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LARGE: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
CONFIGS = {
    "whisper_full_80": EncoderConfig("a", "whisper", config=WHISPER, window_sec=2.0),
    "whisper_full_128": EncoderConfig("a", "whisper", config={**WHISPER, "num_mel_bins": 128}, window_sec=2.0),
    "whisper_full_normalized": EncoderConfig("a", "whisper", config={**WHISPER, "do_normalize": True}, window_sec=2.0),
    "whisper_trim": EncoderConfig("a", "whisper", config=WHISPER, window_sec=2.0, length_mode="trim"),
    "whisper_trim_silence": EncoderConfig(
        "a", "whisper", config=WHISPER, window_sec=2.0, length_mode="trim", trailing_silence_sec=0.7
    ),
    "whisper_masked": EncoderConfig("a", "whisper", config=WHISPER, window_sec=2.0, length_mode="masked"),
    "whisper_full_no_norm": EncoderConfig("a", "whisper_no_norm", config=WHISPER, window_sec=2.0),
    "hubert_base": EncoderConfig("a", "hubert", config=STACK, window_sec=2.0),
    "hubert_large": EncoderConfig("a", "hubert", config={**STACK, **LARGE}, window_sec=2.0),
    "wavlm_base": EncoderConfig("a", "wavlm", config=STACK, window_sec=2.0),
    "wavlm_large": EncoderConfig("a", "wavlm", config={**STACK, **LARGE}, window_sec=2.0),
}
STACKS = [name for name in CONFIGS if not name.startswith("whisper")]
LENGTHS = (12_345, 32_000, 6_400, 19_999, 15_999)


def make(name: str) -> AudioEncoder:
    """Return an encoder with random parameters, so that no zero bias or unit gate hides a mistake."""
    encoder = build_encoder(CONFIGS[name])
    generator = torch.Generator().manual_seed(3)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return encoder


def clip(samples: int, seed: int = 0) -> Tensor:
    """Return noise with an offset, so that a test notices if a group norm includes padding."""
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed)) + 0.05


def clips(lengths: tuple[int, ...] = LENGTHS) -> Ragged:
    return Ragged.of([clip(n, seed) for seed, n in enumerate(lengths)])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_log_mel_equals_transformers() -> None:
    for num_mels in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=num_mels)
        audio = clips((9_600, 16_001, 480, 161, 32_000))
        mel = log_mel(audio, num_mels)
        for wave, rows in zip(audio.split(), mel.split(), strict=True):
            expected = extractor(
                wave.numpy(), sampling_rate=16_000, padding="longest", pad_to_multiple_of=160, return_tensors="pt"
            )["input_features"][0]
            if wave.shape[0] > 200:  # transformers cannot mirror the edges of shorter clips
                close(rows, expected.T)
            assert rows.shape == (num_mel_frames(wave.shape[0]), num_mels)
        windows, _ = padded_log_mel(audio, num_mels, 480_000)
        expected = extractor([w.numpy() for w in audio.split()], sampling_rate=16_000, return_tensors="pt")
        close(windows, expected["input_features"])


def test_log_mel_floor_depends_on_the_clip_alone() -> None:
    """Check a click on the last sample, which is loudest in a frame that is centered after the clip's end.

    That frame exists only if the clip is padded in a batch.
    """
    wave = torch.zeros(8_000)
    wave[-1] = 1.0
    close(log_mel(Ragged.of([wave, clip(16_000)])).split()[0], log_mel(Ragged.of([wave])).values)


def test_normalisation_equals_transformers() -> None:
    audio = clips((8_000, 400, 12_345))
    waves = normalized(audio.padded(), audio.lengths)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor([w.numpy() for w in audio.split()], sampling_rate=16_000, padding=True, return_tensors="pt")
    close(waves, expected["input_values"])
    assert waves[1, 400:].eq(0).all()


@pytest.mark.parametrize("name", ["whisper_full_80", "whisper_full_128", "whisper_full_normalized"])
def test_whisper_full_equals_transformers(name: str) -> None:
    encoder: Any = make(name)
    reference = WhisperModel(encoder.encoder.config).encoder.eval()
    reference.load_state_dict(encoder.encoder.state_dict())
    extractor = WhisperFeatureExtractor(feature_size=encoder.num_mels, chunk_length=2)
    assert encoder.do_normalize is (name == "whisper_full_normalized")
    for length in (32_000, 12_345, 161):
        mel = extractor(
            clip(length).numpy(), sampling_rate=16_000, do_normalize=encoder.do_normalize, return_tensors="pt"
        )["input_features"]
        expected = reference(mel).last_hidden_state[0, : num_frames(length)]
        close(encoder(Ragged.of([clip(length)])).values, expected)


def test_whisper_trim_equals_transformers_without_padding() -> None:
    """Compare with models of transformers whose full length is set to the clip's length."""
    encoder: Any = make("whisper_trim")
    config = encoder.encoder.config
    for length in (32_000, 12_321, 12_345, 6_400):
        frames = num_frames(length)
        reference = WhisperModel(type(config)(**{**WHISPER, "max_source_positions": frames})).encoder.eval()
        state = encoder.encoder.state_dict()
        state["embed_positions.weight"] = state["embed_positions.weight"][:frames]
        reference.load_state_dict(state)
        mel = log_mel(Ragged.of([clip(length)])).values.T
        mel = mel[None, :, : 2 * frames]
        if mel.shape[2] < 2 * frames:  # the reference's shape check refuses an odd number of mel frames
            hidden = F.gelu(reference.conv2(F.gelu(reference.conv1(mel)))).transpose(1, 2)
            hidden = hidden + reference.embed_positions.weight
            for layer in reference.layers:
                hidden = layer(hidden, None)
            expected = reference.layer_norm(hidden)[0]
        else:
            expected = reference(mel).last_hidden_state[0]
        close(encoder(Ragged.of([clip(length)])).values, expected)


@pytest.mark.parametrize("name", STACKS)
def test_conv_stacks_equal_transformers(name: str) -> None:
    encoder: Any = make(name)
    cls = HubertModel if name.startswith("hubert") else WavLMModel
    reference = cls(encoder.encoder.config).eval()
    loaded = reference.load_state_dict(encoder.encoder.state_dict(), strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"masked_spec_embed"}
    extractor = Wav2Vec2FeatureExtractor(do_normalize=encoder.do_normalize)
    assert encoder.do_normalize is name.endswith("large")
    for length in (32_000, 12_345, 720):
        values = extractor(clip(length).numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
        expected = reference(values).last_hidden_state[0]
        features = encoder(Ragged.of([clip(length)])).values
        close(features[: expected.shape[0]], expected)
        assert features.shape[0] == num_frames(length) > expected.shape[0]
        assert features[expected.shape[0] :].eq(features[expected.shape[0] - 1]).all(), "padding repeats the last frame"


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_changes_neither_features_nor_gradients(name: str) -> None:
    """Check a full window, an odd number of mel frames, and clips whose last convolution reads padding."""
    encoder, audio = make(name), clips()
    together = encoder(audio)
    weights = [torch.randn(f.shape, generator=torch.Generator().manual_seed(9)) for f in together.split()]
    sum((f * w).sum() for f, w in zip(together.split(), weights, strict=True)).backward()
    gradients = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    for wave, features, weight in zip(audio.split(), together.split(), weights, strict=True):
        alone = encoder(Ragged.of([wave])).values
        close(features, alone)
        (alone * weight).sum().backward()
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert set(gradients) == trained, "a gradient is missing"
    for parameter_name, parameter in encoder.named_parameters():
        if parameter.grad is not None and not parameter_name.endswith("k_proj.bias"):  # softmax cancels these biases
            scale = parameter.grad.abs().max()
            close(gradients[parameter_name] / scale, parameter.grad / scale)


@pytest.mark.parametrize("name", ["whisper_full_80", "whisper_trim", "hubert_base", "wavlm_large"])
def test_long_audio_is_encoded_in_windows(name: str) -> None:
    encoder = make(name)
    long, short = clip(int(2.3 * 32_000)), clip(5_000, 1)
    first, second = encoder(Ragged.of([long, short])).split()
    close(first, torch.cat([encoder(Ragged.of([w])).values for w in long.split(32_000)]))
    close(second, encoder(Ragged.of([short])).values)
    assert first.shape == (num_frames(long.shape[0]), 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_shortest_clips_give_all_their_frames(name: str) -> None:
    features = make(name)(clips((1, 320, 321, 399, 400)))
    assert features.lengths == (1, 1, 2, 2, 2) and features.values.isfinite().all()


@pytest.mark.parametrize("frozen", ["", "conv"])
@pytest.mark.parametrize("name", ["whisper_trim", "hubert_base", "wavlm_base"])
def test_recomputation_changes_no_gradient(name: str, frozen: str) -> None:
    """Check recomputation, also of layers that follow a frozen part, whose output needs no gradient."""
    encoder, audio = make(name), clips()
    for parameter_name, parameter in encoder.named_parameters():
        if frozen and (frozen in parameter_name or "feature_" in parameter_name):
            parameter.requires_grad_(False)
    gradients = []
    for enabled in (False, True):
        encoder.zero_grad()
        encoder.set_recompute(enabled)
        encoder(audio).values.square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        close(recomputed, plain, 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_in_bfloat16(name: str) -> None:
    encoder = make(name)
    expected = encoder(clips()).values
    features = encoder.bfloat16()(clips()).values
    assert features.dtype is torch.bfloat16
    # With random weights, normalized features are nearly constant, which amplifies rounding errors. They are largest on
    # CPUs with AMX.
    assert F.cosine_similarity(features.float(), expected).mean() > 0.9


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_deterministic_in_training_and_calls_each_module_once(name: str) -> None:
    """Check that every module is called once per encoder call.

    ZeRO-3 gathers weights per call, so ranks would hang if the number of calls depended on the clips.
    """
    encoder = make(name).train()
    calls: dict[str, int] = {}
    for module_name, module in encoder.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, n=module_name: calls.__setitem__(n, calls.get(n, 0) + 1))
    close(encoder(clips()).values, encoder(clips()).values, 0.0)
    assert set(calls.values()) == {2}, calls


@pytest.mark.parametrize("name", CONFIGS)
def test_dim_and_flops(name: str) -> None:
    config, encoder = CONFIGS[name], make(name)
    assert encoder_dim(config) == encoder.dim == 32
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(clips((20_000,)))
    assert encoder_flops(config, 20_000) == pytest.approx(counter.get_total_flops(), rel=0.05)
    whole = encoder_flops(config, 32_000)
    assert encoder_flops(config, 64_000) == 2 * whole
    assert (encoder_flops(config, 16_000) == whole) is name.startswith("whisper_full")
