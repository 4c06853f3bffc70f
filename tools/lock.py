"""Split a lock file from `uv pip compile` into the files of `requirements/`.

    make lock

PyTorch has wheels with and without CUDA. A machine without GPUs must not download CUDA's libraries.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

BUILD = ("pip", "setuptools", "wheel", "packaging", "ninja", "numpy")
"""The packages that build other packages, or that build scripts import."""
_NAMES = ("build", "torch", "torch-cpu", "cuda", "deepspeed", "lock")
_CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
_HEAD = "# Written by `make lock`; see requirements/README.md.\n"


def split(compiled: str, torch_cpu_hashes: Iterable[str]) -> dict[str, str]:
    """Return the content of each file by its name.

    Args:
        compiled: The lock file of all packages, with hashes.
        torch_cpu_hashes: The SHA-256 hashes of PyTorch's wheels without CUDA.
    """
    files: dict[str, list[str]] = {f"{name}.txt": [] for name in _NAMES}
    for entry in re.findall(r"^[A-Za-z0-9].*(?:\n[ \t]+.*)*", compiled, re.MULTILINE):
        name = re.split(r"[=\[; ]", entry, maxsplit=1)[0]
        if name == "torch":
            version = entry.split("==")[1].split()[0]
            pins = [f"torch=={version}+cpu", *(f"    --hash=sha256:{digest}" for digest in torch_cpu_hashes)]
            files["torch-cpu.txt"].append(" \\\n".join(pins))
        files[_file_of(name)].append(entry)
    return {name: _HEAD + "\n".join(entries) + "\n" for name, entries in files.items()}


def _file_of(name: str) -> str:
    if name in ("torch", "deepspeed"):
        return f"{name}.txt"
    if name in BUILD:
        return "build.txt"
    return "cuda.txt" if _CUDA.fullmatch(name) else "lock.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.lock", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("compiled", metavar="FILE", type=Path, help="the lock file that uv wrote")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder for the files")
    options = parser.parse_args(arguments)
    lines = (options.folder / "torch-cpu.sha256").read_text(encoding="utf-8").splitlines()
    hashes = [line.split()[0] for line in lines if line and not line.startswith("#")]
    for name, content in split(options.compiled.read_text(encoding="utf-8"), hashes).items():
        (options.folder / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
