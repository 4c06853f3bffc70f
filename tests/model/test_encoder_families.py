"""Tests that every encoder family computes the same as transformers, and the same alone as in any batch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ASTFeatureExtractor,
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    WhisperFeatureExtractor,
)

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder
from model.encoders.families import ENCODER_FAMILIES
from model.encoders.parakeet import normalized_mel
from model.encoders.registry import build_encoder, encoder_dim, encoder_flops, encoder_windowing
from model.encoders.wav2vec2_bert import stacked_fbank
from model.errors import UserError
from model.hub.configuration import EarshotConfig, describe, self_contained
from model.hub.modeling import EarshotForCausalLM
from model.lengths import num_frames
from model.llm.reference import resolve_hf_config
from model.precision import cast
from tests.encoder_table import CASES, clip, model_of, perturb
from trainer.config.checks import check_recipe, warnings_of
from trainer.config.convert import from_tree
from trainer.config.schema import Recipe
from trainer.parity_cases import tiny_model

LENGTHS = (12_345, 32_000, 6_400, 19_999, 15_999)


def make(name: str) -> AudioEncoder:
    encoder = build_encoder(CASES[name].encoder())
    perturb(encoder)
    return encoder


def clips(lengths: tuple[int, ...] = LENGTHS) -> Ragged:
    return Ragged.of([clip(n, seed) for seed, n in enumerate(lengths)])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_every_family_is_in_the_table() -> None:
    tested_elsewhere = {"whisper", "whisper_no_norm", "hubert", "wavlm"}
    assert {case.family for case in CASES.values()} | tested_elsewhere == set(ENCODER_FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_loaded_weights_compute_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """Check features, network and weights of an encoder that was loaded from a folder saved by transformers."""
    case = CASES[name]
    published, extractor = case.published(dict(case.config)), case.extractor()
    perturb(published)
    published.eval().save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    encoder = build_encoder(case.encoder(weights=str(tmp_path), config={}))
    assert encoder.training and encoder.frame_samples == case.frame_samples
    described = EncoderConfig(**self_contained(case.encoder(weights=str(tmp_path), config={})))
    assert encoder_windowing(described) == encoder.windowing and encoder_dim(described) == encoder.dim
    for length in (32_000, 12_345, 6_560, *(() if name.startswith("auto") else (3_200,))):
        expected = case.reference(published, extractor, clip(length))
        with torch.no_grad():
            found = encoder.encode(Ragged.of([clip(length)]))
        assert found.shape[0] == encoder.num_own_frames(length)
        count = min(len(found), len(expected))
        assert count >= len(found) - 2, (len(found), len(expected))
        close(found[:count], expected[:count])
        assert found[count:].eq(found[count - 1]).all(), "padding repeats the last frame"


@pytest.mark.parametrize("name", CASES)
def test_batch_changes_neither_features_nor_gradients(name: str) -> None:
    """Check an encoder in training mode, with a full window and with clips whose last convolution reads padding.

    Gradients are compared in fp64: in fp32, rounding changes the sign of some inputs of Parakeet's ReLUs.
    """
    encoder, audio = make(name), clips()
    with torch.no_grad():
        for wave, features in zip(audio.split(), encoder(audio).split(), strict=True):
            close(features, encoder(Ragged.of([wave])).values)
    encoder.double()
    together = encoder(audio)
    weights = [torch.randn(f.shape, generator=torch.Generator().manual_seed(9)) for f in together.split()]
    sum((f * w).sum() for f, w in zip(together.split(), weights, strict=True)).backward()
    gradients = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    state = {n: b.clone() for n, b in encoder.named_buffers()}
    encoder.zero_grad()
    for wave, features, weight in zip(audio.split(), together.split(), weights, strict=True):
        alone = encoder(Ragged.of([wave])).values
        close(features, alone)
        (alone * weight).sum().backward()
    assert set(gradients) == {n for n, p in encoder.named_parameters() if p.requires_grad}, "a gradient is missing"
    for parameter_name, parameter in encoder.named_parameters():
        if parameter.grad is not None and not parameter_name.endswith(("k_proj.bias", "linear_k.bias")):
            scale = parameter.grad.abs().max()  # softmax cancels the biases of keys
            close(gradients[parameter_name] / scale, parameter.grad / scale)
    assert all(b.equal(state[n]) for n, b in encoder.named_buffers()), "running statistics must not change"


@pytest.mark.parametrize("name", CASES)
def test_clips_of_all_lengths_give_all_their_frames(name: str) -> None:
    encoder = make(name)
    with torch.no_grad():
        features = encoder(clips((1, 320, 321, 399, 400, 1_600)))
        assert features.lengths == (1, 1, 2, 2, 2, 5) and features.values.isfinite().all()
        long, short = clip(int(2.3 * encoder.windowing.window_samples)), clip(5_000, 1)
        first, second = encoder(Ragged.of([long, short])).split()
        close(second, encoder(Ragged.of([short])).values)
        assert first.shape == (num_frames(long.shape[0]), encoder.dim)
        windows = Ragged.of(list(long.split(encoder.windowing.window_samples)))
        own = torch.cat([encoder.encode(Ragged.of([w])) for w in windows.split()])
        close(encoder.encode(windows), own)


@pytest.mark.parametrize("name", CASES)
def test_calls_are_deterministic_and_call_each_module_once(name: str) -> None:
    """Check that every module is called once per encoder call.

    ZeRO-3 gathers weights per call, so ranks would hang if the number of calls depended on the clips.
    """
    encoder, calls = make(name), dict[str, int]()
    for module_name, module in encoder.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, n=module_name: calls.__setitem__(n, calls.get(n, 0) + 1))
    with torch.no_grad():
        expected = encoder(clips()).values
        close(encoder(clips()).values, expected, 0.0)
        if not name.startswith("auto"):  # its weights are never gathered per module
            assert set(calls.values()) == {2}, calls
        features = encoder.bfloat16()(clips()).values
    assert features.dtype is torch.bfloat16
    real = expected.abs().amax(1) > 0  # excludes the last frames of SEW, which are zero
    assert F.cosine_similarity(features.float(), expected)[real].mean() > 0.99


@pytest.mark.parametrize("name", CASES)
def test_recomputation_changes_no_gradient(name: str) -> None:
    encoder, audio, gradients = make(name), clips(LENGTHS[2:]), []
    for enabled in (False, True):
        encoder.zero_grad()
        encoder.set_recompute(enabled)
        encoder(audio).values.square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        close(recomputed, plain, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_recipe_width_windows_and_flops(name: str) -> None:
    case, encoder = CASES[name], make(name)
    tree = {"name": "ear", "family": case.family, "config": dict(case.config), "window_sec": case.window_sec}
    config = from_tree(EncoderConfig, tree, "model.primary")
    assert encoder_dim(config) == encoder.dim and encoder_windowing(config) == encoder.windowing
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(clips((31_000,)))
    assert encoder_flops(config, 31_000) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("num_mels", [40, 80])
def test_stacked_filter_banks_equal_transformers(num_mels: int) -> None:
    extractor = SeamlessM4TFeatureExtractor(feature_size=num_mels, num_mel_bins=num_mels)
    audio = clips((9_600, 16_001, 1_400, 1_599, 12_345))
    features, lengths = stacked_fbank(audio, num_mels)
    for wave, rows, length in zip(audio.split(), features, lengths, strict=True):
        expected = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
        assert length == int(expected["attention_mask"].sum())
        close(rows[:length], expected["input_features"][0, :length])


@pytest.mark.parametrize("num_mels", [80, 128])
def test_spectrograms_of_parakeet_and_ast_equal_transformers(num_mels: int) -> None:
    audio = clips((9_600, 16_001, 1_400, 1_599, 12_345))
    mel, lengths = normalized_mel(audio, num_mels)
    fast = ParakeetFeatureExtractor(feature_size=num_mels)
    fields: dict[str, Any] = {**CASES["ast"].config, "num_mel_bins": num_mels, "max_length": 128}
    ast: Any = build_encoder(CASES["ast"].encoder(config=fields, window_sec=1.2))
    patches = ast.features(audio)
    sounds = ASTFeatureExtractor(num_mel_bins=num_mels, max_length=128)
    for i, (wave, length) in enumerate(zip(audio.split(), lengths, strict=True)):
        expected = fast([wave.numpy()], sampling_rate=16_000, return_tensors="pt")
        assert length == int(expected["attention_mask"].sum())
        close(mel[i, :length], expected["input_features"][0, :length])
        assert mel[i, length:].eq(0).all()
        close(patches[i], sounds(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"][0])


def test_mean_and_deviation_are_those_of_the_checkpoint_or_the_recipe(tmp_path: Path) -> None:
    case = CASES["ast"]
    case.published(dict(case.config)).save_pretrained(tmp_path)
    case.extractor().save_pretrained(tmp_path)
    found: Any = build_encoder(case.encoder(weights=str(tmp_path), config={"std": 4.0}))
    assert found.extractor == {"do_normalize": True, "mean": -3.5, "std": 4.0}
    for key, value in (("std", 0), ("std", "4"), ("std", True), ("mean", "low"), ("mean", None), ("do_normalize", 1)):
        with pytest.raises(UserError, match=rf"config.{key} = {value!r}; set it to"):
            build_encoder(case.encoder(config={**case.config, key: value}))
    with pytest.raises(UserError, match=r"window_sec = 30.0; must not exceed 2 s \(200 mel frames\)"):
        build_encoder(case.encoder(window_sec=30.0))
    with pytest.raises(UserError, match=r"config.do_normalize is unknown"):
        build_encoder(CASES["parakeet"].encoder(config={"do_normalize": True}))


def test_the_self_test_finds_what_padding_changes() -> None:
    """Check the probes of SEW, whose norms in transformers include padding, and of UniSpeech large and LASR."""
    found = {name: build_encoder(CASES[name].encoder()) for name in CASES if name.startswith("auto")}
    probes = {name: encoder.probe for name, encoder in found.items()}  # type: ignore[attr-defined]
    assert [name for name, one in probes.items() if one.leak] == ["auto_sew"]
    assert {name: one.hop for name, one in probes.items()} == {"auto_sew": 320, "auto_unispeech": 320, "auto_lasr": 640}
    sizes: list[int] = []
    sew: Any = found["auto_sew"]
    sew.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_values"])), with_kwargs=True
    )
    sew(clips((20_000, 16_000, 20_000)))
    assert sorted(sizes) == [1, 2], "only clips of equal length may be encoded together"
    model = replace(tiny_model(), primary=CASES["auto_sew"].encoder())
    (warning,) = warnings_of(model)
    assert warning.startswith("model.primary: only clips of equal length are encoded together, because padding changes")


@torch.no_grad()
def test_half_precision_keeps_rotary_frequencies(tmp_path: Path) -> None:
    """Check training, and an exported model with an encoder of transformers. Its probe stays in fp32."""
    model = model_of(["auto_lasr"])
    hf_config = resolve_hf_config(model.llm)
    whole = EarshotForCausalLM(EarshotConfig(**describe(model, hf_config, hf_config.vocab_size)))
    whole.save_pretrained(tmp_path)
    loaded = EarshotForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    audio, prompts = clips((20_000, 16_000)), Ragged(torch.arange(6), (2, 4))
    full = whole.eval().audio(audio, prompts).embeddings.values
    trained: Any = deepcopy(whole.audio)
    cast(trained, torch.bfloat16)
    for tower in (loaded.eval().audio, trained):
        assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
        frequencies = [e.experts["auto_lasr"].encoder.encoder.rotary_emb.inv_freq for e in (tower, whole.audio)]
        assert frequencies[0].equal(frequencies[1])
        half = tower(audio, prompts).embeddings.values
        assert half.dtype == torch.bfloat16 and F.cosine_similarity(half.float(), full).min() > 0.99


def test_flops_of_auto_are_the_same_on_every_rank() -> None:
    """Check that FLOPs are exact fractions. Ranks plan with them, so they must not depend on a library's rounding."""
    config = CASES["auto_lasr"].encoder()
    encoder: Any = build_encoder(config)
    assert all(type(part) is Fraction for part in encoder.probe.flops)
    assert all(encoder_flops(config, n).is_integer() for n in range(8_000, 32_000, 1_777))


def test_what_auto_cannot_encode_is_refused() -> None:
    whisper = {"model_type": "whisper", "d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    extractor = WhisperFeatureExtractor().to_dict()
    recipe = Recipe(name="auto", model=replace(tiny_model(), primary=CASES["auto_sew"].encoder()))
    with pytest.raises(UserError, match=r"per_module: model.primary has the family auto, whose modules cannot"):
        check_recipe(replace(recipe, train=replace(recipe.train, gather_audio_weights="per_module")))
    for fields, message in (
        ({**whisper, "extractor": extractor}, "makes features of the same length for all clips"),
        ({**whisper}, "there is no feature extractor; set weights"),
        ({"model_type": "bert", "extractor": extractor}, "BertModel reads input_ids, not audio features"),
        ({"model_type": "nothing"}, "model_type = nothing is unknown to transformers"),
    ):
        with pytest.raises(UserError, match=message):
            build_encoder(EncoderConfig("ear", "auto", config=fields))


def test_other_features_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    """Check a folder without preprocessor_config.json, for which transformers silently uses a different extractor."""
    case = CASES["wav2vec2_bert"]
    case.published(dict(case.config)).save_pretrained(tmp_path)
    config = case.encoder(weights=str(tmp_path), config={})
    with pytest.raises(UserError, match=r"cannot read preprocessor_config.json .*add the file, which says how"):
        build_encoder(config)
    SeamlessM4TFeatureExtractor(num_mel_bins=40, stride=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"preprocessor_config.json has stride = 1; only 2 is supported"):
        build_encoder(config)
