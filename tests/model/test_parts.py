"""Tests of the router, mixture, adapter, splice and losses with small constructed tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from model.batch import Ragged
from model.config import AdapterConfig, RouterConfig, RoutingLossConfig
from model.connectors.base import build_adapter
from model.connectors.kinds import ADAPTERS
from model.errors import UserError
from model.losses.ctc import EMBEDDING_SCALE, CTCFeedback, ctc_feasible, ctc_sum
from model.losses.routing import routing_sum
from model.mixture import mix
from model.router import Router, Routing, mean_over_time
from model.splice import splice
from trainer.engine.determinism import deterministic_kernels


def ragged(*sizes: int, width: int = 3) -> Ragged:
    torch.manual_seed(sum(sizes))
    return Ragged(torch.randn(sum(sizes), width), sizes)


def test_padded_and_its_gradient() -> None:
    values = torch.arange(6.0).view(3, 2).requires_grad_()
    padded = Ragged(values, (1, 2)).padded(-1.0)
    assert padded.tolist() == [[[0, 1], [-1, -1]], [[2, 3], [4, 5]]]
    (padded * torch.tensor([[[1.0], [9.0]], [[2.0], [3.0]]])).sum().backward()
    assert values.grad.tolist() == [[1, 1], [2, 2], [3, 3]]


def test_mean_over_time() -> None:
    features = Ragged(torch.tensor([[2.0], [1.0], [3.0]]), (1, 2))
    assert mean_over_time(features).tolist() == [[2.0], [2.0]]


def test_mean_over_time_of_a_long_clip_in_bf16() -> None:
    values = (1 + 0.5 * torch.rand(4500, 4)).to(torch.bfloat16).requires_grad_()
    mean = mean_over_time(Ragged(values, (1500, 3000)))
    expected = torch.stack([values[:1500].double().mean(0), values[1500:].double().mean(0)])
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=0)
    (mean * torch.tensor([[1500.0], [6000.0]])).sum().backward()
    assert values.grad.float().unique().tolist() == [1.0, 2.0]


def test_router_weights_are_the_probabilities_of_the_chosen() -> None:
    torch.manual_seed(0)
    router = Router(RouterConfig(top_k=2, temperature=0.5), 3, primary_dim=4, vocab_size=8, prompt_dim=4)
    primary = ragged(5, 7, width=4)
    routing = router(ragged(5, 7, width=1), primary, Ragged(torch.zeros(2, dtype=torch.int64), (1, 1)))
    logits = router.dependent(mean_over_time(primary)) / 0.5
    torch.testing.assert_close(routing.probs[:, 1], logits.softmax(-1))
    assert routing.chosen.sum(-1).tolist() == [[2, 2], [2, 2]]
    torch.testing.assert_close(routing.weights, routing.probs * routing.chosen)
    assert torch.equal(routing.active, routing.chosen[:, 0] | routing.chosen[:, 1])


def test_noise_changes_the_choice_only_when_given() -> None:
    router = Router(RouterConfig(gates=("data_independent",), noise_std=1.0), 2, 0, 8, 4)
    clips = Ragged(torch.zeros(2), (1, 1))
    prompts = Ragged(torch.zeros(2, dtype=torch.int64), (1, 1))
    quiet = router(clips, None, prompts)
    assert torch.equal(quiet.probs[0], quiet.probs[1])
    noise = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])
    assert router(clips, None, prompts, noise).chosen[:, 0].tolist() == [[True, False], [False, True]]


def test_added_encoder_has_no_effect_at_first_and_full_effect_after_its_warmup() -> None:
    torch.manual_seed(0)
    config = RouterConfig(gates=("data_independent",), added_encoder_warmup_steps=4)
    old, grown = Router(config, 2, 0, 8, 4), Router(config, 3, 0, 8, 4)
    with torch.no_grad():
        grown.independent.logits.copy_(torch.cat([old.independent.logits, torch.tensor([5.0])]))
        grown.steps_to_enter[2] = 4
    clips, prompts = ragged(5, width=1), Ragged(torch.zeros(1, dtype=torch.int64), (1,))
    assert torch.equal(grown(clips, None, prompts).weights[..., :2], old(clips, None, prompts).weights)
    shares = []
    for _ in range(5):
        shares.append(float(grown(clips, None, prompts).probs[0, 0, 2]))
        grown.advance()
    assert shares[0] == 0.0 or shares[0] < 1e-10
    assert shares == sorted(shares)
    torch.testing.assert_close(shares[-1], float(grown.independent.logits.softmax(0)[2]))


def test_mix_sums_weighted_experts_frame_by_frame() -> None:
    probs = torch.tensor([[[0.7, 0.3]], [[0.4, 0.6]]])
    chosen = torch.tensor([[[True, False]], [[False, True]]])
    routing = Routing(probs, chosen, ("data_dependent",))
    first, second = Ragged(torch.ones(2, 1), (2,)), Ragged(torch.full((3, 1), 10.0), (3,))
    primary = Ragged(torch.arange(5.0)[:, None], (2, 3))
    mixed = mix(primary, [first, second], routing, (2, 3))
    expected = torch.tensor([[0, 0.7], [1, 0.7], [2, 6.0], [3, 6.0], [4, 6.0]])
    torch.testing.assert_close(mixed.values, expected)


def test_the_gradient_of_a_mixing_weight_is_summed_over_a_long_clip_in_fp32() -> None:
    probs = torch.tensor([[[0.7, 0.3]], [[0.4, 0.6]]], requires_grad=True)
    routing = Routing(probs, torch.tensor([[[True, True]], [[False, True]]]), ("data_dependent",))
    first = Ragged(torch.ones(3000, 1, dtype=torch.bfloat16), (3000,))
    second = Ragged(torch.full((3010, 1), 2.0, dtype=torch.bfloat16), (3000, 10))
    mixed = mix(None, [first, second], routing, (3000, 10))
    assert mixed.values.dtype == torch.bfloat16
    mixed.values.float().sum().backward()
    assert probs.grad is not None and probs.grad.tolist() == [[[3000.0, 6000.0]], [[0.0, 20.0]]]


def test_mix_with_an_expert_that_no_clip_chose() -> None:
    routing = Routing(torch.tensor([[[0.7, 0.3]]]), torch.tensor([[[True, False]]]), ("data_independent",))
    mixed = mix(None, [Ragged(torch.ones(2, 1), (2,)), Ragged(torch.zeros(0, 1), ())], routing, (2,))
    torch.testing.assert_close(mixed.values, torch.full((2, 1), 0.7))


ADAPTER_CASES = [
    *(AdapterConfig(hidden_size=4, strides=s) for s in ((2, 2, 2), (2,), (4, 2), (3, 1))),
    AdapterConfig("stacked_convolutions", 4, strides=(3, 2)),
    AdapterConfig("stacked_convolutions", 4, strides=(2, 2, 3)),
    AdapterConfig("stacking", 4, strides=(5,)),
    AdapterConfig("stacking", 4, strides=(2, 4)),
    AdapterConfig("queries", 4, strides=(7,), num_heads=2),
    AdapterConfig("queries", 4, strides=(30,), num_heads=2, num_queries=3, num_layers=1),
    AdapterConfig("pooling", 3, strides=(2,)),
    AdapterConfig("pooling_perceptron", 4, strides=(3,)),
    AdapterConfig("pooling_perceptron", 4, strides=(4,), block_frames=10),
    AdapterConfig("stacking", 4, strides=(2, 2), block_frames=16),
    AdapterConfig("swiglu", 64, strides=(8,), bias=False),
    AdapterConfig("swiglu_post_norm", 64, strides=(4,)),
]
DROPPING = [
    AdapterConfig("pooling", 3, strides=(2,), last_group="drop"),
    AdapterConfig("pooling_perceptron", 4, strides=(2, 2), last_group="drop"),
    AdapterConfig("stacking", 4, strides=(4,), last_group="drop", bias=False),
    AdapterConfig("swiglu", 4, strides=(8,), last_group="drop"),
]


def test_every_kind_of_adapter_is_tested() -> None:
    assert {case.kind for case in ADAPTER_CASES} == set(ADAPTERS)


@pytest.mark.parametrize("config", [*ADAPTER_CASES, *DROPPING], ids=lambda c: f"{c.kind}-{c.strides}-{c.last_group}")
def test_adapter_lengths_and_independence_of_the_batch(config: AdapterConfig) -> None:
    torch.manual_seed(0)
    adapter = build_adapter(config, 3)
    features = ragged(17, 1, 40)
    out = adapter(features)
    assert out.lengths == tuple(config.rate.tokens_of_frames(f) for f in features.lengths)
    for i, expected in enumerate(out.split()):
        torch.testing.assert_close(adapter(features.select([i])).values, expected)


@pytest.mark.parametrize(
    "config", [c for c in ADAPTER_CASES if c.strides != (4, 2)], ids=lambda c: f"{c.kind}-{c.strides}"
)
def test_every_frame_reaches_an_audio_token_of_its_own_clip_only(config: AdapterConfig) -> None:
    torch.manual_seed(0)
    adapter, values = build_adapter(config, 3), torch.randn(17 + 9, 3, requires_grad=True)
    out = adapter(Ragged(values, (17, 9)))
    (gradient,) = torch.autograd.grad(out.split()[0].square().sum(), values)
    assert gradient[:17].abs().sum(1).min() > 0 and gradient[17:].abs().max() == 0


@pytest.mark.parametrize("config", DROPPING, ids=lambda c: c.kind)
def test_frames_of_an_incomplete_group_are_dropped(config: AdapterConfig) -> None:
    torch.manual_seed(0)
    adapter, size = build_adapter(config, 3), math.prod(config.strides)
    for frames, groups in ((1, 1), (size, 1), (3 * size, 3), (4 * size - 1, 3)):
        values = torch.randn(frames, 3, requires_grad=True)
        out = adapter(Ragged(values, (frames,)))
        assert out.lengths == (groups,) == (config.rate.tokens_of_frames(frames),)
        (gradient,) = torch.autograd.grad(out.values.square().sum(), values)
        assert gradient[groups * size :].abs().sum() == 0


def test_groups_begin_anew_in_every_block() -> None:
    """Check groups of 4 frames in blocks of 10 frames. The groups of a whole block have 4, 4 and 2 frames.

    With `block_frames`, a clip's last frame needs at least 10 ms of audio.
    """
    adapter = build_adapter(AdapterConfig("pooling", 1, strides=(4,), block_frames=10), 1)
    adapter.norm = nn.Identity()
    values = torch.arange(23.0)[:, None]
    out = adapter(Ragged(values, (23,)))
    assert out.values.flatten().tolist() == [1.5, 5.5, 8.5, 11.5, 15.5, 18.5, 21.0] and out.lengths == (7,)
    rate = adapter.rate
    assert [rate.frames_of_samples(n) for n in (1, 320, 479, 480, 640, 3_359, 3_360)] == [1, 1, 1, 2, 2, 10, 11]
    assert [rate.tokens_of_samples(n) for n in (3_200, 3_359, 3_360, 6_400)] == [3, 3, 4, 6]
    for wrong in ({"kind": "convolutions"}, {"kind": "pooling", "last_group": "drop"}):
        with pytest.raises(
            UserError, match=r"block_frames = 10: cannot be combined with kind convolutions, kind stacked"
        ):
            AdapterConfig(block_frames=10, **wrong)  # type: ignore[arg-type]


def test_pooling_equals_torchs() -> None:
    torch.manual_seed(0)
    adapter = build_adapter(AdapterConfig("pooling", 3, strides=(2,), last_group="drop"), 3)
    values = torch.randn(11, 3)
    pooled = nn.functional.avg_pool1d(values.T, 2, stride=2).T
    wanted = nn.functional.layer_norm(pooled, (3,))
    torch.testing.assert_close(adapter(Ragged(values, (11,))).values, wanted)


def test_queries_give_50_audio_tokens_per_30_seconds() -> None:
    samples = 30 * 16000
    assert AdapterConfig("queries", strides=(30,)).rate.tokens_of_samples(samples) == 50
    assert AdapterConfig("queries", strides=(1500,), num_queries=50).rate.tokens_of_samples(samples) == 50
    assert AdapterConfig("queries", strides=(1500,), num_queries=50).rate.tokens_of_samples(samples + 1) == 100


def test_values_that_a_kind_of_adapter_refuses() -> None:
    with pytest.raises(UserError, match=r"model\.adapter\.num_queries = 2: only `kind: queries` uses queries"):
        AdapterConfig(num_queries=2)
    with pytest.raises(UserError, match=r"model\.adapter\.num_heads = 3: must divide hidden_size = 4"):
        build_adapter(AdapterConfig("queries", 4, num_heads=3), 3)
    with pytest.raises(UserError, match=r"model\.adapter\.bias = false: the kind convolutions always has biases"):
        build_adapter(AdapterConfig(bias=False), 3)
    with pytest.raises(UserError, match=r"model\.adapter\.last_group = drop: the kind queries always pads"):
        build_adapter(AdapterConfig("queries", 4, num_heads=2, last_group="drop"), 3)
    with pytest.raises(UserError, match=r"model\.adapter\.hidden_size = 4: pooling does not change .* must be 3"):
        build_adapter(AdapterConfig("pooling", 4), 3)
    with pytest.raises(UserError, match=r"model\.adapter\.hidden_size = 5: must be even"):
        build_adapter(AdapterConfig("swiglu", 5), 3)
    with pytest.raises(UserError, match=r"model\.adapter\.kernel_size = 4: must be odd"):
        build_adapter(AdapterConfig(kernel_size=4), 3)


@pytest.mark.parametrize("kind", ["convolutions", "stacking"])
def test_a_new_adapter_neither_shrinks_nor_hides_its_input(kind: str) -> None:
    torch.manual_seed(0)
    adapter = build_adapter(AdapterConfig(kind, hidden_size=256), 192)
    out = adapter(Ragged(torch.randn(800, 192), (800,))).values.detach()
    varying = (out - out.mean(0)).square().mean().sqrt()
    assert 0.3 < varying < 3
    assert varying > 0.5 * out.square().mean().sqrt()


def test_splice_puts_audio_in_order_and_cuts_the_gradient() -> None:
    text = torch.zeros(4, 2, requires_grad=True)
    audio = torch.tensor([[1.0, 1.0], [2.0, 2.0]], requires_grad=True)
    out = splice(text, torch.tensor([False, True, False, True]), audio)
    assert out[:, 0].tolist() == [0, 1, 0, 2]
    out.sum().backward()
    assert text.grad[:, 0].tolist() == [1, 0, 1, 0] and audio.grad.tolist() == [[1, 1], [1, 1]]


def test_routing_loss_by_hand() -> None:
    probs = torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.1, 0.9]]])
    routing = Routing(probs, probs > 0.5, ("data_independent", "data_dependent"))
    confident = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    loss = routing_sum(RoutingLossConfig(), routing) / 2
    assert float(loss) == pytest.approx(confident - math.log(2) + math.log(2), rel=1e-5)
    only_confident = RoutingLossConfig(batch_entropy=0, independent_entropy=0)
    assert float(routing_sum(only_confident, routing) / 2) == pytest.approx(confident, rel=1e-5)


def test_routing_loss_of_parts_adds_up_to_that_of_the_whole() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 2, 3, requires_grad=True)

    def routing(rows: slice) -> Routing:
        probs = logits[rows].softmax(-1)
        return Routing(probs, probs > 1, ("data_independent", "data_dependent"))

    parts = (slice(0, 2), slice(2, 5), slice(5, 5))
    whole = routing_sum(RoutingLossConfig(), routing(slice(None)))
    (expected,) = torch.autograd.grad(whole, logits)
    local: list[torch.Tensor] = []

    def keep(sums: torch.Tensor) -> torch.Tensor:
        local.append(sums)
        return sums

    for rows in parts:
        routing_sum(RoutingLossConfig(), routing(rows), keep)
    total, found = torch.stack(local).sum(0), torch.zeros_like(expected)
    shares = [routing_sum(RoutingLossConfig(), routing(rows), lambda _: total) for rows in parts]
    torch.testing.assert_close(sum(shares), whole)
    for share in shares:
        found += torch.autograd.grad(share, logits)[0]
    torch.testing.assert_close(found, expected)


def test_ctc_is_a_sum_over_the_clips_that_have_targets() -> None:
    logits = ragged(6, 4, 5, width=4)
    targets = Ragged(torch.tensor([0, 1, 2]), (2, 0, 1))
    parts = [
        ctc_sum(logits.select([0]), Ragged(torch.tensor([0, 1]), (2,))),
        ctc_sum(logits.select([2]), Ragged(torch.tensor([2]), (1,))),
    ]
    torch.testing.assert_close(ctc_sum(logits, targets), sum(parts))
    assert ctc_sum(logits, Ragged(torch.zeros(0, dtype=torch.int64), (0, 0, 0))) == 0


@pytest.mark.parametrize("seed", range(4))
def test_ctc_of_deterministic_operations_is_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    audio_tokens, wanted = (9, 3, 4, 1, 30), ([1, 1, 2, 0], [2, 2], [], [3], [0, 1, 2, 3, 3, 3, 1] * 2)
    logits = 5 * torch.randn(sum(audio_tokens), 5)
    targets = Ragged(torch.tensor([t for one in wanted for t in one]), tuple(len(one) for one in wanted))
    found = []
    for deterministic in (False, True):
        leaf = logits.clone().requires_grad_()
        with deterministic_kernels(deterministic):
            loss = ctc_sum(Ragged(leaf, audio_tokens), targets)
            (grad,) = torch.autograd.grad(loss, leaf)
        found.append((loss.detach(), grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_ctc_feedback_reads_the_symbols_of_every_output_and_no_blank_at_first() -> None:
    feedback = CTCFeedback(num_outputs=2, num_symbols=256, llm_dim=8)
    sure = 50.0 * torch.nn.functional.one_hot(torch.tensor([[7, 256], [256, 7], [256, 256]]), 257).flatten(1)
    first, second, blank = feedback(sure)
    assert first.std() > 0.1 and second.std() > 0.1 and not torch.allclose(first, second)
    torch.testing.assert_close(blank, torch.zeros(8), rtol=0, atol=1e-6)
    torch.testing.assert_close(first, feedback.linear.weight[:, 7])
    torch.testing.assert_close(second, feedback.linear.weight[:, 257 + 7])
    logits = sure.clone().requires_grad_()
    feedback(0.01 * logits).sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0, "the LLM's loss must also train the CTC head"


def test_ctc_feedback_can_start_with_given_embeddings() -> None:
    embeddings = torch.randn(5, 8)
    feedback = CTCFeedback(num_outputs=2, num_symbols=5, llm_dim=8, embeddings=embeddings)
    sure = 50.0 * torch.nn.functional.one_hot(torch.tensor([[3, 5], [5, 1], [5, 5]]), 6).flatten(1)
    wanted = EMBEDDING_SCALE / 2**0.5 * torch.cat([embeddings[[3, 1]], torch.zeros(1, 8)])
    torch.testing.assert_close(feedback(sure), wanted, rtol=0, atol=1e-6)


def test_ctc_feasibility_counts_repeats() -> None:
    assert ctc_feasible(torch.tensor([1, 2]), 2) and not ctc_feasible(torch.tensor([1, 1]), 2)
    assert not ctc_feasible(torch.zeros(0, dtype=torch.int64), 9)
