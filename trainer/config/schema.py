"""One YAML recipe = one `Recipe`. Every section's dataclass lives beside its owner; this file only composes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from model.config import LoraConfig, ModelConfig
from model.errors import UserError
from trainer.checkpoint.config import CheckpointConfig
from trainer.config.evaluation import EvalConfig
from trainer.config.spike import SpikeConfig
from trainer.data.config import DataConfig
from trainer.engine.optim import OptimConfig
from trainer.parallel.topology import ParallelConfig
from trainer.run.restart import RestartConfig
from trainer.storage.open import join_url
from trainer.telemetry.profile_config import ProfileConfig
from trainer.telemetry.tracker import TelemetryConfig


@dataclass(frozen=True)
class TrainConfig:
    """The recipe's `train` section: how long, in which precision, and what fits into memory at a time."""

    steps: int = 1000
    """Optimizer updates."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of parameters and activations; gradients are reduced, and optimizer states kept, in fp32 with either."""
    llm_tokens_per_microbatch: int = 4096
    """Tokens of one packed sequence; a single longer sample makes the packs of its step longer."""
    pack_multiple_tokens: int | None = None
    """Packs are filled up with padding to a multiple of this, so that few lengths occur: a multiple of
    `parallel.tensor` that divides `llm_tokens_per_microbatch`. null: to a multiple of `parallel.tensor`."""
    encoder_batch_sec: float = 480.0
    """Padded audio seconds per encoder call (clips · longest clip); a single longer clip is a call of its own."""
    recompute_llm: bool = False
    """Activation checkpointing of the LLM: less memory, a second forward pass."""
    recompute_encoders: bool = False
    """The same for the encoders' layers."""
    deepspeed: str = "ds_configs/zero3.json"
    """DeepSpeed JSON, relative to the current folder or to the project's."""
    run_dir: str = "runs"
    """The run's own folder is `<run_dir>/<name>`."""
    hang_timeout_sec: float = 600.0
    """A rank without progress for so long (a step, a file of a checkpoint, a batch of an evaluation) counts as hung:
    all ranks leave their stacks in the run's folder and end. 0: never."""
    stop_grace_sec: float = 120.0
    """From the signal that stops the run to the kill, as the scheduler gives it; a save that takes longer is told."""
    deterministic: bool = False
    """Use only deterministic kernels, so that a resumed run is bit-identical on CUDA as it is on CPUs. Slower."""
    debug_plan: bool = False
    """Compare every rank's plan of every step with rank 0's, and stop where they differ."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"train.steps = {self.steps}: must be at least 1")
        if self.llm_tokens_per_microbatch < 1:
            raise UserError(f"train.llm_tokens_per_microbatch = {self.llm_tokens_per_microbatch}: must be at least 1")
        if self.pack_multiple_tokens is not None and self.pack_multiple_tokens < 1:
            raise UserError(f"train.pack_multiple_tokens = {self.pack_multiple_tokens}: must be at least 1, or null")
        if self.hang_timeout_sec < 0:
            raise UserError(f"train.hang_timeout_sec = {self.hang_timeout_sec}: must be positive, or 0 for never")
        if self.stop_grace_sec <= 0:
            raise UserError(f"train.stop_grace_sec = {self.stop_grace_sec}: must be positive")
        if self.encoder_batch_sec <= 0:
            raise UserError(f"train.encoder_batch_sec = {self.encoder_batch_sec}: must be positive")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run."""

    name: str
    """Of the run's folder and of the run in trackers."""
    seed: int = 0
    """Of initialisation, data order, augmentation and router noise."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: tuple[LoraConfig, ...] = ()
    """Low-rank adapters on linear layers of the LLM and of encoders (see docs/adapters.md). Empty: none."""
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    restart: RestartConfig = field(default_factory=RestartConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise UserError(f"name = {self.name!r}: use letters, digits, '.', '_' and '-' (it names the run's folder)")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed = {self.seed}: must be in 0..{2**31 - 1}")

    @property
    def run_url(self) -> str:
        """Folder or bucket's prefix that holds the run's checkpoints, and what an export of them needs."""
        return join_url(self.checkpoint.root or self.train.run_dir, self.name)
