"""The model to evaluate: an exported folder, a checkpoint, or the newest checkpoint of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from model.hub.configuration import EarshotConfig
from model.hub.modeling import EarshotForCausalLM
from model.hub.processing import EarshotProcessor
from model.precision import cast
from trainer.checkpoint.folder import read_text
from trainer.checkpoint.reader import MANIFEST, DamagedError
from trainer.data.tokenizer_digest import transformers_digest
from trainer.export.description import read_description
from trainer.export.publish import generation_config
from trainer.export.source import Source, separate_experts
from trainer.export.tokenizer import as_transformers, processor_settings, read_processor
from trainer.run_tokenizer import DIGEST, PROCESSOR, exported_config
from trainer.storage.open import scheme_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_WINDOW_SEC = 30.0


@dataclass(frozen=True)
class Origin:
    """The location and properties of a model that is not loaded. It can be passed to other processes cheaply."""

    url: str
    """The exported folder or the checkpoint, as a path or as `s3://…`."""
    is_export: bool
    """True for an exported folder, False for a checkpoint."""
    run_dir: Path | None
    """The run folder that the checkpoint belongs to; None for an exported folder."""
    digest: str
    """A digest that changes with the weights or their description."""
    max_audio_sec: float | None
    """The length of the longest clip in training, in seconds; None if it is not known."""
    max_new_tokens: int
    """The length of the longest answer in the evaluations of the training run, in tokens."""

    @property
    def name(self) -> str:
        """A short name for reports, which consists of the name of the run and the last part of the URL."""
        return self.last_part if self.run_dir is None else f"{self.run_dir.name}, {self.last_part}"

    @property
    def last_part(self) -> str:
        """The last part of the URL's path."""
        return self.url.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Loaded:
    """A model in memory, with its processor."""

    model: EarshotForCausalLM
    processor: EarshotProcessor
    settings: Any
    """The GenerationConfig of transformers."""

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int:
        """The number of positions of the LLM, which limits the total length of a prompt and its answer."""
        positions: int = self.model.config.text_config.max_position_embeddings
        return positions


def find_model(url: str | Path) -> Origin:
    """Find the model at `url`, which is an exported folder, or a checkpoint or a run in a folder or a bucket.

    Raises:
        UserError: If `url` is none of these, or the checkpoint is damaged.
    """
    path = Path(url).resolve()
    if (path / PROCESSOR).is_file():
        return _export(path)
    if (path / "config.json").is_file():
        raise UserError(f"{path}: has no {PROCESSOR}, so it is an LLM without encoders; export without --llm-only")
    source = _source(str(url) if scheme_of(str(url)) else str(path))
    digest = hashlib.sha256(read_text(source.folder, MANIFEST).encode()).hexdigest()
    data, evaluation = source.recipe.data, source.recipe.eval
    return Origin(source.folder.url, False, source.run_dir, digest, data.max_audio_sec, evaluation.max_new_tokens)


def load_model(origin: Origin, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Load a model in evaluation mode with the code of this project. Code in an exported folder is not executed.

    Raises:
        UserError: If files are missing or damaged, or do not contain such a model.
    """
    if origin.is_export:
        loaded = _load_export(Path(origin.url), dtype)
    else:
        loaded = _load_checkpoint(origin.url, dtype)
    loaded.model.eval().to(device)
    return loaded


def default_dtype(device: torch.device) -> str:
    """Return the key in `DTYPES` of the dtype that is fastest on `device`."""
    return "bf16" if device.type == "cuda" else "fp32"


def _source(url: str) -> Source:
    try:
        return Source(url)
    except DamagedError as error:
        raise UserError(f"{url}: damaged: {error}; use another checkpoint") from None


def _export(path: Path) -> Origin:
    config = _read_json(path / "config.json")
    if config.get("model_type") != EarshotConfig.model_type:
        raise UserError(
            f"{path}: holds a model of type {config.get('model_type')!r}; use a folder that `earshot export` wrote"
        )
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{path}: contains no .safetensors files; export the model again")
    digest = hashlib.sha256()
    for file in (path / "config.json", path / PROCESSOR):
        digest.update(file.read_bytes())
    for file in weights:
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    longest = _read_json(path / PROCESSOR).get("max_audio_sec")
    answer = _read_json(path / "generation_config.json").get("max_new_tokens")
    if not isinstance(answer, int):
        raise UserError(f"{path / 'generation_config.json'}: max_new_tokens is missing; add it, or export again")
    return Origin(str(path), True, None, digest.hexdigest(), longest, answer)


def _load_export(path: Path, dtype: torch.dtype) -> Loaded:
    from transformers import GenerationConfig

    stored = _read_json(path / "config.json")
    described = {key: stored.get(key) for key in ("text_config", "audio", "vocab_size")}
    config = EarshotConfig(**read_description(described, str(path / "config.json")).tree())
    try:
        processor = read_processor(path)
        digest = transformers_digest(processor.tokenizer, exported_config(_read_json(path / PROCESSOR)))
        _check_tokenizer(path, stored.get(DIGEST), digest)
        model = EarshotForCausalLM.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True)
        generation = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be loaded ({reason}); export the model again") from error
    return Loaded(model, processor, generation)


def _check_tokenizer(path: Path, wanted: str | None, found: str) -> None:
    """Check that the tokenizer has the digest `wanted`, which is None if the export contains no digest."""
    if wanted not in (None, found):
        raise UserError(
            f"{path}: its weights were trained with another tokenizer or another {PROCESSOR} (digest "
            f"{str(wanted)[:12]} instead of {found[:12]}); export it again"
        )


def _load_checkpoint(url: str, dtype: torch.dtype) -> Loaded:
    source = _source(url)
    everything, tokenizer = source.select(0), source.tokenizer()
    model = EarshotForCausalLM(EarshotConfig(**source.description(everything)))
    separate_experts(model)
    source.fill(model, list(source.names(everything, llm_only=False)), everything, torch.float32)
    settings = processor_settings(tokenizer, source.recipe.data, source.rate)
    try:
        source.wait_verified()
    except DamagedError as error:
        raise UserError(f"{url}: damaged: {error}; use another checkpoint") from None
    processor = EarshotProcessor(as_transformers(tokenizer), **settings)
    cast(model, dtype)
    return Loaded(model, processor, generation_config(source, tokenizer))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the model again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object; export the model again")
    return found
