"""The files of the project that are not Python modules: `ds_configs/` and `slurm/`."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
"""The folder of the package `trainer`."""


def shipped(name: str) -> Path:
    """Return the path to a file or folder that is part of the project.

    In an installed wheel, these folders are inside `trainer/`. In a checkout, they are next to it.

    Args:
        name: The relative path, such as `ds_configs/zero3.json` or `slurm`.
    """
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parent / name
