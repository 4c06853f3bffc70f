"""Tests that the locked packages are the packages that the project requires, and that each has a hash."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.lock import split

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef, import-not-found]

ROOT = Path(__file__).parent.parent
FILES = ("build.txt", "torch.txt", "cuda.txt", "deepspeed.txt", "lock.txt")
OTHER_TORCH = "torch-cpu.txt"
ENVIRONMENTS = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.9", "sys_platform": "linux", "extra": ""}
    | {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython"}
    | {"platform_python_implementation": "CPython"}
    for minor in (10, 11, 12)
]


def entries(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return re.findall(r"^[A-Za-z0-9].*(?:\n[ \t]+.*)*", text, re.MULTILINE)


def pinned(environment: dict[str, str]) -> dict[str, Version]:
    """Return the version of each package in an environment."""
    found: dict[str, Version] = {}
    for entry in (e for name in FILES for e in entries(name)):
        requirement = Requirement(entry.partition(" \\\n")[0])
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            (only,) = requirement.specifier
            assert only.operator == "==" and name not in found, entry
            found[name] = Version(only.version)
    return found


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *(t for e in ("demo", "dev", "models", "tensorboard", "wandb") for t in extras[e]),
    ]
    texts += [t.partition("#")[0] for t in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    return [Requirement(t) for t in texts if t.strip() and not t.startswith("earshot")]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: e["python_version"])
def test_the_lock_is_what_the_project_asks_for(environment: dict[str, str]) -> None:
    found, optional = pinned(environment), {"lhotse"}  # belongs to the extra `peers`, which is not locked
    assert len(found) > 150
    for requirement in wanted():
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        assert name in found or name in optional, f"{requirement}: not locked; run `make lock`"
        if name in found:
            assert found[name] in requirement.specifier, f"{requirement}, but {found[name]} is locked; run `make lock`"


@pytest.mark.parametrize("name", (*FILES, OTHER_TORCH))
def test_every_entry_has_a_hash_and_names_no_index(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    assert entries(name) and "://" not in text and "--index" not in text and "--find" not in text
    for entry in entries(name):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}(\s|$)", entry), entry


def test_torch_and_cuda_are_separate() -> None:
    compiled = "".join(
        f"{name}==1 \\\n    --hash=sha256:{'0' * 64}\n"
        for name in ("numpy", "torch", "triton", "nvidia-nccl-cu13", "cuda-bindings", "deepspeed", "wheel", "tqdm")
    )
    found = split(compiled, ["f" * 64])
    names = {file: re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE) for file, text in found.items()}
    assert names == {
        "build.txt": ["numpy", "wheel"],
        "torch.txt": ["torch"],
        "torch-cpu.txt": ["torch"],
        "cuda.txt": ["triton", "nvidia-nccl-cu13", "cuda-bindings"],
        "deepspeed.txt": ["deepspeed"],
        "lock.txt": ["tqdm"],
    }
    assert found["torch-cpu.txt"].endswith(f"torch==1+cpu \\\n    --hash=sha256:{'f' * 64}\n")
