"""The `data` section of a recipe. Each dataclass documents its fields and checks their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.errors import UserError, check_least
from model.lengths import SAMPLE_RATE

PLACEHOLDER = "<SpeechHere>"
"""The default placeholder, from the prompt that was released with MoWE-Audio."""

MOWE_TEMPLATE = "Given the following speech tokens: \n<speech>{audio}</speech>\n\n{instruction}"
"""The default prompt template, from the code that was released with MoWE-Audio."""


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset, given either as a manifest or as shards.

    Shards are built from a manifest once and stored in `data.cache_dir`.
    """

    name: str = ""
    """The unique name of the dataset, used in metrics, lists of skipped samples and checkpoints."""
    manifest: str | None = None
    """The path to a manifest (JSONL, see `docs/data.md`), relative to `data.root`. Audio paths in it are relative to
    the manifest's folder."""
    shards: str | None = None
    """The folder or bucket prefix that `earshot shards make` wrote, with shards and shards.json. It is a path relative
    to `data.root`, or a URL (`s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`)."""
    split: str = "train"
    """The split to train on. Evaluation reads the splits listed in `data.eval_splits` from the same dataset."""
    tasks: tuple[str, ...] = ()
    """The tasks whose samples are read, in training and evaluation; empty for all tasks."""
    subsets: tuple[str, ...] = ()
    """The subsets whose samples are read, in training and evaluation; empty for all subsets."""
    weight: float | tuple[tuple[float, float], ...] = 1.0
    """The relative number of samples that are drawn from this dataset. A list of [progress, weight] points makes the
    weight piecewise constant over the training's progress (0 to 1). For example, with [[0, 0], [0.4, 1]], no samples
    are drawn from the dataset during the first 40 % of the training."""
    augment_strength: float = 1.0
    """The factor, from 0 to 1, that scales the strength of `data.augment` for this dataset; 0 disables
    augmentation."""

    def __post_init__(self) -> None:
        where = f"data.datasets '{self.name}'"
        if not self.name or "/" in self.name:
            raise UserError(f"data.datasets: name {self.name!r} must not be empty or contain '/'")
        if (self.manifest is None) == (self.shards is None):
            raise UserError(f"{where}: exactly one of manifest and shards must be set")
        points = self.schedule
        if not points or points[0][0] != 0 or list(points) != sorted(points, key=lambda p: p[0]):
            raise UserError(
                f"{where}: weight = {self.weight}: [progress, weight] points must start at progress 0 and be sorted"
            )
        if any(len(p) != 2 or p[1] < 0 or not 0 <= p[0] < 1 for p in points):
            raise UserError(f"{where}: weight = {self.weight}: progress must be in [0, 1) and weight at least 0")
        if not 0 <= self.augment_strength <= 1:
            raise UserError(f"{where}: augment_strength = {self.augment_strength}: must be in [0, 1]")

    @property
    def schedule(self) -> tuple[tuple[float, float], ...]:
        """The weight as [progress, weight] points."""
        return self.weight if isinstance(self.weight, tuple) else ((0.0, self.weight),)

    def weight_at(self, progress: float) -> float:
        """Return the weight at `progress` (0 to 1)."""
        return [weight for start, weight in self.schedule if start <= progress][-1]


@dataclass(frozen=True)
class AugmentConfig:
    """Waveform augmentation of training clips.

    Each setting is the largest change at full strength; all changes are off by default. The strength increases from 0
    to 1 while the training's progress goes from `start` to `end`. In training from scratch on little data, augmentation
    lowers the error if its strength increases gradually, but raises the error if it is applied from the first step.
    """

    start: float = 0.2
    """The progress (0 to 1) at which augmentation starts."""
    end: float = 0.5
    """The progress (0 to 1) at which augmentation reaches full strength. The strength rises linearly from `start`."""
    speed: float = 0.0
    """The largest relative change in speed and pitch, for example 0.1 for factors from 0.9 to 1.1; 0 disables it."""
    gain_db: float = 0.0
    """The largest change in volume, up or down, in dB; 0 disables it."""
    noise_snr_db: float | None = None
    """The lowest signal-to-noise ratio of added white noise, in dB; null for no noise."""
    num_time_masks: int = 0
    """The number of spans per clip that are replaced by silence (as in SpecAugment, arXiv 1904.08779); 0 for none."""
    time_mask_sec: float = 0.1
    """The largest length of one silent span, in seconds. No span is longer than a tenth of its clip."""
    num_freq_masks: int = 0
    """The number of frequency bands removed per clip; 0 for none."""
    freq_mask_hz: float = 400.0
    """The largest width of one removed band, in Hz."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"data.augment: start = {self.start}, end = {self.end}: 0 <= start <= end <= 1 must hold")
        if not 0 <= self.speed <= 0.5:
            raise UserError(f"data.augment.speed = {self.speed}: must be in [0, 0.5]")
        check_least("data.augment", self, gain_db=0, num_time_masks=0, time_mask_sec=0, num_freq_masks=0)
        if not 0 <= self.freq_mask_hz <= SAMPLE_RATE / 2:
            raise UserError(f"data.augment.freq_mask_hz = {self.freq_mask_hz}: must be in [0, {SAMPLE_RATE // 2}]")

    def strength_at(self, progress: float) -> float:
        """Return the strength at `progress` (0 to 1): 0 is none, 1 is full strength."""
        if progress < self.start:
            return 0.0
        return 1.0 if progress >= self.end else (progress - self.start) / (self.end - self.start)

    @property
    def enabled(self) -> bool:
        """True if any change is enabled."""
        return bool(
            self.speed or self.gain_db or self.noise_snr_db is not None or self.num_time_masks or self.num_freq_masks
        )


@dataclass(frozen=True)
class JoinConfig:
    """The settings for joining short ASR clips, together with their answers, into longer ones.

    Joining creates more varied sequences from a small number of recordings.
    """

    probability: float = 0.0
    """The probability that an ASR sample is joined with others of the same subset and chunk (see `data.read_kib`);
    0 disables joining."""
    max_clips: int = 3
    """The largest number of clips that are joined into one, at least 2."""
    max_sec: float = 6.0
    """The largest length of joined audio, in seconds. A clip that would make the audio longer is not added."""
    gap_sec: float = 0.2
    """The longest silence between two joined clips, in seconds."""
    start: float = 0.0
    """The progress of the training (0 to 1) at which joining starts."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"data.join.probability = {self.probability}: must be in [0, 1]")
        if not 0 <= self.start <= 1:
            raise UserError(f"data.join.start = {self.start}: must be in [0, 1]")
        check_least("data.join", self, max_clips=2, max_sec=0, gap_sec=0)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer, and the templates of prompts."""

    path: str | None = None
    """A SentencePiece `.model` file, a Hugging Face `tokenizer.json`, a directory with either, or the id of a model on
    the Hugging Face hub. If null, a SentencePiece model is trained on the text of the training samples."""
    train_vocab_size: int = 512
    """The largest number of pieces of the tokenizer that is trained if `path` is null. A small corpus may yield
    fewer."""
    placeholder: str = PLACEHOLDER
    """The token that marks the positions of audio embeddings. A prompt contains it once per audio token of a clip."""
    template: str = MOWE_TEMPLATE
    """The prompt of samples with audio. `{audio}` is replaced by all clips, and `{instruction}` by the instruction."""
    text_template: str = "{instruction}"
    """The prompt of samples without audio. `{instruction}` is replaced by the instruction."""
    chat_template: bool = True
    """If true and the tokenizer has a chat template, the prompt becomes a user message in that template."""

    def __post_init__(self) -> None:
        check_least("data.tokenizer", self, train_vocab_size=1)
        for key, template, fields in (
            ("template", self.template, ("{audio}", "{instruction}")),
            ("text_template", self.text_template, ("{instruction}",)),
        ):
            if any(template.count(f) != 1 for f in fields):
                raise UserError(
                    f"data.tokenizer.{key} = {template!r}: must contain {' and '.join(fields)}, each exactly once"
                )
        if "{audio}" in self.text_template:
            raise UserError(f"data.tokenizer.text_template = {self.text_template!r}: must not contain {{audio}}")
        if not self.placeholder or self.placeholder.split() != [self.placeholder]:
            raise UserError(f"data.tokenizer.placeholder = {self.placeholder!r}: must be one word")


@dataclass(frozen=True)
class DataConfig:
    """The datasets, the order of their samples, and the limits on memory and prefetching."""

    root: str = "."
    """The folder to which the paths of datasets are relative. It may be a URL if no dataset is a manifest."""
    datasets: tuple[DatasetConfig, ...] = ()
    """The datasets to train on, mixed by their weights."""
    temperature: float | None = None
    """The temperature, which determines how the sizes of the datasets affect the mixture. If null, each dataset is
    drawn in proportion to its weight. Otherwise, it is drawn in proportion to
    weight · num_samples ** (1 / temperature), where temperature >= 1. With temperature 1 and equal weights, every
    sample is drawn equally often. Larger temperatures favor small datasets."""
    eval_splits: tuple[str, ...] = ("test",)
    """The splits that evaluation may read. Each split must have samples in at least one dataset."""
    cache_dir: str = "runs/cache"
    """The folder for shards that are built from manifests and for trained tokenizers. Their names contain a hash of
    their input. A recipe that does not set this key uses the folder `cache` in `train.run_dir`."""
    global_batch_samples: int = 32
    """The number of samples per step over all ranks; a multiple of `num_lanes`."""
    num_lanes: int = 16
    """The number of lanes, which are logical sample streams. It cannot change within a run, unlike the number of ranks.
    If there are more ranks than lanes, some ranks load nothing."""
    shuffle: bool = True
    """Whether shards and the samples within each shard are read in a new order every epoch; otherwise they are read in
    stored order."""
    min_audio_sec: float = 0.0
    """The shortest clip, in seconds. Shorter clips are padded with silence at their end."""
    max_audio_sec: float | None = None
    """The longest clip, in seconds; null for no limit. Samples with a longer clip are skipped, counted and listed."""
    max_tokens: int | None = None
    """The largest number of tokens of a sample, audio tokens included; null for the LLM's maximum number of positions.
    Longer samples are skipped, counted and listed."""
    max_skipped_fraction: float = 0.01
    """The largest fraction of samples that may be skipped. The run stops if more samples are skipped."""
    num_workers: int = 2
    """The number of decoding processes per rank; 0 to decode in the training process. It does not affect the order of
    samples."""
    prefetch_batches: int = 4
    """The number of batches that decoding processes may prepare in advance."""
    read_kib: int = 2048
    """The approximate number of KiB that are read from the store at once (a chunk). It cannot change within a run,
    because shuffling depends on it. Larger values use a bucket's bandwidth better but need more memory."""
    read_ahead_mib: int = 256
    """The memory per rank for encoded audio that is read in advance, in MiB. In addition, each lane needs memory for
    one chunk per dataset. With 0, only these chunks are read."""
    buffer_mib: int = 256
    """The shared memory per rank, in MiB, through which decoding processes pass audio to the training process."""
    retry_sec: float = 120.0
    """The number of seconds for which a bucket may be unreachable before the run saves its state and stops."""
    node_cache_gib: float = 0.0
    """The size of a cache on the disk of each node for shards from a bucket, in GiB; 0 disables it. All ranks of a node
    share it."""
    node_cache_dir: str | None = None
    """The folder of the node's cache, to which no other user may have access; null for `earshot-cache-UID` in the
    folder for temporary files (`TMPDIR`)."""
    cache_decoded_mib: int = 256
    """The memory per rank for a cache of decoded clips, in MiB; 0 disables the cache. With the cache, a small dataset
    need not be decoded again in every epoch."""
    loss_turns: Literal["all", "last"] = "all"
    """The answers of a conversation that the model learns: all, or only the last one. The field `loss` of a message
    overrides this key for that message. The model can learn earlier answers only if the chat template keeps them
    unchanged."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Waveform augmentation."""
    join: JoinConfig = field(default_factory=JoinConfig)
    """Joining of short ASR clips."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer and the prompt."""

    def __post_init__(self) -> None:
        names = [s.name for s in self.datasets]
        if len(set(names)) != len(names):
            raise UserError(f"data.datasets: names {names} must be unique")
        check_least("data", self, num_lanes=1, num_workers=0, prefetch_batches=1, read_kib=1, buffer_mib=1)
        check_least("data", self, read_ahead_mib=0, cache_decoded_mib=0, temperature=1, max_tokens=1)
        check_least("data", self, node_cache_gib=0)
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
            raise UserError(f"data.retry_sec = {self.retry_sec}: must be in (0, 240], since signed requests expire")
        starts = {start for s in self.datasets for start, _ in s.schedule}
        for progress in sorted(starts):
            if not sum(s.weight_at(progress) for s in self.datasets) > 0:
                raise UserError(
                    f"data.datasets: all weights are 0 at progress {progress}; make one of them positive there"
                )
