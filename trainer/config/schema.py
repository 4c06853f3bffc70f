"""The recipe of a run. The dataclass of each section is defined next to the code that reads it and composed here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from model.config import LoraConfig, ModelConfig
from model.errors import UserError
from model.llm.stages import Recompute
from trainer.checkpoint.config import CheckpointConfig
from trainer.config.evaluation import EvalConfig
from trainer.config.spike import SpikeConfig
from trainer.data.config import DataConfig, DatasetConfig
from trainer.engine.ds_config import Gathering
from trainer.engine.optim import OptimConfig
from trainer.engine.stages import StageConfig, staged_optim
from trainer.parallel.topology import ParallelConfig
from trainer.run.restart import RestartConfig
from trainer.scoring.declared import TaskConfig
from trainer.storage.open import join_url
from trainer.telemetry.config import TelemetryConfig
from trainer.telemetry.profile_config import ProfileConfig


@dataclass(frozen=True)
class TrainConfig:
    """The recipe's `train` section: the length, the precision and the memory limits of training."""

    steps: int = 1000
    """The number of training steps. Each step is one optimizer update on one global batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The dtype of parameters and activations.

    In either case, optimizer states are stored in fp32, and gradients are reduced in fp32 unless
    `parallel.grad_reduce_dtype` is bf16.
    """
    llm_tokens_per_microbatch: int = 4096
    """The largest number of tokens in one packed sequence (a pack). Lower it if the LLM runs out of memory.

    If a single sample is longer, all packs of its step are as long as that sample.
    """
    pack_multiple_tokens: int | None = None
    """Every pack is padded to a multiple of this number of tokens, so that only a few lengths occur.

    It must divide `llm_tokens_per_microbatch` and be a multiple of `parallel.tensor` or, if `parallel.context` is above
    1, of 2 · `parallel.context` · `parallel.tensor`. null uses this smallest multiple.
    """
    encoder_batch_sec: float = 480.0
    """The largest amount of padded audio in one encoder call, in seconds (the number of clips times the longest clip).

    An encoder call is one forward pass of an encoder on a batch of clips. A clip that is longer than this value has a
    call of its own. Lower the value if an encoder runs out of memory.
    """
    recompute_llm: Recompute = "none"
    """The activations of the LLM that are recomputed in the backward pass, which saves memory but costs time.

    `pointwise` recomputes norms and SwiGLU, which takes little time. `selective` recomputes attention as well, but no
    linear layers. `full` keeps only the inputs of layers and recomputes everything else.
    """
    recompute_encoders: bool = False
    """Whether to recompute the activations of the encoders' layers in the backward pass."""
    recompute_encoder_calls: bool = False
    """Whether to run each encoder call again in the backward pass, which costs one more forward pass of the encoders.

    Only the activations of one call at a time are then in memory, regardless of the size of the global batch. The
    mixture, the adapter and the projector are recomputed as well. With `recompute_encoders`, a call that runs again
    keeps only the inputs of its layers.
    """
    gather_audio_weights: Gathering = "per_update"
    """How often the weights of encoders, router, adapter and projector are gathered from the ranks that share them.

    `per_update` gathers them once per update, and reduces gradients once per update. Every rank then holds the whole
    weights of its encoders during a step, and their whole gradients in fp32 during the backward pass. `per_module`
    gathers the weights of each module around each of its calls, which saves this memory but takes much longer.
    """
    deepspeed: str = "ds_configs/zero3.json"
    """The path to the DeepSpeed JSON file. A relative path is resolved against the current folder or, if there is no
    such file, against the project's folder."""
    run_dir: str = "runs"
    """The folder that contains the folders of runs. The run's own folder is `<run_dir>/<name>`."""
    hang_timeout_sec: float = 600.0
    """The number of seconds without progress after which a rank counts as hung; 0 disables the check.

    Progress is a step, a file of a checkpoint or a batch of an evaluation. After this time without progress, all ranks
    write their stacks to the run's folder and exit. Raise the value if a healthy step takes longer.
    """
    stop_grace_sec: float = 120.0
    """The number of seconds between the scheduler's signal that asks the run to stop and the signal that kills it.

    If the last save takes longer, the event `save_failed` is emitted.
    """
    compare_replicas_every_steps: int = 100
    """The number of steps between comparisons of the LLM's replicas, which detect a faulty device; 0 for never.

    Unless it is 0, the weights of the replicas are also compared before every save, so that no faulty weights are
    saved. If they differ, the run ends without saving, and the event `corrupted` names the ranks and their nodes.
    """
    deterministic: bool = False
    """Whether to use only deterministic kernels, so that a resumed run is bit-identical on CUDA.

    On CPUs, a resumed run is always bit-identical. Deterministic kernels are slower.
    """
    debug_plan: bool = False
    """Whether to check in every step that all ranks have computed the same plan for the exchange of clips and samples.

    If the plans differ, the run ends. Use this check to find out why a run hangs.
    """

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"train.steps = {self.steps}: must be at least 1")
        if self.llm_tokens_per_microbatch < 1:
            raise UserError(f"train.llm_tokens_per_microbatch = {self.llm_tokens_per_microbatch}: must be at least 1")
        if self.pack_multiple_tokens is not None and self.pack_multiple_tokens < 1:
            raise UserError(f"train.pack_multiple_tokens = {self.pack_multiple_tokens}: must be at least 1, or null")
        if self.hang_timeout_sec < 0:
            raise UserError(f"train.hang_timeout_sec = {self.hang_timeout_sec}: must be positive, or 0 for never")
        if self.compare_replicas_every_steps < 0:
            raise UserError(
                f"train.compare_replicas_every_steps = {self.compare_replicas_every_steps}: must be positive, or 0 for "
                "never"
            )
        if self.stop_grace_sec <= 0:
            raise UserError(f"train.stop_grace_sec = {self.stop_grace_sec}: must be positive")
        if self.encoder_batch_sec <= 0:
            raise UserError(f"train.encoder_batch_sec = {self.encoder_batch_sec}: must be positive")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run: everything that determines its result, and where the result is stored."""

    name: str
    """The name of the run, of its folder, and of the run in trackers."""
    seed: int = 0
    """The seed for the initial weights, the order of the data, augmentation and router noise."""
    plugins: tuple[str, ...] = ()
    """The plug-ins that the recipe needs, as names of installed packages or of single entry points.

    See `docs/extending.md`.
    """
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks of your own, in addition to the built-in ones (see docs/evaluation.md)."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stages: tuple[StageConfig, ...] = ()
    """Parts of the run that train different parameters, one after the other (see docs/training.md). If the list is
    empty, there is one stage, which trains everything that `optim.parts` does not freeze."""
    lora: tuple[LoraConfig, ...] = ()
    """Low-rank adapters on linear layers of the LLM and of encoders (see docs/adapters.md); empty for none."""
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
        self._check_stages()

    def _check_stages(self) -> None:
        names, total = [stage.name for stage in self.stages], sum(stage.steps for stage in self.stages)
        if len(set(names)) != len(names) or "" in names:
            raise UserError(f"stages: names {names} must be unique and not empty")
        if self.stages and total != self.train.steps:
            raise UserError(
                f"train.steps = {self.train.steps}: the stages have {total} steps together; set it to {total}, remove "
                "it, or change stages.N.steps"
            )
        known = [dataset.name for dataset in self.data.datasets]
        for stage in self.stages:
            for name in stage.weights:
                if name not in known:
                    raise UserError(f"stages '{stage.name}'.weights.{name}: no such dataset; the datasets are {known}")

        _ = self.staged_optim, self.staged_data  # They raise if a value is not valid in a stage.

    @property
    def staged_optim(self) -> OptimConfig:
        """The section `optim`, with the settings of every stage."""
        return staged_optim(self.optim, self.stages)

    @property
    def staged_data(self) -> DataConfig:
        """The section `data`, in which the weights of datasets in the stages are schedules over the whole run."""
        if not any(stage.weights for stage in self.stages):
            return self.data
        return replace(self.data, datasets=tuple(map(self._staged_dataset, self.data.datasets)))

    def _staged_dataset(self, dataset: DatasetConfig) -> DatasetConfig:
        points: list[tuple[float, float]] = []
        start, total = 0, self.train.steps
        for stage in self.stages:
            begin, end = start / total, (start + stage.steps) / total
            if dataset.name in stage.weights:
                points.append((begin, stage.weights[dataset.name]))
            else:
                points.append((begin, dataset.weight_at(begin)))
                points += [point for point in dataset.schedule if begin < point[0] < end]
            start += stage.steps
        return replace(dataset, weight=tuple(points))

    @property
    def run_url(self) -> str:
        """The folder or bucket prefix of the run's checkpoints and of the other files that an export needs."""
        return join_url(self.checkpoint.root or self.train.run_dir, self.name)
