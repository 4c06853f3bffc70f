"""The model's part of a recipe: frozen dataclasses, each field with its meaning, checked where they are defined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from model.errors import UserError, check_least

FORMER_GATES = {"independent": "data_independent", "dependent": "data_dependent"}
"""Names of the gates in recipes, exports and load histories of earlier versions, and their present names."""


@dataclass(frozen=True)
class EncoderConfig:
    """One audio encoder."""

    name: str = ""
    """Unique within the model; appears in parameter names, metrics and reports."""
    family: Literal["whisper", "hubert", "wavlm"] = "whisper"
    weights: str | None = None
    """Local Hugging Face directory or hub id; null builds the encoder from `config` with random weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's transformers config that differ from its defaults, or from the checkpoint's."""
    length_mode: Literal["full", "trim"] = "full"
    """Whisper only. `full`: every window is padded to 30 s as in pre-training. `trim`: the clip's real length."""
    window_sec: float = 30.0
    """Longer audio is encoded in windows of this length and joined. Whisper `full`: the checkpoint's 30 s."""


@dataclass(frozen=True)
class RouterConfig:
    """Who chooses the experts of a clip (MoWE-Audio, arXiv 2409.06635; PaM, arXiv 2502.15178)."""

    mode: Literal["primary_plus_experts", "all_routed"] = "primary_plus_experts"
    """`primary_plus_experts`: `model.primary` always runs. `all_routed`: no primary, every encoder is routed."""
    gates: tuple[Literal["data_independent", "data_dependent"], ...] = ("data_independent", "data_dependent")
    """`independent`: one learned vector for all clips. `dependent`: from the clip (see `input`). One stream each."""
    input: Literal["primary", "log_mel", "prompt"] = "primary"
    """What the dependent gate reads: the average over time of primary features or log-mel, or the instruction."""
    top_k: int = 1
    """Experts per gate and clip."""
    temperature: float = 1.0
    """Divides the gate logits."""
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on the gate logits, in training only."""
    added_encoder_warmup_steps: int = 1000
    """Steps in which an encoder that was added to a trained model comes in (`checkpoint.start_from`)."""

    def __post_init__(self) -> None:
        if not self.gates or len(set(self.gates)) != len(self.gates):
            raise UserError(
                f"model.router.gates = {list(self.gates)}: give data_independent, data_dependent or both, once each"
            )
        check_least("model.router", self, added_encoder_warmup_steps=1, noise_std=0)
        if self.temperature <= 0:
            raise UserError(f"model.router.temperature = {self.temperature}: must be positive")
        if self.mode == "all_routed" and self.input == "primary" and "data_dependent" in self.gates:
            raise UserError("model.router.input = primary: mode all_routed has no primary; use log_mel or prompt")


@dataclass(frozen=True)
class RoutingLossConfig:
    """Weights of L_MoWE and its terms (see `model/routing_loss.py`)."""

    weight: float = 0.1
    sample_entropy: float = 1.0
    batch_entropy: float = 1.0
    independent_entropy: float = 1.0

    def __post_init__(self) -> None:
        check_least("model.routing_loss", self, weight=0, sample_entropy=0, batch_entropy=0, independent_entropy=0)


@dataclass(frozen=True)
class AdapterConfig:
    """Strided 1-D convolutions over the joined feature stream."""

    hidden_size: int = 1024
    kernel_size: int = 3
    strides: tuple[int, ...] = (2, 2, 2)
    """One convolution per entry; their product is the down-sampling (8 by default: one slot per 160 ms)."""

    def __post_init__(self) -> None:
        check_least("model.adapter", self, hidden_size=1)


@dataclass(frozen=True)
class LLMConfig:
    """The language model, in Hugging Face's terms; Megatron-core's config is derived from it."""

    weights: str | None = None
    """Local directory with config.json and safetensors, or hub id; null: random weights from `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Hugging Face config; with `weights` null it must hold `model_type`: llama, mistral, qwen2 or qwen3."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers whose name matches.

    A layer with weight W computes W·x + alpha / rank · B·A·x. Only A [rank, inputs] and B [outputs, rank] learn. If
    several entries match a layer, the last one applies.
    """

    pattern: str
    """A shell-style pattern on names of linear layers, such as `llm.*.q_proj` or `audio.experts.hubert.*.q_proj`. The
    LLM's layers have their Hugging Face names: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. In an
    encoder, every linear layer can be adapted."""
    rank: int = 8
    """The number of rows of A. A larger rank learns more and takes more memory."""
    alpha: float = 16.0
    """The adapter's output is multiplied by alpha / rank."""
    train_base: bool = False
    """Train W and its bias, too. If false, they are frozen, and so are those of the projections that are computed
    together with them: q, k and v of the LLM, and its gate and up."""

    def __post_init__(self) -> None:
        check_least(f"lora '{self.pattern}'", self, rank=1)
        if not self.alpha > 0:
            raise UserError(f"lora '{self.pattern}'.alpha = {self.alpha}: must be positive")

    @property
    def scale(self) -> float:
        """The factor on the adapter's output."""
        return self.alpha / self.rank


def is_factor(name: str) -> bool:
    """Return True if the parameter `name` is one of the two factors of an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


@dataclass(frozen=True)
class ModelConfig:
    """The whole model."""

    primary: EncoderConfig | None = None
    experts: tuple[EncoderConfig, ...] = ()
    expert_dim: int = 768
    """Width to which each expert's features are projected before they are weighted and summed."""
    router: RouterConfig = field(default_factory=RouterConfig)
    routing_loss: RoutingLossConfig = field(default_factory=RoutingLossConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    ctc_weight: float = 0.0
    """Weight of the auxiliary CTC loss of ASR answers on the adapter's output; 0: there is no CTC head."""

    def __post_init__(self) -> None:
        check_least("model", self, expert_dim=1, ctc_weight=0)
        names = [e.name for e in self.encoders]
        if len(set(names)) != len(names) or "" in names:
            raise UserError(f"model.experts: encoder names {names} must be unique and not empty")
        if any("." in n for n in names):
            raise UserError(f"model.experts: encoder names {names} must not contain a dot")
        if self.router.mode == "primary_plus_experts" and self.primary is None:
            raise UserError("model.primary is missing: mode primary_plus_experts needs it (or choose all_routed)")
        if self.router.mode == "all_routed" and self.primary is not None:
            raise UserError("model.primary is set: mode all_routed has none; list the encoder in model.experts")
        if self.router.mode == "all_routed" and not self.experts:
            raise UserError("model.experts is empty: mode all_routed needs at least one")
        if self.experts and not 1 <= self.router.top_k <= len(self.experts):
            raise UserError(f"model.router.top_k = {self.router.top_k}: legal values are 1..{len(self.experts)}")

    @property
    def encoders(self) -> tuple[EncoderConfig, ...]:
        """Primary (if any) and experts."""
        return (() if self.primary is None else (self.primary,)) + self.experts
