"""Tests of the parts of the model on a pretended device: no tensor stays on the CPU, and the host hardly ever waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.gpu_waits import BACKWARD
from model.audio_tower import AudioTower
from model.batch import Ragged
from model.config import AdapterConfig, EncoderConfig, RouterConfig
from model.connectors.base import build_adapter
from model.connectors.kinds import ADAPTERS
from model.encoders.registry import build_encoder
from model.losses.ctc import ctc_sum
from model.losses.vocabulary import Vocabulary
from model.mixture import mix
from model.router import Router, Routing
from model.transfer import to_device
from tests.pretended_device import DEVICE, PretendedDevice, put
from trainer.parity_cases import VOCAB_SIZE, tiny_model

STACK: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
LARGE = STACK | {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "do_normalize": True}
WHISPER: dict[str, Any] = {
    "max_source_positions": 150,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
}
ENCODERS = {
    "whisper_full": EncoderConfig("e", "whisper", config=WHISPER, window_sec=3.0, length_mode="full"),
    "whisper_trim": EncoderConfig("e", "whisper", config=WHISPER, window_sec=2.0, length_mode="trim"),
    "whisper_normalized": EncoderConfig(
        "e", "whisper", config=WHISPER | {"do_normalize": True}, window_sec=2.0, length_mode="trim"
    ),
    "hubert_base": EncoderConfig("e", "hubert", config=STACK),
    "hubert_large": EncoderConfig("e", "hubert", config=LARGE),
    "wavlm_base": EncoderConfig("e", "wavlm", config=STACK),
    "wavlm_large": EncoderConfig("e", "wavlm", config=LARGE),
}
CLIPS = (16_000, 9_000, 40_000)


def host(tensor: Any) -> Tensor:
    """Return the values of a tensor on the CPU or on the pretended device."""
    return tensor.host.detach() if hasattr(tensor, "host") else tensor.detach()


def move(value: Any) -> Any:
    return Ragged(put(value.values), value.lengths) if isinstance(value, Ragged) else value


def compare(module: nn.Module, *args: Any, waits: dict[str, int] | None = None) -> None:
    """Check that results and gradients equal those on the CPU, and that the host waits only at `waits`.

    The module is called twice, because constants are moved to the device in the first call.
    """
    expected = module(*args)
    expected.values.square().sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    with PretendedDevice() as device:
        put(module)
        moved = [move(a) for a in args]
        module(*moved)
        device.waits.clear()
        found = module(*moved)
        found.values.square().sum().backward()
    assert found.lengths == expected.lengths and found.values.device == DEVICE
    torch.testing.assert_close(host(found.values), expected.values.detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():
        if name in gradients:
            assert parameter.grad is not None, name
            torch.testing.assert_close(host(parameter.grad), gradients[name], rtol=1e-3, atol=1e-4)
    assert dict(device.waits) == (waits or {}), device.kinds


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_encoders(name: str, recompute: bool) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ENCODERS[name])
    encoder.set_recompute(recompute)
    compare(encoder, Ragged(0.1 * torch.randn(sum(CLIPS)), CLIPS))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter(kind: str) -> None:
    torch.manual_seed(0)
    config = AdapterConfig(kind, hidden_size=4, num_heads=2)
    width = config.hidden_size  # `pooling` keeps the width of its input
    compare(build_adapter(config, width), Ragged(torch.randn(60, width), (17, 3, 40)))


@pytest.mark.parametrize("recompute", [False, True])
def test_tower_waits_once_even_if_it_recomputes_what_follows_the_encoders(recompute: bool) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    tower = AudioTower(model, 32, VOCAB_SIZE)
    tower.recompute_joined = recompute

    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, clips: Ragged, prompts: Ragged) -> Ragged:
            return tower(clips, prompts).embeddings

    clips = Ragged(0.1 * torch.randn(sum(CLIPS)), CLIPS)
    compare(Embeddings(), clips, Ragged(torch.arange(6), (1, 2, 3)), waits={"model/router.py:on_host": 1})


@pytest.mark.parametrize("source", ["primary", "log_mel", "prompt"])
def test_router_and_mixture_wait_once(source: Any) -> None:
    """Check that the host waits only once, namely for the router's choice."""
    torch.manual_seed(0)
    router = Router(RouterConfig(input=source, top_k=2), 3, primary_dim=5, vocab_size=8, prompt_dim=4)
    clips = Ragged(0.1 * torch.randn(4000), (1000, 3000))
    primary, prompts = Ragged(torch.randn(14, 5), (4, 10)), Ragged(torch.arange(5), (2, 3))
    routing = router(clips, primary, prompts, torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1)))

    def features(routing: Routing) -> list[Ragged]:
        lengths = [tuple(n for n, r in zip((4, 10), routing.active[:, k].tolist(), strict=True) if r) for k in range(3)]
        return [Ragged(torch.full((sum(n), 4), k + 1.0), n) for k, n in enumerate(lengths)]

    expected = mix(primary, features(routing), routing, (4, 10)).values
    with PretendedDevice() as device:
        put(router)
        noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
        found = router(move(clips), move(primary), move(prompts), put(noise))
        mixed = mix(move(primary), [move(f) for f in features(found)], found, (4, 10)).values
        mixed.square().sum().backward()
        router.advance()
    torch.testing.assert_close(host(mixed), expected.detach(), rtol=1e-4, atol=1e-5)
    device.waits.pop("model/encoders/log_mel.py:mel_filters", None)
    assert dict(device.waits) == {"model/router.py:on_host": 1}, device.kinds


def test_losses() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 9), torch.tensor([1, 2, 3, 4, 5, 6])
    targets = Ragged(torch.tensor([1, 2, 3]), (2, 0, 1))
    with PretendedDevice() as device:
        found = (
            Vocabulary().cross_entropy(put(logits), put(labels)),
            ctc_sum(Ragged(put(logits), (3, 1, 2)), move(targets)),
        )
    torch.testing.assert_close(host(found[0]), Vocabulary().cross_entropy(logits, labels))
    torch.testing.assert_close(host(found[1]), ctc_sum(Ragged(logits, (3, 1, 2)), targets))
    assert dict(device.waits) == {"model/losses/ctc.py:ctc_sum": 1}, device.kinds


def test_tensors_of_two_devices_do_not_mix() -> None:
    with PretendedDevice():
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match=r"add: expected all tensors on one device, but one of shape \(3,\)"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="NumPy"):
            there.numpy()
        assert host(there + torch.tensor(1.0)).tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.segment_reduce(x, "sum", lengths=to_device([1, 2], x.device)),
    ],
)
def test_waits_of_the_host_are_counted_once(wait: Any) -> None:
    with PretendedDevice() as device:
        x = torch.ones(3, device=DEVICE)
        assert not device.waits
        wait(x)
    assert dict(device.waits) == {BACKWARD: 1}, device.kinds


def test_operations_without_waits_are_not_counted() -> None:
    with PretendedDevice() as device:
        x = to_device([1.0, 2.0], DEVICE)
        x[x > 1] = 0.0  # masked_fill
        x.masked_fill(x > 1, 2.0).index_select(0, to_device([1], DEVICE)).add_(1.0)
    assert not device.waits and sum(device.transfers.values()) == 2
