"""Tests of `earshot shards inspect`, which describes and indexes shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from model.lengths import TokenRate
from tests.trainer.data_corpus import audio_bytes, clip_rows, data_config, row, write_manifest
from tools.inspect_shards import main
from tools.make_shards import main as make_shards
from trainer.data.config import DatasetConfig
from trainer.data.loader import Loader
from trainer.data.prepare import prepare
from trainer.data.stream import SampleStream

DEFAULTS = ["--set", "task=asr", "--set", "split=train", "--set", "instruction=Transcribe."]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    rows = clip_rows(tmp_path, 6, seconds=0.6)
    rows += clip_rows(tmp_path, 3, prefix="er", task="er", language="pl", source="elsewhere", seconds=2.5)
    rows.append(row("text", task="text"))
    manifest = write_manifest(tmp_path, rows)
    assert make_shards([str(manifest), str(tmp_path / "out"), "--max-shard-samples", "4"]) == 0
    return tmp_path / "out"


def test_counts_hours_and_durations(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([str(made), "--json", "--png", str(tmp_path / "h.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_samples"], report["num_shards"], report["damage"]) == (10, 3, [])
    assert {k: v["num_samples"] for k, v in report["by"]["task"].items()} == {"asr": 6, "er": 3, "text": 1}
    assert report["by"]["language"]["pl"]["hours"] == pytest.approx((2.5 * 3 + 0.03) / 3600)
    assert set(report["by"]["source"]) == {"tests", "elsewhere"}
    counts = dict(zip(report["duration_edges_sec"], report["duration_counts"], strict=True))
    assert counts[0.5] == 6 and counts[2.0] == 3 and sum(counts.values()) == 9
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(made)]) == 0
    assert "all shards and samples match the index" in capsys.readouterr().out


def test_conversations_are_counted_by_their_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first, second) = clip_rows(tmp_path, 2, seconds=0.2)
    ask, said = {"role": "user", "content": "<audio>Q"}, {"role": "assistant", "content": "A"}
    system, plain = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}
    both = [first["audio"], second["audio"]]
    rows = [
        {"id": "one", "messages": [ask, said], "audio": both[0]},
        {"id": "two", "messages": [system, ask, said, plain, said], "audio": both[0]},
        {"id": "three", "messages": [ask, said, plain, said, ask, said], "audio": both},
    ]
    rows = [{"task": "sqa", "split": "train", **fields} for fields in rows]
    manifest = write_manifest(tmp_path, [first, *rows])
    assert make_shards([str(manifest), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "out")]) == 0
    assert (
        "conversations: 3 with 6 answers (1 with 1, 1 with 2, 1 with 3); 1 with a system prompt, 1 with audio after "
        "the first question\n"
    ) in capsys.readouterr().out
    assert main([str(tmp_path / "out"), "--no-check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conversations"] is None


@pytest.mark.parametrize(("place", "words"), [("nope/x.png", "nope is not a folder"), ("", "(Is a directory")])
def test_missing_folder_for_the_plot_is_reported_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, words: str
) -> None:
    png = tmp_path / place
    assert main([str(tmp_path / "no-shards"), "--png", str(png)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --png {png}: ") and words in error and error.count("\n") == 1


def test_damage_is_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads((made / "shard-000001.idx.json").read_text())
    key, _, _, _, members = table["samples"][2]
    shard = bytearray((made / "shard-000001.tar").read_bytes())
    shard[members[0][1] + 20] ^= 255
    (made / "shard-000001.tar").write_bytes(shard)
    (made / "shard-000002.tar").write_bytes((made / "shard-000002.tar").read_bytes()[:-2048])
    capsys.readouterr()
    assert main([str(made), "--json"]) == 1
    damage = json.loads(capsys.readouterr().out)["damage"]
    assert any("shard-000001.tar: its SHA-256 differs from the index" in d for d in damage)
    assert any(f"shard-000001.tar: sample {key} is truncated or altered" in d for d in damage)
    assert any("shard-000002.tar" in d and "its index says" in d for d in damage)
    assert not any("shard-000000" in d for d in damage)
    assert main([str(made), "--json", "--no-check"]) == 0


def foreign(folder: Path) -> None:
    """Write shards with the package webdataset. Their transcripts are text files, and one sample cannot be used."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "a.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"talk/{i}", "flac": audio_bytes(0.2 + i / 10, seed=i), "txt": f"words {i}"})
    with webdataset.TarWriter(str(folder / "b.tar")) as writer:
        for i in range(3):
            fields = {"answer": f"json {i}", "language": "pl"}
            writer.write({"__key__": f"more-{i}", "wav": audio_bytes(0.3, seed=i, kind="WAV"), "json": fields})
        writer.write({"__key__": "broken", "flac": b"fLaC", "txt": "no sound"})


def test_shards_of_other_programs_are_indexed_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "theirs")
    before = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}
    assert main([str(tmp_path / "theirs"), "--build-index", *DEFAULTS, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_samples"], report["num_shards"]) == (7, 2)
    (skipped_samples,) = report["skipped_samples"]
    assert "b.tar: broken: broken:" in skipped_samples
    assert {n: d for n, d in before.items() if (tmp_path / "theirs" / n).read_bytes() == d} == before
    data = prepare(data_config(tmp_path, DatasetConfig(name="theirs", shards="theirs")), TokenRate((2,)))
    with Loader(SampleStream(data, seed=0, num_batches=7)) as loader:
        found = {s.key: s for batch, _ in loader for s in batch.samples}
        assert loader.num_skipped == {}
    assert set(found) == {f"talk/{i}" for i in range(4)} | {f"more-{i}" for i in range(3)}
    assert found["talk/2"].meta["answer"] == "words 2" and found["talk/2"].meta["instruction"] == "Transcribe."
    assert found["more-1"].meta["answer"] == "json 1" and found["more-1"].meta["language"] == "pl"
    assert found["talk/3"].clips[0].shape[0] == 8000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--build-index"], "contains no *.tar"),
        ([], "shards.json"),
        (["--set", "a=b"], "--set: needs --build-index"),
        (["--build-index", "--set", "nothing"], "must be FIELD=TEXT"),
    ],
)
def test_user_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_non_tar_files_and_existing_indexes_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "x.tar").write_bytes(b"no tar at all" * 100)
    assert main([str(tmp_path / "odd"), "--build-index"]) == 2
    assert "x.tar: cannot be read as a tar" in capsys.readouterr().err
    assert main([str(made), "--build-index"]) == 2
    assert "has shards.json already" in capsys.readouterr().err


def test_a_tar_with_folders_and_links_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd").mkdir()
    with tarfile.open(tmp_path / "odd" / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        data = audio_bytes(0.2)
        info = tarfile.TarInfo("d/one.FLAC")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert main([str(tmp_path / "odd"), "--build-index", *DEFAULTS, "--set", "answer=a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 1
