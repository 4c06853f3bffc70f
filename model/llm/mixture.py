"""The description of an LLM's FFN experts, and functions that read it from a Hugging Face config.

A family with experts, such as Mixtral, describes them in its Hugging Face config. A dense LLM gets experts from the
recipe (`model.llm.experts`). The additional field `ffn_experts` of its Hugging Face config then describes them.

Shapes: E experts, N null experts, k chosen experts per token, F width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from model.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig  # It is not imported at run time, since recipes are read without PyTorch.


@dataclass(frozen=True)
class Clamp:
    """The clamped SwiGLU of GPT-OSS: (u + 1) · g · sigmoid(α g), with g = min(gate, c) and u = min(max(up, -c), c)."""

    alpha: float
    """The factor α."""
    limit: float
    """The bound c."""


@dataclass(frozen=True)
class Mixture:
    """The FFN experts of an LLM."""

    experts: tuple[str, ...]
    """The names of the E experts of a layer, in the order of the router's outputs."""
    top_k: int
    """The number k of experts to which a token is sent."""
    width: int
    """The width F of an expert."""
    layers: tuple[int, ...]
    """The layers with experts, counted from 0, in ascending order. Every other layer has one feed-forward network."""
    normalize: bool
    """True if the weights of the chosen experts are divided by their sum, which is equivalent to a softmax over the
    chosen experts alone. False if the weights are the probabilities of a softmax over all experts."""
    forced: str | None = None
    """The expert to which every token is sent with weight 1, for tests; None for the router's choice."""
    biases: bool = False
    """True if the router and the projections of experts have biases."""
    clamp: Clamp | None = None
    """The gate of an expert if it is a clamped SwiGLU; None for SwiGLU."""
    returns_scores: bool = False
    """True if transformers' layer expects the router's scores next to the output of its feed-forward network."""
    num_null: int = 0
    """The number N of null experts, which compute nothing (AdaMoE, arXiv 2406.13233). In the order of the router's
    outputs, they follow the E experts. Their weights are 0."""
    bias_rate: float = 0.0
    """The amount by which a step changes the biases that balance the experts; 0 if the routers have no such biases
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    jitter: float = 0.0
    """The largest relative change ε to the inputs of routers in training (`model.llm.jitter`); 0 for no change."""
    shared: tuple[str, ...] = ()
    """The names of the shared experts of a layer, which process every token, in addition to the chosen experts."""
    shared_width: int = 0
    """The width of a shared expert."""
    shared_gate: bool = False
    """True if the output of a shared expert is multiplied by the sigmoid of a linear function of the token, as in
    Qwen2-MoE. False if it is added unchanged, as in DeepSeek-V3."""

    @property
    def num_choices(self) -> int:
        """The number E + N of outputs of the router."""
        return len(self.experts) + self.num_null

    @property
    def mean_top_k(self) -> float:
        """The mean number of experts that process a token if all choices of the router are made equally often."""
        return self.top_k * len(self.experts) / self.num_choices

    def router_parts(self, router: str) -> list[tuple[str, int]]:
        """Return the name and the number of outputs of each part of a layer's router, in order.

        Args:
            router: The name of the router. If it contains `{e}`, which stands for the name of an expert, every expert
                has its own part, and all null experts share one part.
        """
        if "{e}" not in router:
            assert not self.num_null, "null experts need a router that consists of parts"
            return [(router, len(self.experts))]
        null = [(router.format(e=NULL), self.num_null)] if self.num_null else []
        return [(router.format(e=expert), 1) for expert in self.experts] + null


BASE = "base"
"""The value of `from` for an expert whose initial weights are the feed-forward network of the LLM itself."""
NULL = "null"
"""The name of the null experts of a layer in tensors, metrics and reports."""
SCORE_BIAS = "score_bias"
"""The last part of the names of the tensors with the biases that balance the experts."""
FIELD = "ffn_experts"
"""The additional field in the Hugging Face config of a dense LLM to which experts were added."""


@dataclass(frozen=True)
class ExpertConfig:
    """An FFN expert that starts as the feed-forward network of a dense LLM."""

    name: str
    """The unique name of the expert in tensors, metrics and reports. It consists of letters, digits, `_` and `-`."""
    from_: str = BASE
    """The source of the expert's initial weights: a run, a checkpoint or an export whose LLM has the same architecture,
    or `base` for `model.llm.weights`. Low-rank adapters of a run are merged into the weights."""
    shared: bool = False
    """Whether the expert is shared. A shared expert processes every token, in addition to the `top_k` experts that the
    router chooses. Its output is added to theirs."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"model.llm.experts: name = {self.name!r}: use letters, digits, '_' and '-'")
        if self.name == NULL:
            raise UserError(f"model.llm.experts: name = {self.name!r}: null experts have this name; choose another one")


@dataclass(frozen=True)
class ExpertRouterConfig:
    """The routers of an LLM to which the recipe adds experts. Every layer with experts has an fp32 router."""

    normalize: bool = True
    """Whether the weights of the chosen experts are divided by their sum. This equals a softmax over the chosen
    experts, as in Uni-MoE's code and Mixtral. If false, the softmax is over all experts, as in Uni-MoE's paper. Null
    experts are never part of the sum."""
    forced: str | None = None
    """The expert to which every token is sent with weight 1; null for the router's choice. Use it to test that an
    expert equals the run from which it was taken."""
    null_experts: int = 0
    """The number of null experts per layer. They compute nothing, so a token that chooses one of them uses fewer than
    `top_k` experts. Raise `top_k` by the number of null experts that a token should choose on average, and balance the
    experts by a loss or by `bias_rate`."""
    bias_rate: float = 0.0
    """The amount by which an update of the weights changes the router's biases, which balance the experts without a
    loss; 0 for no biases. A typical value is 0.001. A bias is added to the probability of an expert only for the choice
    of experts. It rises if the expert was chosen less often than the average in the global batch, and falls if the
    expert was chosen more often."""
    jitter: float = 0.0
    """The largest relative change to the values that a router reads in training, as in Switch Transformer; 0 for no
    change. A typical value is 0.01. Each value is multiplied by a random number between 1 - jitter and 1 + jitter."""
    shared_gate: bool = False
    """Whether the output of each shared expert is multiplied by a learned gate, the sigmoid of a linear function of the
    token, as in Qwen2-MoE. If false, it is added unchanged, as in DeepSeek-V3."""

    def __post_init__(self) -> None:
        if self.null_experts < 0:
            raise UserError(f"model.llm.router.null_experts = {self.null_experts}: must be at least 0")
        if not 0 <= self.bias_rate < 1:
            raise UserError(f"model.llm.router.bias_rate = {self.bias_rate}: must be at least 0 and below 1")
        if not 0 <= self.jitter < 1:
            raise UserError(f"model.llm.router.jitter = {self.jitter}: must be at least 0 and below 1")

    def settings(self) -> dict[str, Any]:
        """Return the fields other than `normalize` that differ from their default values."""
        defaults = ExpertRouterConfig()
        return {
            name: getattr(self, name)
            for name in ("forced", "null_experts", "bias_rate", "jitter", "shared_gate")
            if getattr(self, name) != getattr(defaults, name)
        }


def describe_experts(
    experts: Sequence[ExpertConfig],
    layers: str | Sequence[int],
    top_k: int,
    router: ExpertRouterConfig,
    num_layers: int,
) -> dict[str, Any]:
    """Return the value of `ffn_experts` for the Hugging Face config of a dense LLM to which experts are added.

    Args:
        experts: The experts. Only the names, and whether an expert is shared, are used.
        layers: The value of `model.llm.moe_layers`.
        top_k: The number of experts per token.
        router: The router settings.
        num_layers: The number of layers of the LLM.

    Raises:
        UserError: If a value is invalid.
    """
    patterns = {
        "all": range(num_layers),
        "every_2": range(1, num_layers, 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    numbers = list(patterns[layers]) if isinstance(layers, str) else list(layers)
    if not numbers or numbers != sorted({n for n in numbers if 0 <= n < num_layers}):
        raise UserError(
            f"model.llm.moe_layers = {layers}: use {', '.join(patterns)}, or ascending numbers within "
            f"0..{num_layers - 1}"
        )
    everyone = [expert.name for expert in experts]
    if len(set(everyone)) < len(everyone):
        raise UserError(f"model.llm.experts: the names {', '.join(everyone)} must be unique")
    names, shared = ([e.name for e in experts if e.shared is kind] for kind in (False, True))
    if not names:
        raise UserError(
            "model.llm.experts: all experts are shared; set shared: false for those that the router chooses"
        )
    if router.shared_gate and not shared:
        raise UserError(
            "model.llm.router.shared_gate = true: no expert is shared; set shared: true for one of model.llm.experts, "
            "or remove the key"
        )
    if not 1 <= top_k <= len(names) + router.null_experts:
        raise UserError(f"model.llm.top_k = {top_k}: must be within 1..{len(names) + router.null_experts}")
    if router.forced is not None and router.forced not in names:
        raise UserError(f"model.llm.router.forced = {router.forced}: must be one of {', '.join(names)}, or null")
    described = {"experts": names, "layers": numbers, "top_k": top_k, "normalize": router.normalize}
    return {**described, **({"shared": shared} if shared else {}), **router.settings()}


def read_experts(tree: object, num_layers: int) -> dict[str, Any]:
    """Check a value of `ffn_experts` from a config file, which may have been edited, and return it.

    Args:
        tree: The value, of any type.
        num_layers: The number of layers of the LLM.

    Raises:
        UserError: If `describe_experts` could not have returned this value for an LLM with `num_layers` layers.
    """
    kinds = {"experts": list, "layers": list, "top_k": int, "normalize": bool}
    optional = {"forced": str, "null_experts": int, "bias_rate": float, "jitter": float, "shared_gate": bool}
    found = tree if isinstance(tree, dict) else {}
    if (
        not {*kinds} <= {*found} <= {*kinds, *optional, "shared"}
        or any(type(value) is not {**kinds, **optional, "shared": list}[key] for key, value in found.items())
        or not all(isinstance(name, str) for name in (*found["experts"], *found.get("shared", ())))
        or not all(type(number) is int for number in found["layers"])
    ):
        raise UserError(f"{FIELD} = {repr(tree)[:80]}: needs {', '.join(kinds)} of the right types")
    experts = [ExpertConfig(name) for name in found["experts"]]
    experts += [ExpertConfig(name, shared=True) for name in found.get("shared", ())]
    router = ExpertRouterConfig(found["normalize"], **{key: found[key] for key in optional if key in found})
    return describe_experts(experts, found["layers"], found["top_k"], router, num_layers)


def described(hf_config: PretrainedConfig) -> Mixture | None:
    """Return the experts that a recipe added to a dense LLM; None if there are none."""
    stored = getattr(hf_config, FIELD, None)
    if stored is None:
        return None
    return Mixture(
        experts=tuple(stored["experts"]),
        top_k=stored["top_k"],
        width=hf_config.intermediate_size,
        layers=tuple(stored["layers"]),
        normalize=stored["normalize"],
        forced=stored.get("forced"),
        num_null=stored.get("null_experts", 0),
        bias_rate=stored.get("bias_rate", 0.0),
        jitter=stored.get("jitter", 0.0),
        shared=tuple(stored.get("shared", ())),
        shared_width=hf_config.intermediate_size,
        shared_gate=stored.get("shared_gate", False),
    )


def every_layer(hf_config: PretrainedConfig) -> tuple[int, ...]:
    """Return the numbers of all layers."""
    return tuple(range(hf_config.num_hidden_layers))


def mixtral(hf_config: PretrainedConfig) -> Mixture | None:
    """Return the experts of a Mixtral model; None if the config describes no experts."""
    if not hf_config.num_local_experts:
        return None
    return Mixture(
        experts=tuple(map(str, range(hf_config.num_local_experts))),
        top_k=hf_config.num_experts_per_tok,
        width=hf_config.intermediate_size,
        layers=every_layer(hf_config),
        normalize=True,
    )


def qwen3_moe(hf_config: PretrainedConfig) -> Mixture | None:
    """Return the experts of a Qwen3-MoE model; None if no layer has experts."""
    # Each access to a field of the config takes microseconds, so the fields are read outside the loop.
    dense, step = set(hf_config.mlp_only_layers), hf_config.decoder_sparse_step
    layers = tuple(n for n in every_layer(hf_config) if n not in dense and (n + 1) % step == 0)
    if not layers or not hf_config.num_experts:
        return None
    return Mixture(
        experts=tuple(map(str, range(hf_config.num_experts))),
        top_k=hf_config.num_experts_per_tok,
        width=hf_config.moe_intermediate_size,
        layers=layers,
        normalize=bool(hf_config.norm_topk_prob),
    )


def qwen2_moe(hf_config: PretrainedConfig) -> Mixture | None:
    """Return the experts of a Qwen2-MoE model; None if no layer has experts."""
    found = qwen3_moe(hf_config)
    if found is None:
        return None
    width = hf_config.shared_expert_intermediate_size
    return replace(found, shared=("shared",), shared_width=width, shared_gate=True)


def gpt_oss(hf_config: PretrainedConfig) -> Mixture | None:
    """Return the experts of a GPT-OSS model; None if the config describes no experts."""
    found = mixtral(hf_config)
    if found is None:
        return None
    clamp = Clamp(float(hf_config.swiglu_alpha), float(hf_config.swiglu_limit))
    return replace(found, biases=True, clamp=clamp, returns_scores=True)
