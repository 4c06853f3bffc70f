"""A folder with a published speech LLM: its config, and the names, shapes and files of its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.audio_tower import AudioTower
from model.config import AdapterConfig, EncoderConfig, LLMConfig, ModelConfig
from model.errors import UserError
from model.hub.configuration import describe
from model.llm.reference import resolve_hf_config
from model.table import load_entry
from trainer.export.description import Description, read_description
from trainer.export.published.architecture import Architecture
from trainer.export.published.table import PUBLISHED

CONFIG = "config.json"
_PARTS = {"text_config": "the LLM", "audio_config": "the audio tower"}
_IGNORED = ("rotary_emb.inv_freq",)
"""The suffixes of the names of tensors that are not read. Old checkpoints contain them, but the config implies them."""


@dataclass(frozen=True)
class Published:
    """A published model with a config that has been checked."""

    folder: Path
    config: Mapping[str, Any]
    """The content of config.json."""
    architecture: Architecture
    model: ModelConfig
    """The model's config in earshot. Its field `llm.config` describes the LLM, and `llm.weights` is not set."""
    hf_config: Any
    """The transformers config of the LLM."""

    def description(self, vocab_size: int) -> Description:
        """Return the description of the model, for a tokenizer with `vocab_size` tokens."""
        tree = json.loads(json.dumps(describe(self.model, self.hf_config, vocab_size)))
        return read_description(tree, str(self.folder / CONFIG))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by its name in earshot."""
        described = self.description(self.hf_config.vocab_size)
        with torch.device("meta"):
            tower = AudioTower(self.model, self.hf_config.hidden_size, self.hf_config.vocab_size)
        audio = {f"audio.{name}": tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
        return audio | {f"llm.{name}": shape for name, shape in described.llm_shapes.items()}


def read_published(folder: Path, parts: Sequence[Path] = ()) -> Published:
    """Read the config of a published model.

    Args:
        folder: The folder.
        parts: Folders of the LLM and of the encoder, for a model whose folder names them instead of containing them.

    Raises:
        UserError: If the architecture is unknown or computes something that earshot does not, or a file is unreadable.
    """
    config = read_json(folder / CONFIG)
    kind = config.get("model_type")
    if kind not in PUBLISHED:
        raise UserError(
            f"{folder / CONFIG}: model_type = {kind!r} is an unknown architecture; the known ones are "
            f"{', '.join(PUBLISHED)}"
        )
    architecture = load_entry(PUBLISHED[kind])
    assert isinstance(architecture, Architecture), architecture
    try:
        text, audio = _sub_configs(config, kind, architecture, parts)
        config = {**config, "text_config": text.to_dict()}
        primary, adapter = architecture.audio(audio, config)
        llm = LLMConfig(config={**_own_fields(text), "model_type": text.model_type})
        hf_config = resolve_hf_config(llm)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a file from another source may cause any error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{folder / CONFIG}: is not a usable {architecture.title} config ({reason}); download it again"
        ) from error
    return Published(folder, config, architecture, ModelConfig(primary, adapter=adapter, llm=llm), hf_config)


def _own_fields(text: Any) -> dict[str, Any]:
    """Return the values of the fields of the LLM's config class.

    Published configs also have fields that the class does not know, such as `use_mrope` of Qwen2-Audio. These have no
    effect on the network.
    """
    known = {field.name for field in fields(text)} - {"architectures", "dtype", "transformers_version"} | {"head_dim"}
    return {key: value for key, value in text.to_diff_dict().items() if key in known}


def _sub_configs(
    config: Mapping[str, Any], kind: str, architecture: Architecture, parts: Sequence[Path]
) -> tuple[Any, Any]:
    """Return the transformers configs of the LLM and of the audio tower.

    Raises:
        UserError: If config.json names one of them instead of containing it, and `parts` does not have it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:  # transformers knows the defaults of both configs.
        whole: Any = AutoConfig.for_model(**config)
        return whole.text_config, whole.audio_config
    found = {key: config.get(key) for key in _PARTS}
    for part in parts:
        stored = read_json(part / CONFIG)
        found["audio_config" if stored.get("model_type") == architecture.audio_model_type else "text_config"] = stored
    for key, what in _PARTS.items():
        if not isinstance(found[key], dict):
            named = config.get(key.replace("config", "model_id"))
            where = f"names {what} ({named}) instead of containing it" if named else f"does not describe {what}"
            raise UserError(f"{CONFIG} {where}; specify its folder with --part FOLDER")
    text, audio = found["text_config"], found["audio_config"]
    assert text is not None and audio is not None
    return (
        AutoConfig.for_model(**{"model_type": "llama", **text}),
        AutoConfig.for_model(**{"model_type": architecture.audio_model_type, **audio}),
    )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a published model, with its file, its published name and its name in earshot."""

    file: Path
    published: str
    own: str


def find_tensors(published: Published, parts: Sequence[Path] = ()) -> list[StoredTensor]:
    """Find the file of each tensor of a published model.

    Args:
        published: The model.
        parts: Folders of the LLM and of the encoder, for tensors that the model's folder does not contain.

    Raises:
        UserError: If a tensor is unknown, is missing, or has a shape that does not follow from config.json.
    """
    wanted, found = published.shapes(), dict[str, StoredTensor]()
    tied = bool(published.hf_config.tie_word_embeddings)
    for folder in (published.folder, *parts):
        is_part = folder is not published.folder
        for file, name, shape in _stored(folder):
            own = _part_name(name) if is_part else published.architecture.own_name(name)
            if own in found or name.endswith(_IGNORED) or (tied and own == "llm.lm_head.weight"):
                continue
            if own not in wanted:
                if is_part:  # Whisper's decoder, for example
                    continue
                raise UserError(f"{file}: {name} is not a tensor of {published.architecture.title}; {_REMEDY}")
            if shape != wanted[own]:
                raise UserError(
                    f"{file}: {name} has shape {shape}, but {wanted[own]} according to config.json; {_REMEDY}"
                )
            found[own] = StoredTensor(file, name, own)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{published.folder}: lacks {published.architecture.published_name(missing[0])}{more}; download it again, "
            "or specify the folder of the LLM or encoder that has these tensors with --part FOLDER"
        )
    return [found[own] for own in wanted]


_REMEDY = "download the folder again, with the config.json that belongs to the weights"


def _part_name(name: str) -> str:
    """Return the name in earshot of a tensor in the folder of an LLM or of Whisper."""
    for prefix in ("model.encoder.", "encoder."):
        if name.startswith(prefix):
            return f"audio.primary.encoder.{name.removeprefix(prefix)}"
    return f"llm.{name}"


def _stored(folder: Path) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """Yield the file, the name and the shape of every tensor in a folder's safetensors files.

    Raises:
        UserError: If the folder has no such file, or a file is unreadable.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or any(Path(str(name)).name != name for name in names):
            raise UserError(f"{index}: is not an index of files in its folder; download it again")
    for name in sorted(names):
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: contains no {name}; use a Hugging Face folder with safetensors weights")
        try:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - `opened` is not a mapping
                    yield file, key, tuple(opened.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read as safetensors ({error}); download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: If the file is missing, cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; use the Hugging Face folder of a published speech LLM") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; download it again")
    return content


def audio_tree(model: ModelConfig) -> dict[str, Any]:
    """Return the sections `primary` and `adapter` of a recipe, with the fields that differ from their defaults."""
    assert model.primary is not None

    def changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value != defaults[key]}

    adapter = changed(asdict(model.adapter), asdict(AdapterConfig()))
    if "strides" in adapter:
        adapter["strides"] = list(adapter["strides"])
    return {"primary": changed(asdict(model.primary), asdict(EncoderConfig())), "adapter": adapter}
