"""Checks that the folders of weights in a recipe exist and have a format that can be read."""

from __future__ import annotations

from pathlib import Path

from model.errors import UserError

FETCHED_MODELS = ("whisper-tiny.en", "whisper-base", "smollm2-135m")
"""The names of the models that `earshot models` downloads."""

_GGUF_MAGIC = b"GGUF"
_REMEDY = (
    "use the Hugging Face folder that it was made from (config.json and safetensors); `earshot models` converts a few "
    "small models"
)


def check_weights(key: str, weights: str | None) -> None:
    """Check that `weights` is not in the format of llama.cpp or CTranslate2.

    Args:
        key: The recipe's key, for the error.
        weights: A folder, a hub id, or None. Only local files are checked.

    Raises:
        UserError: If `weights` is a file, or a folder in one of these formats.
    """
    if weights is None:
        return
    path = Path(weights)
    if path.is_file():
        if _begins_with(path, _GGUF_MAGIC):
            raise UserError(f"{key} = {weights}: GGUF, the format of llama.cpp, cannot be read; {_REMEDY}")
        if path.name == "model.bin" and _is_ctranslate2(path):
            raise UserError(f"{key} = {weights}: weights of CTranslate2 (faster-whisper) cannot be read; {_REMEDY}")
        raise UserError(f"{key} = {weights}: is a file; use the Hugging Face folder that contains it")
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        raise UserError(
            f"{key} = {weights}: {gguf[0].name} is GGUF, the format of llama.cpp, and cannot be read; {_REMEDY}"
        )
    if _is_ctranslate2(path / "model.bin"):
        raise UserError(
            f"{key} = {weights}: model.bin has the format of CTranslate2 (faster-whisper) and cannot be read; {_REMEDY}"
        )


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _is_ctranslate2(model_bin: Path) -> bool:
    """Return whether the file begins like a CTranslate2 model: a version number, and the name of the model's class."""
    if not model_bin.is_file():
        return False
    with model_bin.open("rb") as file:
        head = file.read(64)
    version, size = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:6], "little")
    return version < 100 and 0 < size <= 58 and head[6 : 6 + size].endswith(b"Spec\0")


def check_present(key: str, folder: str | None) -> None:
    """Check that a folder exists, unless its name may be a hub id.

    Args:
        key: The recipe's key, for the error.
        folder: A folder, a hub id, or None.

    Raises:
        UserError: If the folder does not exist.
    """
    if folder is None or Path(folder).exists():
        return
    # A hub id has at most one slash, and no organization on the hub is called "models".
    if folder.startswith(("/", ".", "~", "models/")) or folder.count("/") > 1:
        path = Path(folder)
        remedy = "specify an existing folder; ~ is not expanded"
        if path.name in FETCHED_MODELS:
            remedy = f"run: earshot models {path.name} --out {path.parent}"
        raise UserError(f"{key} = {folder}: no such folder; {remedy}")
