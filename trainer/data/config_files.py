"""The location of a recipe's data, and a check of its manifests that is quick enough for the start of a command."""

from __future__ import annotations

from pathlib import Path

from model.errors import UserError
from trainer.data.config import DataConfig, DatasetConfig
from trainer.storage.open import join_url, scheme_of


def place_of(data: DataConfig, part: DatasetConfig) -> str:
    """Return the path or URL of a dataset's manifest or shards."""
    return join_url(data.root, str(part.shards if part.shards is not None else part.manifest))


def check_files(config: DataConfig) -> None:
    """Check that the manifests of a recipe exist. Nothing is read.

    Raises:
        UserError: If a manifest is missing.
    """
    for part in config.datasets:
        if part.manifest is None or scheme_of(config.root):
            continue
        path = Path(config.root) / part.manifest
        if not path.is_file():
            root = config.root if Path(config.root).is_dir() else f"{config.root}, which is not a folder"
            raise UserError(
                f"data.datasets '{part.name}': {path}: no such file; check data.root = {root}, and the dataset's "
                "manifest"
            )
