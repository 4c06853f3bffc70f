"""What is evaluated: an exported folder, or a checkpoint (a run: its newest) as the same model in memory."""

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
from trainer.checkpoint.folder import read_text
from trainer.checkpoint.reader import MANIFEST, DamagedError
from trainer.data.tokenizer import transformers_digest
from trainer.export.publish import generation_config
from trainer.export.source import Source
from trainer.export.tokenizer import as_transformers, processor_settings
from trainer.run_tokenizer import DIGEST, PROCESSOR, exported_config
from trainer.storage.open import scheme_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_WINDOW_SEC = 30.0


@dataclass(frozen=True)
class Origin:
    """What the user named, found but not loaded: cheap, and the same in every process."""

    url: str
    """The exported folder, or the checkpoint: a folder or `s3://…`."""
    is_export: bool
    run_dir: Path | None
    """Of the run that the checkpoint belongs to."""
    digest: str
    """Changes when the weights or their description do."""
    max_audio_sec: float | None
    """Longer clips did not occur in training; None: not known."""
    max_new_tokens: int
    """Of answers, when the model was evaluated in training."""

    @property
    def name(self) -> str:
        """For people."""
        return self.last_part if self.run_dir is None else f"{self.run_dir.name}, {self.last_part}"

    @property
    def last_part(self) -> str:
        """Of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer."""

    model: EarshotForCausalLM
    processor: EarshotProcessor
    settings: Any
    """transformers' GenerationConfig."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and answer together that the LLM can tell apart."""
        positions: int = self.model.config.text_config.max_position_embeddings
        return positions


def find_model(url: str | Path) -> Origin:
    """What `url` means: an exported folder, or a checkpoint or run in a folder or a bucket.

    Raises:
        UserError: it is none of them, or its checkpoint is damaged.
    """
    path = Path(url).resolve()
    if (path / PROCESSOR).is_file():
        return _export(path)
    if (path / "config.json").is_file():
        raise UserError(f"{path}: no {PROCESSOR}: an LLM alone cannot hear; export without --llm-only")
    source = _source(str(url) if scheme_of(str(url)) else str(path))
    digest = hashlib.sha256(read_text(source.folder, MANIFEST).encode()).hexdigest()
    data, evaluation = source.recipe.data, source.recipe.eval
    return Origin(source.folder.url, False, source.run_dir, digest, data.max_audio_sec, evaluation.max_new_tokens)


def load_model(origin: Origin, dtype: torch.dtype, device: torch.device) -> Loaded:
    """The model in evaluation mode. No code that lies in the folder is run: it is this program's own.

    Raises:
        UserError: files are missing, damaged, or of something else.
    """
    if origin.is_export:
        loaded = _load_export(Path(origin.url), dtype)
    else:
        loaded = _load_checkpoint(origin.url, dtype)
    loaded.model.eval().to(device)
    return loaded


def default_dtype(device: torch.device) -> str:
    """Half precision where it is fast."""
    return "bf16" if device.type == "cuda" else "fp32"


def _source(url: str) -> Source:
    try:
        return Source(url)
    except DamagedError as error:
        raise UserError(f"{url}: damaged: {error}; take another checkpoint") from None


def _export(path: Path) -> Origin:
    config = _read_json(path / "config.json")
    if config.get("model_type") != EarshotConfig.model_type:
        raise UserError(f"{path}: a model of kind {config.get('model_type')!r}; give a folder that tools.export made")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{path}: no .safetensors in it; export it again")
    digest = hashlib.sha256()
    for file in (path / "config.json", path / PROCESSOR):
        digest.update(file.read_bytes())
    for file in weights:
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    longest = _read_json(path / PROCESSOR).get("max_audio_sec")
    answer = _read_json(path / "generation_config.json").get("max_new_tokens")
    if not isinstance(answer, int):
        raise UserError(f"{path / 'generation_config.json'}: no max_new_tokens; add it, or export again")
    return Origin(str(path), True, None, digest.hexdigest(), longest, answer)


def _load_export(path: Path, dtype: torch.dtype) -> Loaded:
    from transformers import AutoTokenizer, GenerationConfig

    settings = _read_json(path / PROCESSOR)
    for key in ("auto_map", "processor_class"):
        settings.pop(key, None)
    try:
        config = EarshotConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        _check_tokenizer(path, getattr(config, DIGEST, None), transformers_digest(tokenizer, exported_config(settings)))
        model = EarshotForCausalLM.from_pretrained(path, config=config, dtype=dtype)
        generation = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be loaded ({reason}); export it again") from error
    return Loaded(model, EarshotProcessor(tokenizer, **settings), generation)


def _check_tokenizer(path: Path, wanted: str | None, found: str) -> None:
    """Compare; None: the export was made before exports held a digest."""
    if wanted not in (None, found):
        raise UserError(
            f"{path}: its tokenizer or its {PROCESSOR} is not what its weights were trained with (digest {found[:12]} "
            f"instead of {str(wanted)[:12]}); export it again"
        )


def _load_checkpoint(url: str, dtype: torch.dtype) -> Loaded:
    source = _source(url)
    everything, tokenizer = source.select(0), source.tokenizer()
    model = EarshotForCausalLM(EarshotConfig(**source.description(everything)))
    source.fill(model, list(source.names(everything, llm_only=False)), everything, torch.float32)
    settings = processor_settings(tokenizer, source.recipe.data, source.strides)
    try:
        source.wait_verified()
    except DamagedError as error:
        raise UserError(f"{url}: damaged: {error}; take another checkpoint") from None
    processor = EarshotProcessor(as_transformers(tokenizer), **settings)
    model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps it without its types
    return Loaded(model, processor, generation_config(source, tokenizer))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; export it again")
    return found
