"""Tests that the wheel works without the checkout, even in a folder with modules named like the project's."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.config.load import recipe_names

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def earshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a new environment, which has the current dependencies but not this checkout.

    Returns:
        The path to the command `earshot`.
    """
    folder = tmp_path_factory.mktemp("wheel")
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(command: list[str], timeout_sec: float) -> None:
        subprocess.run(command, check=True, timeout=timeout_sec, env=environ, cwd=folder)

    source = folder / "source"  # a build writes files into its source tree
    run(["git", "clone", "-q", str(ROOT), str(source)], 120)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", str(source)]
    run([*build, "-w", str(folder)], 300)
    (wheel,) = folder.glob("earshot-*.whl")
    run([sys.executable, "-m", "venv", str(folder / "venv")], 120)
    python = folder / "venv" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], 120)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    here = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{here}\n")  # the .pth file that adds this checkout is not read there
    return folder / "venv" / "bin" / "earshot"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Create a folder that contains a user's `model.py` and `tools/`, which fail if they are imported."""
    (tmp_path / "model.py").write_text("raise RuntimeError('the wrong model')\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise RuntimeError('the wrong tools')\n")
    return tmp_path


def call(earshot: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    # DeepSpeed looks for ninja in PATH.
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    return subprocess.run([str(earshot), *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)


def test_tests_and_benchmarks_are_not_installed(earshot: Path) -> None:
    (site,) = (earshot.parents[1] / "lib").glob("python*/site-packages")
    assert {"model", "trainer", "tools"} <= {p.name for p in site.iterdir()}
    assert not {"bench", "tests", "slurm", "ds_configs"} & {p.name for p in site.iterdir()}
    assert all((site / name / "py.typed").exists() for name in ("model", "trainer", "tools"))


def test_dry_run_of_every_recipe(earshot: Path, foreign: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(
            lambda name: (name, call(earshot, foreign, "train", name, "--dry-run", "--no-data")), recipe_names()
        )
        assert not [(name, d.stderr) for name, d in done if d.returncode != 0]


def test_init_and_a_few_steps_of_the_demo(earshot: Path, foreign: Path) -> None:
    done = call(earshot, foreign, "init", "project")
    assert done.returncode == 0, done.stderr
    assert (foreign / "project" / "slurm" / "env.sh").exists()
    assert (foreign / "project" / "ds_configs" / "zero3.json").exists()
    done = call(earshot, foreign / "project", "train", "recipe.yaml", "--dry-run", "--no-data")
    assert done.returncode == 0, done.stderr
    done = call(earshot, foreign, "demo", "train.steps=2", "optim.warmup_steps=1", "eval.max_new_tokens=2")
    assert done.returncode == 0 and "word error rate" in done.stdout, done.stderr
    assert (foreign / "runs" / "demo" / "summary.json").exists(), done.stdout + done.stderr
