"""The export of a checkpoint in the layout of the published model that its run started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoConfig

from model.errors import UserError
from model.llm.mixture import FIELD
from trainer.export.published.folder import CONFIG, Published, read_json, read_published
from trainer.export.source import Source

_COPIED = (".json", ".jinja", ".txt", ".model")
_NOT_COPIED = ("model.safetensors.index.json", CONFIG)
_WRITTEN = ("architectures", "dtype", "transformers_version")
"""The fields of an LLM's config that have no effect on its computation."""


def read_original(source: Source, folder: Path) -> Published:
    """Return the published model in whose layout a checkpoint can be exported.

    Args:
        source: The checkpoint.
        folder: The folder of the published model. It need not contain the weights.

    Raises:
        UserError: If the checkpoint has parts that the published model does not have, or tensors of different shapes.
    """
    where = f"{source.folder.url}: --original {folder}"
    if source.expert_names():
        raise UserError(
            f"{where}: the run added encoders, but that layout cannot contain them; export without --original"
        )
    if FIELD in source.model.text_config:
        raise UserError(f"{where}: the run added experts to the LLM; export without --original")
    published = read_published(folder, ())
    wanted, tensors = published.shapes(), source.reader.manifest.tensors
    names = source.names(source.select(0.0), llm_only=False)
    for name in sorted(wanted.keys() | names.keys()):
        if name not in names or name not in wanted:
            what = "lacks" if name not in names else "also has"
            raise UserError(f"{where}: the run {what} {name}; use the folder that the run was imported from")
        if (shape := tensors[name].shape) != wanted[name]:
            raise UserError(f"{where}: {name} has shape {shape} in the run, but {wanted[name]} according to {CONFIG}")
    described = published.description(1)
    fields, own = (AutoConfig.for_model(**model.text_config).to_dict() for model in (described, source.model))
    changed = sorted(k for k in fields.keys() | own.keys() if k not in _WRITTEN and fields.get(k) != own.get(k))
    if changed:
        raise UserError(
            f"{where}: the run changed {', '.join(changed)} of the LLM's config, so it does not match {CONFIG}; use "
            "the folder that the run was imported from, or export without --original"
        )
    for part in ("primary", "adapter"):
        if getattr(source.model.audio, part) != getattr(described.audio, part):
            raise UserError(
                f"{where}: model.{part} of the run differs from that of the published model; use the folder that the "
                "run was imported from, or export without --original"
            )
    return published


def original_names(published: Published) -> dict[str, str]:
    """Return the names of all tensors: published name → name in the checkpoint."""
    found = {}
    for own in published.shapes():
        name = published.architecture.published_name(own)
        assert name is not None, own
        found[name] = own
    return found


def write_original_files(published: Published, dtype: str, folder: Path) -> None:
    """Write config.json, and copy the published model's tokenizer, processor and other small files except code.

    Args:
        published: The published model.
        dtype: The name of the exported weights' dtype.
        folder: The folder to write to.
    """
    for path in sorted(published.folder.iterdir()):
        if path.is_file() and path.suffix in _COPIED and path.name not in _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    config = read_json(published.folder / CONFIG)
    config.pop("torch_dtype", None)
    (folder / CONFIG).write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
