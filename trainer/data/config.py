"""The data's part of a recipe: frozen dataclasses, each field with its meaning, checked where they are defined."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.errors import UserError, check_least
from model.lengths import SAMPLE_RATE

PLACEHOLDER = "<SpeechHere>"
"""The token whose positions take audio embeddings (MoWE-Audio's released prompt)."""

MOWE_TEMPLATE = "Given the following speech tokens: \n<speech>{audio}</speech>\n\n{instruction}"
"""Prompt of MoWE-Audio's released wrapper."""


@dataclass(frozen=True)
class DatasetConfig:
    """One set of samples: a manifest (shards are made from it into `data.cache_dir`) or a folder of shards."""

    name: str = ""
    """Unique among the sets; appears in skip lists and in the data state."""
    manifest: str | None = None
    """JSONL in the kit's format, relative to `data.root`; its audio paths are relative to the manifest's folder."""
    shards: str | None = None
    """Folder or bucket with shards.json (see `tools.make_shards`): a path relative to `data.root`, or a URL
    (`s3://bucket/prefix`, `gs://…`, `az://…`)."""
    split: str = "train"
    """Split to train on. Evaluation reads `data.eval_splits` of the same set."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; empty: all."""
    subsets: tuple[str, ...] = ()
    """Only these subsets; empty: all."""
    weight: float | tuple[tuple[float, float], ...] = 1.0
    """Share of samples drawn from this set, relative to the other sets. A list of [progress, weight] points makes it
    piecewise constant over the training's progress (0 to 1): [[0, 0], [0.4, 1]] lets the set join at 40 %."""
    augment_strength: float = 1.0
    """Share of `data.augment`'s strength that this set gets."""

    def __post_init__(self) -> None:
        where = f"data.datasets '{self.name}'"
        if not self.name or "/" in self.name:
            raise UserError(f"data.datasets: name {self.name!r} must not be empty or contain '/'")
        if (self.manifest is None) == (self.shards is None):
            raise UserError(f"{where}: give either manifest or shards")
        points = self.schedule
        if not points or points[0][0] != 0 or list(points) != sorted(points, key=lambda p: p[0]):
            raise UserError(f"{where}: weight = {self.weight}: [progress, weight] points must rise from progress 0")
        if any(len(p) != 2 or p[1] < 0 or not 0 <= p[0] < 1 for p in points):
            raise UserError(f"{where}: weight = {self.weight}: progress must be in [0, 1), weights at least 0")
        if not 0 <= self.augment_strength <= 1:
            raise UserError(f"{where}: augment_strength = {self.augment_strength}: must be in [0, 1]")

    @property
    def schedule(self) -> tuple[tuple[float, float], ...]:
        """`weight` as [progress, weight] points."""
        return self.weight if isinstance(self.weight, tuple) else ((0.0, self.weight),)

    def weight_at(self, progress: float) -> float:
        """The weight in force at `progress` (0 to 1)."""
        return [weight for start, weight in self.schedule if start <= progress][-1]


@dataclass(frozen=True)
class AugmentConfig:
    """Waveform augmentation of training clips, its strength ramped in over the training's progress.

    On small data from scratch, augmentation from the first step hurts; ramped in later it helps. Every setting is the
    greatest change at full strength; all are off by default.
    """

    start: float = 0.2
    """Progress (0 to 1) until which there is none."""
    end: float = 0.5
    """Progress from which it has its full strength; linear between."""
    speed: float = 0.0
    """Resampling by a factor in 1 ± this (pitch changes too), e.g. 0.1."""
    gain_db: float = 0.0
    """Gain in ± this many dB."""
    noise_snr_db: float | None = None
    """White noise at no less than this signal-to-noise ratio; null: none."""
    num_time_masks: int = 0
    """Spans of silence per clip (SpecAugment, arXiv 1904.08779, done on the waveform)."""
    time_mask_sec: float = 0.1
    """Greatest length of one span; also at most a tenth of the clip."""
    num_freq_masks: int = 0
    """Frequency bands removed per clip."""
    freq_mask_hz: float = 400.0
    """Greatest width of one band."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"data.augment: start = {self.start}, end = {self.end}: need 0 <= start <= end <= 1")
        if not 0 <= self.speed <= 0.5:
            raise UserError(f"data.augment.speed = {self.speed}: must be in [0, 0.5]")
        check_least("data.augment", self, gain_db=0, num_time_masks=0, time_mask_sec=0, num_freq_masks=0)
        if not 0 <= self.freq_mask_hz <= SAMPLE_RATE / 2:
            raise UserError(f"data.augment.freq_mask_hz = {self.freq_mask_hz}: must be in [0, {SAMPLE_RATE // 2}]")

    def strength_at(self, progress: float) -> float:
        """0 (none) to 1 (full)."""
        if progress < self.start:
            return 0.0
        return 1.0 if progress >= self.end else (progress - self.start) / (self.end - self.start)

    @property
    def enabled(self) -> bool:
        """Whether any of the changes is on."""
        return bool(
            self.speed or self.gain_db or self.noise_snr_db is not None or self.num_time_masks or self.num_freq_masks
        )


@dataclass(frozen=True)
class JoinConfig:
    """Joining short ASR clips into longer ones, text with text: more sequences from few recordings."""

    probability: float = 0.0
    """Share of ASR draws that are joined with other clips of the same subset that are stored close by."""
    max_clips: int = 3
    """At most this many clips in one."""
    max_sec: float = 6.0
    """Joined audio stays below this."""
    gap_sec: float = 0.2
    """Greatest silence between two clips."""
    start: float = 0.0
    """Progress (0 to 1) from which clips are joined."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"data.join.probability = {self.probability}: must be in [0, 1]")
        if not 0 <= self.start <= 1:
            raise UserError(f"data.join.start = {self.start}: must be in [0, 1]")
        check_least("data.join", self, max_clips=2, max_sec=0, gap_sec=0)


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to tokens and back; the prompt around the audio."""

    path: str | None = None
    """SentencePiece `.model`, Hugging Face `tokenizer.json`, a directory that holds one, or a hub id. Null: a
    SentencePiece model is trained on the sets' training text."""
    train_vocab_size: int = 512
    """With `path` null: vocabulary of the trained model, at most (a small corpus may not have that many pieces)."""
    placeholder: str = PLACEHOLDER
    """One token of the vocabulary; it is repeated once per LLM slot of a clip."""
    template: str = MOWE_TEMPLATE
    """Prompt of samples with audio: `{audio}` stands for all clips, `{instruction}` for the instruction."""
    text_template: str = "{instruction}"
    """Prompt of text-only samples."""
    chat_template: bool = True
    """Wrap the prompt in the tokenizer's own chat template, as a user's message, where it has one."""

    def __post_init__(self) -> None:
        check_least("data.tokenizer", self, train_vocab_size=1)
        for key, template, fields in (
            ("template", self.template, ("{audio}", "{instruction}")),
            ("text_template", self.text_template, ("{instruction}",)),
        ):
            if any(template.count(f) != 1 for f in fields):
                raise UserError(f"data.tokenizer.{key} = {template!r}: must contain {' and '.join(fields)}, once each")
        if "{audio}" in self.text_template:
            raise UserError(f"data.tokenizer.text_template = {self.text_template!r}: must not contain {{audio}}")
        if not self.placeholder or self.placeholder.split() != [self.placeholder]:
            raise UserError(f"data.tokenizer.placeholder = {self.placeholder!r}: must be one word")


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which order, and how much of it at a time."""

    root: str = "."
    """Folder that the sets' paths are relative to; for shards it may be a URL."""
    datasets: tuple[DatasetConfig, ...] = ()
    """Blended by weight."""
    temperature: float | None = None
    """Null: a set's share is its weight. Otherwise weight · samples ** (1 / temperature): 1 reads every set equally
    often, a larger number gives small sets more."""
    eval_splits: tuple[str, ...] = ("test",)
    """Splits that evaluation may read; shards are made of them too."""
    cache_dir: str = "runs/cache"
    """Where shards made from manifests and trained tokenizers go, by content hash."""
    global_batch_samples: int = 32
    """Samples of one step over all ranks; a multiple of `num_lanes`."""
    num_lanes: int = 16
    """Logical streams; fixed for a run, whatever the number of ranks. Ranks beyond this number load nothing."""
    shuffle: bool = True
    """Shards, and samples within each shard, in a new order every epoch; false: stored order."""
    min_audio_sec: float = 0.0
    """Shorter clips are padded with silence at their end."""
    max_audio_sec: float | None = None
    """Samples with a longer clip are skipped, counted and listed; null: no limit."""
    max_skipped_fraction: float = 0.01
    """The run stops when more than this share of samples had to be skipped."""
    num_workers: int = 2
    """Processes per rank that decode; 0: decode in the training thread. The order does not depend on it."""
    prefetch_batches: int = 4
    """Batches that the processes may be ahead."""
    read_kib: int = 2048
    """Size of one read of the store. Samples that are read together are shuffled among themselves: fixed for a run."""
    read_ahead_mib: int = 256
    """Memory per rank for encoded audio that is read before it is needed, on top of one read per lane and set."""
    buffer_mib: int = 256
    """Memory per rank for decoded audio on its way from the processes to the training thread."""
    retry_sec: float = 120.0
    """How long a bucket may be away before the run stops, its state saved."""
    cache_decoded_mib: int = 256
    """Memory per rank for decoded clips; makes many epochs over a small set cheap. 0: none."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        names = [s.name for s in self.datasets]
        if len(set(names)) != len(names):
            raise UserError(f"data.datasets: names {names} must be unique")
        check_least("data", self, num_lanes=1, num_workers=0, prefetch_batches=1, read_kib=1, buffer_mib=1)
        check_least("data", self, read_ahead_mib=0, cache_decoded_mib=0, temperature=1)
        if self.global_batch_samples < 1 or self.global_batch_samples % self.num_lanes:
            raise UserError(
                f"data.global_batch_samples = {self.global_batch_samples}: must be a multiple of "
                f"data.num_lanes = {self.num_lanes}"
            )
        if not 0 <= self.max_skipped_fraction < 1:
            raise UserError(f"data.max_skipped_fraction = {self.max_skipped_fraction}: must be in [0, 1)")
        if self.max_audio_sec is not None and self.max_audio_sec <= 0:
            raise UserError(f"data.max_audio_sec = {self.max_audio_sec}: must be positive, or null for no limit")
        if self.min_audio_sec < 0 or (self.max_audio_sec is not None and self.min_audio_sec > self.max_audio_sec):
            raise UserError(f"data.min_audio_sec = {self.min_audio_sec}: must be in [0, data.max_audio_sec]")
        if not 0 < self.retry_sec <= 240:
            raise UserError(f"data.retry_sec = {self.retry_sec}: must be in (0, 240]; signed requests expire later")
        starts = {start for s in self.datasets for start, _ in s.schedule}
        for progress in sorted(starts):
            if not sum(s.weight_at(progress) for s in self.datasets) > 0:
                raise UserError(f"data.datasets: all weights are 0 at progress {progress}: give one set a weight there")
