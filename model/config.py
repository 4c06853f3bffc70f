"""The section `model` of a recipe: frozen dataclasses that check their own values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from model.connectors.kinds import ADAPTERS
from model.encoders.families import ENCODER_FAMILIES
from model.errors import UserError, check_least
from model.lengths import TokenRate
from model.llm.mixture import ExpertConfig, ExpertRouterConfig
from model.table import OneOf

FORMER_GATES = {"independent": "data_independent", "dependent": "data_dependent"}
"""The former names of gates, mapped to the current names. Recipes, exports and records of expert usage that earlier
versions wrote contain the former names."""


@dataclass(frozen=True)
class EncoderConfig:
    """An audio encoder."""

    name: str = ""
    """The name of the encoder in parameters, metrics and reports. It is required, must be unique within the model, and
    must not contain a dot."""
    family: Annotated[str, OneOf(ENCODER_FAMILIES)] = "whisper"
    """The kind of network. Plug-ins can add families."""
    weights: str | None = None
    """A local Hugging Face directory or a hub id with pre-trained weights. null builds the encoder from `config` with
    random weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's transformers config that replace its defaults or the checkpoint's values. The additional
    field `do_normalize` says whether each window is first normalized to zero mean and unit variance."""
    length_mode: Literal["full", "trim", "masked"] = "full"
    """The padding of Whisper's windows. `full` pads every window to the checkpoint's 30 s, as in pre-training. `trim`
    encodes only the real length of the clips, which is faster but changes the features of published weights (see
    `docs/finetune.md`). `masked` also encodes only the real length, but gives the same features as windows that are
    padded to 30 s and whose padding is hidden from attention, as in the training of Qwen2-Audio. Voxtral accepts `full`
    and `trim`. The other families accept only `full`, but do not pad to 30 s: `ast` pads windows to its checkpoint's
    length, and all others encode only the real length."""
    trailing_silence_sec: float = 0.0
    """The length in seconds of the silence that is appended to every clip before it is encoded. It is allowed only with
    `length_mode: trim`, and makes the features of published Whisper weights more similar to the features with `full`.
    Encoding it takes as long as encoding audio of this length (see `docs/finetune.md`). The number of audio tokens does
    not change."""
    window_sec: float = 30.0
    """The length of a window, in seconds. Longer clips are cut into windows of this length, which are encoded
    separately, and the features are joined. With Whisper's `length_mode: full` and `masked`, the length must be the
    checkpoint's 30 s."""


@dataclass(frozen=True)
class RouterConfig:
    """The choice of encoder experts for each clip (MoWE-Audio, arXiv 2409.06635; PaM, arXiv 2502.15178)."""

    mode: Literal["primary_plus_experts", "all_routed"] = "primary_plus_experts"
    """The encoders among which the router chooses. With `primary_plus_experts`, `model.primary` encodes every clip, and
    the router chooses among the encoder experts. With `all_routed`, there is no primary encoder, and the router chooses
    among all encoders."""
    gates: tuple[Literal["data_independent", "data_dependent"], ...] = ("data_independent", "data_dependent")
    """The gates, each of which produces one mixture of the experts' features. `data_independent` is a learned vector
    that is the same for all clips. `data_dependent` is computed for each clip from `input`."""
    input: Literal["primary", "log_mel", "prompt"] = "primary"
    """The input of the data-dependent gate: the average over time of the primary encoder's features (`primary`) or of
    the log-mel spectrogram (`log_mel`), or the average embedding of the instruction's tokens (`prompt`)."""
    top_k: int = 1
    """The number of experts that each gate chooses for a clip. More experts cost more compute."""
    temperature: float = 1.0
    """The number by which the gate logits are divided before the softmax. Values above 1 make the probabilities more
    even."""
    noise_std: float = 0.0
    """The standard deviation of Gaussian noise that is added to the gate logits in training only; 0 for no noise."""
    join: Literal["concatenate", "add"] = "concatenate"
    """The way in which the gates' mixtures are joined with the primary encoder's features. `concatenate` joins them
    along the width. `add` projects the mixtures to the primary encoder's width with a linear layer, whose weights are
    initially 0, and adds the result. With `add`, encoder experts can be added to a model without changing its initial
    loss (`docs/published.md`)."""
    added_encoder_warmup_steps: int = 1000
    """The number of steps during which the gate logits of an encoder that was added to a trained model
    (`checkpoint.start_from`) are lowered. At first, the encoder has almost no weight. The reduction then shrinks
    linearly to 0."""

    def __post_init__(self) -> None:
        if not self.gates or len(set(self.gates)) != len(self.gates):
            raise UserError(
                f"model.router.gates = {list(self.gates)}: use data_independent, data_dependent or both, once each"
            )
        check_least("model.router", self, added_encoder_warmup_steps=1, noise_std=0)
        if self.temperature <= 0:
            raise UserError(f"model.router.temperature = {self.temperature}: must be positive")
        if self.mode == "all_routed" and self.join == "add":
            raise UserError("model.router.join = add: mode all_routed has no primary encoder; use concatenate")
        if self.mode == "all_routed" and self.input == "primary" and "data_dependent" in self.gates:
            raise UserError("model.router.input = primary: all_routed has no primary encoder; use log_mel or prompt")


@dataclass(frozen=True)
class RoutingLossConfig:
    """The routing loss L_MoWE and its terms (see `model/losses/routing.py`). Entropies are in nats."""

    weight: float = 0.1
    """The weight of the routing loss in the total loss; 0 disables it."""
    sample_entropy: float = 1.0
    """The weight of the mean entropy of the data-dependent gate. Raise it to route each clip with more confidence."""
    batch_entropy: float = 1.0
    """The weight of the negative entropy of the data-dependent gate's mean over the global batch. Raise it so that the
    batch as a whole uses all experts."""
    independent_entropy: float = 1.0
    """The weight of the entropy of the data-independent gate. Raise it so that this gate prefers few experts."""

    def __post_init__(self) -> None:
        check_least("model.routing_loss", self, weight=0, sample_entropy=0, batch_entropy=0, independent_entropy=0)


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter, which turns the joined features into one vector per audio token. The projector reads its output."""

    kind: Annotated[str, OneOf(ADAPTERS)] = "convolutions"
    """The kind of network (see `docs/connectors.md`). `convolutions` are strided 1-D convolutions, and
    `stacked_convolutions` concatenates their outputs. `stacking` concatenates frames and applies a perceptron.
    `queries` are learned queries that attend to each window of frames. The other kinds are adapters of published
    models: `pooling` averages frames, `pooling_perceptron` applies a perceptron to the average, and `swiglu` and
    `swiglu_post_norm` apply a gated perceptron to stacked frames."""
    hidden_size: int = 1024
    """The width of the layers and of the output."""
    kernel_size: int = 3
    """The kernel size of the convolutions, in frames. It must be at least the largest stride of a convolution."""
    strides: tuple[int, ...] = (2, 2, 2)
    """The down-sampling factors, one per convolution. In the kind `stacked_convolutions`, the last one is the number of
    outputs of the convolutions that are concatenated. The other kinds use only their product, which is the number of
    frames that are stacked, averaged or attended to together. It is 8 by default, so an audio token of the LLM covers
    160 ms."""
    num_queries: int = 1
    """The number of queries per window in the kind `queries`, which is also the number of audio tokens per window."""
    num_layers: int = 2
    """The number of layers in the kind `queries`. Each attends to the window and then applies a perceptron."""
    num_heads: int = 8
    """The number of attention heads in the kind `queries`, which must divide `hidden_size`."""
    bias: bool = True
    """Whether the linear layers of the adapter and the projector have biases. `queries` and kinds with convolutions
    must have them."""
    last_group: Literal["pad", "drop"] = "pad"
    """The treatment of the last frames of a clip if they are too few for an audio token. `pad` pads them to one more
    audio token. `drop` drops them, except in a clip that would otherwise have no audio token. `queries` and
    kinds with convolutions accept only `pad`."""
    block_frames: int = 0
    """The number of 20 ms frames after which the grouping of frames restarts; 0 to group the frames of the whole clip.
    Qwen3-ASR restarts after 50 frames, so its encoder turns a second of audio into 12 frames of 80 ms and one of 40 ms.
    With blocks, a frame at the end of a clip counts only if it contains at least 10 ms of audio. Kinds with
    convolutions and `last_group: drop` accept only 0."""
    normalize: bool = False
    """Whether to normalize the features of every frame, and to scale the audio embeddings to the magnitude of the LLM's
    token embeddings. Use it with a pre-trained LLM."""

    def __post_init__(self) -> None:
        check_least("model.adapter", self, hidden_size=1, num_queries=1, num_layers=1, num_heads=1)
        check_least("model.adapter", self, block_frames=0)
        if self.block_frames and (self.has_convolutions or self.last_group == "drop"):
            raise UserError(
                f"model.adapter.block_frames = {self.block_frames}: cannot be combined with kind convolutions, kind "
                "stacked_convolutions or last_group: drop; remove the key"
            )
        if self.kind == "stacked_convolutions" and len(self.strides) < 2:
            raise UserError(
                f"model.adapter.strides = {list(self.strides)}: the kind stacked_convolutions needs the stride of at "
                "least one convolution, and then the number of its outputs per audio token, such as [3, 2]"
            )
        if self.kind != "queries" and self.num_queries != 1:
            raise UserError(
                f"model.adapter.num_queries = {self.num_queries}: only `kind: queries` uses queries; remove the key"
            )

    @property
    def has_convolutions(self) -> bool:
        """Whether the adapter begins with strided convolutions."""
        return self.kind in ("convolutions", "stacked_convolutions")

    @property
    def rate(self) -> TokenRate:
        """The number of audio tokens as a function of the length of a clip."""
        return TokenRate(self.strides, self.num_queries, self.last_group == "drop", self.block_frames)


@dataclass(frozen=True)
class LLMConfig:
    """The language model, described by its Hugging Face config, from which Megatron-core's config is derived."""

    weights: str | None = None
    """A local directory with config.json and safetensors files, or a hub id. null builds the LLM from `config` with
    random weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config. If `weights` is null, they must include `model_type`, which must be a
    family listed in `docs/llms.md` or one that a plug-in adds. Otherwise, they override the checkpoint's values."""
    experts: tuple[ExpertConfig, ...] = ()
    """FFN experts that are added to the feed-forward layers of a dense LLM (see `docs/experts.md`). A router chooses
    some of them for each token. If the list is empty, the LLM is not changed."""
    moe_layers: Literal["all", "every_2", "second_half"] | tuple[int, ...] = "all"
    """The layers to which `experts` are added: all, every second layer, the second half, or a list of layer numbers,
    counted from 0."""
    top_k: int = 2
    """The number of `experts` to which each token is sent."""
    router: ExpertRouterConfig = field(default_factory=ExpertRouterConfig)

    def __post_init__(self) -> None:
        if not self.experts and (self.moe_layers, self.top_k, self.router) != ("all", 2, ExpertRouterConfig()):
            raise UserError(
                "model.llm: moe_layers, top_k and router have no effect, because model.llm.experts is empty; name the "
                "experts, or remove these keys"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers whose name matches.

    A layer with weight W computes W·x + alpha / rank · B·A·x. Only A [rank, inputs] and B [outputs, rank] are trained.
    If several entries match a layer, the last one applies.
    """

    pattern: str
    """A shell-style pattern for names of linear layers, such as `llm.*.q_proj` or `audio.experts.hubert.*.q_proj`. The
    LLM's layers have their Hugging Face names: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. The
    layers of an expert have names such as `llm.*.experts.NAME.gate_proj`. In an encoder, every linear layer can be
    adapted."""
    rank: int = 8
    """The number of rows of A. A larger rank can learn more and uses more memory."""
    alpha: float = 16.0
    """The scale of the adapter, whose output is multiplied by alpha / rank."""
    train_base: bool = False
    """Whether W and its bias are also trained. If false, they are frozen, and so are the weights of projections that
    are computed together with W in the LLM: q, k and v, or gate and up."""

    def __post_init__(self) -> None:
        check_least(f"lora '{self.pattern}'", self, rank=1)
        if not self.alpha > 0:
            raise UserError(f"lora '{self.pattern}'.alpha = {self.alpha}: must be positive")

    @property
    def scale(self) -> float:
        """The factor by which the adapter's output is multiplied."""
        return self.alpha / self.rank


def is_factor(name: str) -> bool:
    """Return whether the parameter `name` is one of the two factors of a low-rank adapter."""
    return name.endswith((".lora_A", ".lora_B"))


@dataclass(frozen=True)
class ModelConfig:
    """The model, which consists of encoders, a router, an adapter, a projector and an LLM."""

    primary: EncoderConfig | None = None
    """The encoder that encodes every clip. It must be null if `router.mode` is `all_routed`, and is required otherwise.
    """
    experts: tuple[EncoderConfig, ...] = ()
    """The encoder experts, among which the router chooses for each clip. If the list is empty, there is no router."""
    expert_dim: int = 768
    """The width to which each expert's features are projected before they are weighted and summed."""
    router: RouterConfig = field(default_factory=RouterConfig)
    routing_loss: RoutingLossConfig = field(default_factory=RoutingLossConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    ctc_weight: float = 0.0
    """The weight of an auxiliary CTC loss on the adapter's output, for the answers in transcription tasks such as asr.
    With 0, there is no CTC head."""
    ctc_vocabulary: Literal["tokens", "bytes", "pieces"] = "tokens"
    """The symbols of the CTC loss. `tokens` are the LLM's tokens, so the head is as wide as the vocabulary. `bytes` are
    the UTF-8 bytes of the answer in lower case, so the head is small for any LLM. `pieces` are the tokens into which
    the LLM's tokenizer divides the answer in lower case if it applies only its first merges, so that there are only
    `ctc_pieces` different tokens. It must be a byte-level BPE tokenizer."""
    ctc_pieces: int = 600
    """The number of symbols without the blank, if `ctc_vocabulary` is `pieces`. Up to 256 of them are single bytes."""
    ctc_outputs: int = 1
    """The number of CTC outputs per audio token. A clip has a CTC loss only if it has enough outputs for its answer.
    Transcripts have up to 20 bytes per second of speech. At 6.25 audio tokens per second, `bytes` therefore needs 4
    outputs per token. With `adapter.kind: stacked_convolutions`, every part of an audio token has the same number of
    outputs, and all parts share the weights of the head."""
    ctc_feedback: bool = False
    """If true, the probabilities of the CTC outputs are mapped linearly to the width of the LLM and added to the audio
    embeddings, so that the LLM also reads what the CTC head has recognized, as in self-conditioned CTC (arXiv
    2104.02724) and LegoSLM (arXiv 2505.11352). It needs a positive `ctc_weight` and a `ctc_vocabulary` of `bytes` or
    `pieces`. With `pieces`, the mapping starts with the LLM's token embeddings of the pieces. Set
    `adapter.normalize` as well, so that they have the size that the LLM expects."""
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    """Options of the losses, by name, for example `{distillation: {weight: 0.5}}`. Additional losses without a weight
    are disabled. For `next_token`, see `docs/training.md`."""

    def __post_init__(self) -> None:
        check_least("model", self, expert_dim=1, ctc_weight=0, ctc_outputs=1, ctc_pieces=1)
        if self.ctc_feedback and (self.ctc_weight == 0 or self.ctc_vocabulary == "tokens"):
            raise UserError(
                "model.ctc_feedback = true: needs ctc_vocabulary: bytes or pieces and a positive ctc_weight; set both, "
                "or set model.ctc_feedback=false"
            )
        names = [e.name for e in self.encoders]
        if len(set(names)) != len(names) or "" in names:
            raise UserError(f"model.experts: encoder names {names} must be unique and not empty")
        if any("." in n for n in names):
            raise UserError(f"model.experts: encoder names {names} must not contain a dot")
        if self.router.mode == "primary_plus_experts" and self.primary is None:
            raise UserError("model.primary is missing: mode primary_plus_experts needs it; set it, or use all_routed")
        if self.router.mode == "all_routed" and self.primary is not None:
            raise UserError("model.primary is set: mode all_routed has no primary encoder; list it in model.experts")
        if self.router.mode == "all_routed" and not self.experts:
            raise UserError("model.experts is empty: mode all_routed needs at least one encoder")
        if self.experts and not 1 <= self.router.top_k <= len(self.experts):
            raise UserError(f"model.router.top_k = {self.router.top_k}: must be within 1..{len(self.experts)}")

    @property
    def num_pieces(self) -> int | None:
        """The value of `ctc_pieces` if there is a CTC head whose symbols are pieces; None otherwise."""
        return self.ctc_pieces if self.ctc_weight > 0 and self.ctc_vocabulary == "pieces" else None

    @property
    def encoders(self) -> tuple[EncoderConfig, ...]:
        """The primary encoder, if there is one, followed by the experts."""
        return (() if self.primary is None else (self.primary,)) + self.experts
