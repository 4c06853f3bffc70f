"""Tests of the encoder family and the commands in docs/tutorial_encoder.md.

The family is not part of the project.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.batch import Ragged
from model.config import EncoderConfig, ModelConfig
from model.encoders.base import at_mixture_rate
from model.encoders.families import ENCODER_FAMILIES
from model.encoders.registry import build_encoder, encoder_dim, encoder_flops, encoder_windowing
from model.errors import UserError
from model.lengths import num_frames
from tests.distributed.harness import run_ranks
from tests.documented_run import run_earshot
from tests.tools.exportable import write_manifest, write_run
from tools import export
from tools.demo_corpus import write_corpus
from trainer.config.convert import from_tree
from trainer.config.reference import sections
from trainer.export.code import remote_code
from trainer.parallel.topology import Topology
from trainer.parity_cases import tiny_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial_encoder.md").read_text(encoding="utf-8")
LENGTHS = (6_400, 12_345, 639, 100, 40_000, 1_281)


def register(folder: str) -> None:
    """Add the family to the table as a plug-in would, and put its module on the Python path."""
    if folder not in sys.path:
        sys.path.append(folder)
    ENCODER_FAMILIES["toy"] = "toy_encoder:TOY"


def write_package(folder: Path) -> None:
    """Write the two files that the tutorial contains."""
    (folder / "src").mkdir(parents=True)
    for name, language in (("pyproject.toml", "toml"), ("src/toy_encoder.py", "python")):
        (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
        (folder / name).write_text(text, encoding="utf-8")


def model_with_toys() -> ModelConfig:
    """Return the tiny model, with a primary encoder and a first expert of this family."""
    model = tiny_model()
    toys = [EncoderConfig(name, "toy", config={"hidden_size": size}) for name, size in (("ears", 24), ("toy", 16))]
    return replace(model, primary=toys[0], experts=(toys[1], *model.experts[1:]))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "plugin" / "src"
    write_package(folder.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    register(str(folder))
    yield folder
    del ENCODER_FAMILIES["toy"]
    sys.modules.pop("toy_encoder", None)


def clips(lengths: tuple[int, ...]) -> Ragged:
    made = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in lengths]
    return Ragged.of(made)


def test_a_recipe_names_the_family(plugin: Path) -> None:
    encoder = from_tree(EncoderConfig, {"name": "ears", "family": "toy"}, "model.primary")
    assert encoder.family == "toy" and encoder_dim(encoder) == 16
    (key,) = (k for s in sections("model.primary") for k in s.keys if k.path == "model.primary.family")
    names = f"one of {', '.join(ENCODER_FAMILIES)}"
    assert key.type == names and names.endswith(", toy")
    with pytest.raises(UserError, match=f"model.primary.family = 'tpy': expected {names}"):
        from_tree(EncoderConfig, {"family": "tpy"}, "model.primary")
    with pytest.raises(UserError, match="config.hiden_size is unknown; did you mean hidden_size"):
        build_encoder(EncoderConfig("ears", "toy", config={"hiden_size": 8}))
    with pytest.raises(UserError, match=r"window_sec = 1.02; must be a positive multiple of 0.04 s"):
        build_encoder(EncoderConfig("ears", "toy", window_sec=1.02))
    with pytest.raises(UserError, match="length_mode = trim; use full"):
        build_encoder(EncoderConfig("ears", "toy", length_mode="trim"))


@pytest.mark.parametrize("window_sec", [30.0, 0.4])
def test_its_25_frames_a_second_become_50(plugin: Path, window_sec: float) -> None:
    config = EncoderConfig("ears", "toy", window_sec=window_sec)
    encoder, audio = build_encoder(config), clips(LENGTHS)
    assert encoder.windowing == encoder_windowing(config)
    assert encoder_flops(config, 32_000) == 2.0 * encoder_flops(config, 16_000) > 0
    features = encoder(audio)
    assert features.lengths == tuple(num_frames(n) for n in LENGTHS)
    for wave, rows in zip(audio.split(), features.split(), strict=True):
        alone = encoder(Ragged.of([wave]))
        torch.testing.assert_close(alone.values, rows)
        own: Any = encoder.encode(Ragged.of([wave])) if len(wave) <= encoder.windowing.window_samples else None
        if own is not None:
            expected = torch.nn.functional.interpolate(own.T[None], scale_factor=2, mode="linear")[0].T
            torch.testing.assert_close(rows, expected[: len(rows)])


@pytest.mark.parametrize(("frame_samples", "size"), [(640, 7), (480, 9), (160, 31), (1600, 3)])
def test_frames_of_any_rate_keep_their_time(frame_samples: int, size: int) -> None:
    """Check that interpolation keeps times: each frame holds the time of its center, and so must each new frame.

    New frames before the first or after the last center hold the time of that center.
    """
    times = (torch.arange(size, dtype=torch.float64) + 0.5) * frame_samples
    wanted = num_frames(size * frame_samples)
    pair = Ragged(torch.cat([times, times + 1e6])[:, None].requires_grad_(), (size, size))
    found = at_mixture_rate(pair, frame_samples, (wanted, wanted))
    centres = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * 320).clamp(times[0], times[-1])
    torch.testing.assert_close(found.values[:, 0], torch.cat([centres, centres + 1e6]), rtol=0, atol=0.1)
    found.values.sum().backward()
    assert pair.values.grad is not None and pair.values.grad.sum() == pytest.approx(2 * wanted)


def test_frames_at_the_mixtures_rate_are_returned_as_they_are() -> None:
    frames = Ragged(torch.randn(5, 3), (2, 3))
    assert at_mixture_rate(frames, 320, (2, 3)) is frames


def train(folder: str) -> list[list[float]]:
    """Compare this rank's training with the single-process model.

    Returns:
        The relative differences [loss, gradient] for each batch and, in the last row, of a few training steps.
    """
    from trainer import parity, parity_cases
    from trainer.parallel.groups import build_groups, connect
    from trainer.parity_cases import DS_CONFIG

    register(folder)
    rank, world, device = connect(timeout_sec=100)
    groups = build_groups(Topology(world, 1, 1, 2), rank, device, parity_cases.SEED)
    model = model_with_toys()
    step, oracle = parity.build_step(model, groups, DS_CONFIG, 2), parity.build_oracle(model)
    rows = []
    for kind, expert in (("mixed", None), ("one_expert", 0)):
        with parity.favoured(step, expert):
            found = parity.compare(step, oracle, parity_cases.make_samples(kind, world, model.adapter.rate))
        rows.append([found.loss, found.gradient])
    loss, norm = parity.loss_curves(step, oracle, 2)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return [*rows, [loss, norm]]


@pytest.mark.timeout(200)
def test_it_trains_on_two_ranks_as_in_one_process(plugin: Path) -> None:
    (*batches, curve), _ = run_ranks(2, train, {"folder": str(plugin)}, timeout_sec=150)
    assert all(max(row) <= 1e-5 for row in batches), batches
    assert max(curve) <= 1e-4, curve


@pytest.mark.timeout(200)
def test_its_export_carries_its_file(plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", model=model_with_toys())
    manifest = write_manifest(tmp_path)
    out = tmp_path / "out"
    code = export.main([str(tmp_path / "run"), str(out), "--dtype", "fp32", "--verify", str(manifest)])
    assert code == 0, capsys.readouterr().err  # --verify: the folder's code computes what the training graph computes
    assert "from .encoders_base import" in (out / "plugin_toy_encoder.py").read_text()
    assert not (out / "encoders_hubert.py").exists() and (out / "encoders_wavlm.py").exists()
    assert any(name.startswith("audio.primary.encoder.embed") for name in load_file(out / "model.safetensors"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_text("from .other import x\n"), "not a relative module"),
        (lambda file: file.write_text("import toy_encoder.other\n"), "not toy_encoder.other"),
        (lambda file: ENCODER_FAMILIES.update(toy=object()), "make the entry a string 'module:NAME'"),
    ],
)
def test_a_family_of_several_files_is_not_exported(plugin: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(plugin / "toy_encoder.py")
    with pytest.raises(UserError, match=message):
        remote_code({"toy"})


def environment(folder: Path) -> str:
    """Create an environment with all packages of the current one, into which pip can install; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return str(folder / "bin" / "python")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    commands = [shlex.split(line) for line in re.findall(r"^\$ (.*)", PAGE.replace("\\\n", ""), flags=re.MULTILINE)]
    commands = [words[: words.index("#")] if "#" in words else words for words in commands]
    install, corpus, *others = commands
    write_package(tmp_path / "toy_encoder")
    write_corpus(tmp_path / corpus[-1], scale=0.05)  # smaller than the corpus that the command writes
    assert install[:4] == ["python", "-m", "pip", "install"] and install[-2:] == ["-e", "toy_encoder"]
    # The working folder contains the package's folder, which must not hide the module of the same name.
    python = environment(tmp_path / "venv")
    done = subprocess.run([python, *install[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "BuildBackendWarning" not in done.stderr, done.stderr
    fewer = [
        "parallel.num_ranks=1",
        "train.steps=2",
        "eval.max_samples=2",
        "eval.max_new_tokens=2",
        "checkpoint.every_steps=2",
    ]
    printed = {}
    for program, name, *words in others:
        assert program == "earshot"
        printed[name] = run_earshot([name, *words, *(fewer if name == "train" else [])], tmp_path, python)
    assert list(printed) == ["train", "profile", "export"]
    assert re.search(r"^toy +1\.000 ", printed["profile"], flags=re.MULTILINE), printed
    assert (tmp_path / "toy_model" / "plugin_toy_encoder.py").exists()
