from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from model.errors import UserError
from tests.real_weights.kit import KIT
from tools.fetch_models import MODELS, fetch, models_folder


@pytest.fixture(scope="session")
def published() -> Callable[[str], Path]:
    """Return a function that returns the folder of a published model by name, and downloads the model if needed."""
    by_name = {model.name: model for model in MODELS}

    @cache
    def folder(name: str) -> Path:
        try:
            return fetch(by_name[name], models_folder())
        except UserError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"the real weights cannot be downloaded: {error}")

    return folder


@pytest.fixture(scope="session")
def kit() -> Path:
    if not KIT.is_dir():
        pytest.skip(f"there are no real recordings in {KIT}; set KIT_DIR")
    return KIT
