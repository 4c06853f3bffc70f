"""Tests that weights are used only with the tokenizer they were trained with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from tests.tools.exportable import INSTRUCTION, STEP, write_manifest, write_run
from tools import evaluate, export, transcribe
from trainer.checkpoint.catalog import find_checkpoint
from trainer.checkpoint.config import CheckpointConfig
from trainer.config.schema import Recipe, TrainConfig
from trainer.data.config import DataConfig, TokenizerConfig
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from trainer.export.source import Source
from trainer.parity_cases import tiny_model
from trainer.run_tokenizer import DIGEST, adopt, check_named, find_owned, keep_tokenizer, of_checkpoint, of_export

ROOT = Path(__file__).parents[1]
KIT = Path(os.environ.get("KIT_DIR", ROOT / ".." / "shared" / "kit"))
NUM_PER_TASK = 24
OVERRIDES = (
    "model.ctc_weight=0",
    "data.tokenizer.train_vocab_size=80",
    "parallel.num_ranks=1",
    "eval.max_new_tokens=2",
)

needs_kit = pytest.mark.skipif(not KIT.is_dir(), reason=f"there are no real recordings in {KIT}; set KIT_DIR")


def run_module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def rows_of(task: str, first: int = 0) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (KIT / f"{task}.jsonl").read_text().splitlines()]
    chosen = [row for row in rows if row["split"] == "train"][first : first + NUM_PER_TASK]
    return [{**row, "split": "test" if i == 0 else "train"} for i, row in enumerate(chosen)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Place:
    """A folder with two manifests of real recordings, and runs that read them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        (folder / "audio").symlink_to(KIT.resolve() / "audio")
        write(folder / "demo.jsonl", [row for task in ("asr", "aqa", "er") for row in rows_of(task)])
        write(folder / "questions.jsonl", rows_of("sqa"))

    def train(self, name: str, *overrides: object) -> subprocess.CompletedProcess[str]:
        common = [f"data.root={self.folder}", f"data.cache_dir={self.folder / 'cache'}", f"train.run_dir={self.runs}"]
        return run_module("trainer", "debug", f"name={name}", *common, *OVERRIDES, *overrides)

    def state(self, name: str, step: int) -> dict[str, Any]:
        path = self.runs / name / "checkpoints" / f"step-{step:08d}" / "state.json"
        extra: dict[str, Any] = json.loads(path.read_text())["extra"]
        return extra


JOINING = "data.datasets=[{name: demo, manifest: demo.jsonl}, {name: questions, manifest: questions.jsonl}]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Create a place, and train a run `base` there for four steps."""
    place = Place(tmp_path_factory.mktemp("place"))
    done = place.train("base")
    assert done.returncode == 0, done.stderr
    return place


def copy_run(place: Place, name: str) -> Path:
    shutil.copytree(place.runs / "base", place.runs / name)
    return place.runs / name


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check that a training ended with exit code 2 and with one error line that contains all `words`."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


@needs_kit
@pytest.mark.timeout(420)
def test_dataset_added_at_a_resume_keeps_the_tokenizer(place: Place) -> None:
    run = copy_run(place, "joined")
    done = place.train("joined", JOINING, "train.steps=6")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 4" in done.stdout + done.stderr
    before, after = place.state("joined", 4), place.state("joined", 6)
    assert before["tokenizer_digest"] == after["tokenizer_digest"]
    assert (run / "tokenizer.model").read_bytes() == (place.runs / "base" / "tokenizer.model").read_bytes()
    assert Path(after["tokenizer"]).read_bytes() == (run / "tokenizer.model").read_bytes()


@needs_kit
@pytest.mark.timeout(420)
def test_run_that_starts_from_weights_uses_their_tokenizer(place: Place) -> None:
    base = place.runs / "base"
    wanted = place.state("base", 4)[DIGEST]
    assert export.main([str(base), str(place.folder / "exported"), "--dtype", "fp32"]) == 0
    for name, start, num_ranks in (
        ("a", base, 1),
        ("b", base / "checkpoints" / "step-00000002", 1),
        ("c", place.folder / "exported", 2),
    ):
        other = "data.datasets=[{name: questions, manifest: questions.jsonl}]"
        overrides = [other, "model.ctc_weight=1", "train.steps=1", f"parallel.num_ranks={num_ranks}"]
        done = place.train(name, f"checkpoint.start_from={start}", *overrides)
        assert done.returncode == 0, done.stderr
        assert f"starting with the weights of {start}" in done.stderr and "new: the head of the loss ctc" in done.stderr
        assert place.state(name, 1)[DIGEST] == wanted
    refused(
        place.train("d", f"checkpoint.start_from={base}", "model.llm.config.hidden_size=64"),
        "checkpoint.start_from",
        "but this run needs",
        "set model.adapter or model.llm as it was",
    )


@needs_kit
@pytest.mark.timeout(420)
def test_resume_with_another_tokenizer_is_refused(place: Place) -> None:
    other = place.folder / "other.model"
    train_sentencepiece(["some other words of text"] * 9, 40, other, TokenizerConfig().placeholder)
    run = copy_run(place, "swapped")
    named = place.train("swapped", "train.steps=6", f"data.tokenizer.path={other}")
    refused(named, f"data.tokenizer.path = {other}", "not the tokenizer that", "set it to null")
    changed = place.train("swapped", "train.steps=6", 'data.tokenizer.template="{audio} {instruction}"')
    refused(changed, "data.tokenizer.template = ", "was trained with")
    shutil.copy(other, run / "tokenizer.model")
    refused(place.train("swapped", "train.steps=6"), f"{run}/tokenizer.model", "put the run's own tokenizer there")
    assert not (run / "checkpoints" / "step-00000006").exists()


# ---- Tests of tools on a tiny run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def state_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEP:08d}" / "state.json"


def other_model(run: Path) -> Path:
    """Train a tokenizer with as many pieces as the run's, but with different pieces, and return its path."""
    path = run.parent / "other.model"
    train_sentencepiece(["zebra fox jumps over lazy dogs", "quick brown"] * 9, 60, path, TokenizerConfig().placeholder)
    return path


def check_error(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and all(w in message for w in words), message


def test_tools_refuse_a_checkpoint_with_another_tokenizer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_manifest(run.parent)
    audio, out = str(run.parent / "0-0.flac"), str(run.parent / "out")
    asked = ["--prompt", f"{INSTRUCTION} a"]
    assert transcribe.main([str(run), audio, *asked]) == 0
    capsys.readouterr()
    other = other_model(run)
    assert export.main([str(run), out, "--tokenizer", str(other)]) == 2
    check_error(capsys, str(other), "not the tokenizer that", "put the run's own tokenizer there")
    shutil.copy(other, run / "tokenizer.model")
    for tool, arguments in (
        (export, [str(run), out]),
        (transcribe, [str(run), audio, *asked]),
        (evaluate, [str(run), "--data", str(manifest), "--out", str(run.parent / "evaluation")]),
    ):
        assert tool.main(arguments) == 2
        check_error(capsys, f"{run}/tokenizer.model", "not the tokenizer that")
    assert not Path(out).exists()


@pytest.mark.parametrize("chats", [False, True])
def test_export_has_the_digest_of_its_checkpoint_and_refuses_other_tokenizers(
    tmp_path: Path, chats: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, chats=chats)
    manifest = write_manifest(tmp_path)
    digest = Source(run).tokenizer().digest
    assert export.main([str(run), str(out)]) == 0
    assert export.main([str(run), f"{out}-llm", "--llm-only"]) == 0
    for folder in (out, Path(f"{out}-llm")):
        assert json.loads((folder / "config.json").read_text())[DIGEST] == digest
    owned = of_export(str(out))
    assert owned.load(owned.put_into(str(tmp_path / "cache"))).digest == digest
    settings = out / "processor_config.json"
    settings.write_text(settings.read_text().replace("{instruction}\\n", "{instruction}"))
    capsys.readouterr()
    for tool, arguments in (
        (transcribe, [str(out), str(tmp_path / "0-0.flac")]),
        (evaluate, [str(out), "--data", str(manifest), "--out", str(tmp_path / "evaluation")]),
    ):
        assert tool.main(arguments) == 2
        check_error(capsys, str(out), "its weights were trained with another tokenizer", "export it again")


def test_checkpoint_without_digest_uses_the_stored_or_named_tokenizer(run: Path) -> None:
    extra = json.loads(state_of(run).read_text())
    named = run.parent / "named.model"
    shutil.copy(run / "tokenizer.model", named)
    digest = extra["extra"].pop(DIGEST)
    extra["extra"]["tokenizer"] = str(named)
    state_of(run).write_text(json.dumps(extra))
    cache, folder = str(run.parent / "cache"), find_checkpoint(str(run))
    kept = of_checkpoint(folder)
    assert kept.digest is None and kept.load(kept.put_into(cache)).digest == digest
    (run / "tokenizer.model").unlink()
    owned = of_checkpoint(folder)
    assert owned.put_into(cache) == str(named) and owned.load(str(named)).digest == digest
    named.unlink()
    with pytest.raises(UserError, match=r"its tokenizer, .*named.model, cannot be read; put it back"):
        owned.load(owned.put_into(cache))


def test_hugging_face_tokenizer_is_stored_next_to_the_checkpoints(tmp_path: Path) -> None:
    write_run(tmp_path / "run", chats=True)
    config = TokenizerConfig(path=str(tmp_path / "run" / "hf"), template="{audio}{instruction}\n")
    tokenizer = load_tokenizer(str(config.path), config)
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.chats
    (tmp_path / "run" / "tokenizer.model").write_bytes(b"of an earlier run of this name")
    train = TrainConfig(run_dir=str(tmp_path))
    recipe = Recipe(name="run", model=tiny_model(), data=DataConfig(tokenizer=config), train=train)
    keep_tokenizer(tokenizer, recipe, tmp_path / "run", is_new=True)
    shutil.rmtree(tmp_path / "run" / "hf")
    owned = of_checkpoint(find_checkpoint(str(tmp_path / "run")))
    assert "tokenizer.json" in owned.files
    found = owned.load(owned.put_into(str(tmp_path / "cache")))
    assert found.digest == tokenizer.digest and found.prompt(INSTRUCTION, 1) == tokenizer.prompt(INSTRUCTION, 1)


def next_run(**settings: str) -> Recipe:
    """Return a recipe with these fields of `data.tokenizer`."""
    config = TokenizerConfig(**settings)  # type: ignore[arg-type]
    return Recipe(name="next", model=tiny_model(), data=DataConfig(tokenizer=config))


def test_templates_of_the_weights_are_used_if_the_recipe_gives_none(run: Path) -> None:
    owned = of_checkpoint(find_checkpoint(str(run)))
    tokenizer = owned.load(owned.put_into(str(run.parent / "cache")))
    taken = adopt(next_run(), owned)
    assert taken.data.tokenizer.template == "{audio}{instruction}\n" != TokenizerConfig().template
    given = Recipe(
        name="next", model=tiny_model(), data=DataConfig(tokenizer=TokenizerConfig(template="say {audio}{instruction}"))
    )
    with pytest.raises(UserError, match=r"data.tokenizer.template = 'say .* was trained with .*; set the key to that"):
        adopt(given, owned)
    same = Recipe(
        name="next", model=tiny_model(), data=DataConfig(tokenizer=TokenizerConfig(path=str(run / "tokenizer.model")))
    )
    check_named(adopt(same, owned), owned, tokenizer)
    other = Recipe(
        name="next", model=tiny_model(), data=DataConfig(tokenizer=TokenizerConfig(path=str(other_model(run))))
    )
    with pytest.raises(
        UserError, match=r"data.tokenizer.path = .*other.model: is not the tokenizer that .*set it to null"
    ):
        check_named(adopt(other, owned), owned, tokenizer)


def test_moved_tokenizer_is_recognised_by_its_digest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, chats=True)
    (run / "hf").rename(tmp_path / "moved")
    start = CheckpointConfig(start_from=str(run))
    recipe = replace(next_run(path=str(tmp_path / "moved")), checkpoint=start, train=TrainConfig(run_dir=str(tmp_path)))
    owned = find_owned(recipe)
    assert owned is not None and owned.put_into(str(tmp_path / "cache")) == str(tmp_path / "moved")
    assert owned.load(str(tmp_path / "moved")).digest == owned.digest
    other = other_model(run)
    owned = find_owned(replace(recipe, data=next_run(path=str(other)).data))
    assert owned is not None
    with pytest.raises(UserError, match=r"other.model: is not the tokenizer that .* was trained with"):
        owned.load(owned.put_into(str(tmp_path / "cache")))
