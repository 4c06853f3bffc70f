"""Tests of `earshot import`: security, resuming, processes, memory, and real recordings in three formats."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data_corpus import audio_bytes, clip_rows
from tests.trainer.import_runs import manifest, run, skipped
from tests.trainer.import_sources import SOURCES, UTTERANCES, heard, lines
from trainer.data.manifest import read_manifest
from trainer.importers.fields import Ids, Naming, to_sample
from trainer.importers.row import Clip, Row
from trainer.importers.source import Source

KIT = Path(os.environ.get("KIT_DIR", Path(__file__).parents[2] / ".." / "shared" / "kit"))
needs_kit = pytest.mark.skipif(not KIT.is_dir(), reason=f"there are no real recordings in {KIT}; set KIT_DIR")
COMMAND = [sys.executable, "-m", "tools.import_data"]
ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_no_command_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a b.wav").write_bytes(audio_bytes(0.1, kind="WAV", channels=2))
    made = tmp_path / "made"
    entries = {
        "cat": "cat 'a b.wav' |",
        "sph": "sph2pipe -f wav -p -c 2 'a b.wav' |",
        "touch": f"touch {made} |",
        "and": f"cat 'a b.wav' ; touch {made} |",
        "two": f"cat 'a b.wav' | tee {made} |",
        "sub": f"cat $(touch {made}) |",
        "tick": f"cat `touch {made}` |",
        "into": f"cat 'a b.wav' > {made} |",
        "sox": "sox 'a b.wav' -t wav - speed 1.1 |",
        "other": "cat 'a b.wav' c.wav |",
        "open": "cat 'a b.wav |",
        "before": f"| touch {made}",
        "url": "https://x.org/a.wav",
    }
    (tmp_path / "wav.scp").write_text("".join(f"{k} {v}\n" for k, v in entries.items()))
    (tmp_path / "text").write_text("".join(f"{k} text\n" for k in entries))
    assert run("kaldi", tmp_path, tmp_path / "out", jobs=2) == 1
    share = (len(entries) - 2) / len(entries)
    assert f"exit code 1: {share:.1%} of the rows were skipped, more than --max-skipped" in capsys.readouterr().out
    assert not made.exists() and not (ROOT / "made").exists()
    assert [r["id"] for r in manifest(tmp_path / "out")] == ["cat", "sph"]
    reasons = dict(skipped(tmp_path / "out"))
    assert {k.rpartition("/")[2]: r for k, r in reasons.items()} == {
        **{k: "pipe" for k in entries if k not in ("cat", "sph")},
        "url": "url",
    }
    nemo = lines(tmp_path / "m.json", [{"audio_filepath": f"pipe:touch {made}", "text": "t"}])
    assert run("nemo", nemo, tmp_path / "no") == 2
    assert not made.exists()


def test_files_outside_are_read_only_with_follow(tmp_path: Path) -> None:
    clip = audio_bytes(0.1, kind="WAV")
    (tmp_path / "secret.wav").write_bytes(clip)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "in.wav").write_bytes(clip)
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    os.mkfifo(folder / "fifo.wav")
    paths = [
        "in.wav",
        "../secret.wav",
        str(tmp_path / "secret.wav"),
        "link.wav",
        "../in/in.wav",
        "fifo.wav",
        "/dev/zero",
    ]
    rows = [{"audio": p, "text": "t"} for p in paths]
    source = lines(folder / "m.json", rows)
    assert run("nemo", source, tmp_path / "out") == 1
    assert [r for _, r in skipped(tmp_path / "out")] == ["outside", "outside", "outside", "no_file", "outside"]
    assert run("nemo", source, tmp_path / "followed", "--follow", "--max-skipped-fraction", "0.3") == 0
    assert [r for _, r in skipped(tmp_path / "followed")] == ["no_file", "no_file"]
    lines(folder / "other.json", [{"audio": "secret.wav", "text": "t"}])
    assert run("nemo", folder / "other.json", tmp_path / "third", "--audio", str(tmp_path)) == 0


def test_a_table_that_links_outside_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "in" / "wav.scp").symlink_to(tmp_path / "wav.scp")
    assert run("kaldi", tmp_path / "in", tmp_path / "out") == 2
    assert "is outside of" in capsys.readouterr().err


def test_check_writes_nothing_and_reports_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SOURCES["nemo"](tmp_path / "in")
    assert run("nemo", source, tmp_path / "out", "--json", "--check") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert run("nemo", source, tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == planned
    assert planned["num_samples"] == len(UTTERANCES)


def test_output_is_independent_of_processes_and_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**r, "audio": str(r["audio"])} for r in clip_rows(tmp_path, 70, seconds=0.02, start=0.005)]
    source = lines(tmp_path / "m.json", rows)
    assert run("nemo", source, tmp_path / "one", jobs=1) == 0
    assert run("nemo", source, tmp_path / "two", jobs=2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 72
    capsys.readouterr()
    assert run("nemo", source, tmp_path / "one") == 2
    assert "contains manifest.jsonl" in capsys.readouterr().err
    assert run("nemo", source, tmp_path) == 2
    assert "is neither empty nor an unfinished import" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("shards", [False, True])
def test_a_killed_import_continues(shards: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = clip_rows(tmp_path, 4, seconds=3.0)
    many = [{**r, "id": f"{r['id']}-{i}", "start": 0.01} for i in range(100) for r in rows]
    source = lines(tmp_path / "m.json", many)
    options = ["--shards", "--max-shard-samples", "40"] if shards else []
    assert run("nemo", source, tmp_path / "whole", *options) == 0
    arguments = ["--from", "nemo", str(source), str(tmp_path / "out"), "--jobs", "2", *options]
    process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _num_done(tmp_path / "out", shards):
            time.sleep(0.01)
        workers = _children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    finally:
        process.kill()
    assert _num_done(tmp_path / "out", shards)
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}/exe").exists() for pid in workers):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in workers)
    capsys.readouterr()
    assert run("nemo", source, tmp_path / "out", "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["num_resumed_rows"] < len(many) and report["num_samples"] == len(many)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _num_done(out: Path, shards: bool) -> int:
    if shards:
        return len(list(out.glob("import-*.part.json")))
    journal = out / "importing.jsonl"
    return len(journal.read_bytes().splitlines()) - 1 if journal.exists() else 0


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_torn_journal_continues_and_a_changed_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.importers import run as importing

    monkeypatch.setattr(importing, "_CHUNK_ROWS", 2)
    source = lines(
        tmp_path / "m.json", [{"id": f"r{i}", "task": "text", "instruction": "q", "answer": "a"} for i in range(9)]
    )
    assert run("nemo", source, tmp_path / "whole") == 0
    monkeypatch.setattr("trainer.importers.sinks.ManifestSink.finish", lambda self: os._exit)
    assert run("nemo", source, tmp_path / "out") == 0
    monkeypatch.undo()
    journal = tmp_path / "out" / "importing.jsonl"
    journal.write_bytes(journal.read_bytes()[:-200])
    kept = source.read_bytes()
    source.write_bytes(kept.replace(b'"r0"', b'"x0"'))
    assert run("nemo", source, tmp_path / "out") == 2
    assert "the source has changed" in capsys.readouterr().err
    source.write_bytes(kept)
    assert run("nemo", source, tmp_path / "out", "--set", "language=en") == 2
    assert "with other options" in capsys.readouterr().err
    assert run("nemo", source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_remains_if_no_row_can_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lines(tmp_path / "m.json", [{"id": "a", "answer": "b"}])
    assert run("nemo", source, tmp_path / "out") == 2
    assert "no row can be imported (1 wrong_type (first: m.json:1: task is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("nemo", source, tmp_path / "out", "--set", "task=text", "--set", "instruction=Q") == 0


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_memory_is_flat_over_many_rows(tmp_path: Path) -> None:
    def peak(num: int) -> int:
        with open(tmp_path / f"{num}.csv", "w", encoding="utf-8") as file:
            file.write("id,text,task,instruction\n")
            file.writelines(f"row-{i},{'word ' * 20}{i},text,Repeat.\n" for i in range(num))
        code = (
            "import resource, sys; from tools.import_data import main; code = main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        command = [sys.executable, "-c", code, "--from", "csv", str(tmp_path / f"{num}.csv"), str(tmp_path / f"{num}")]
        found = subprocess.run(
            [*command, "--jobs", "1"], capture_output=True, text=True, timeout=150, cwd=ROOT, check=True
        )
        return int(found.stdout.splitlines()[-1]) << 10

    few, many = peak(1_000), peak(100_000)
    assert len((tmp_path / "100000" / "manifest.jsonl").read_bytes().splitlines()) == 100_000
    assert many - few < 16 << 20, (few, many)  # 65 bytes per id to detect duplicates, and fragmentation


@needs_kit
@pytest.mark.parametrize("form", ["nemo", "kaldi", "csv"])
def test_the_kit_is_the_same_after_export_and_import(form: str, tmp_path: Path) -> None:
    """Check that real recordings give the same samples after they were exported in the format of another program."""
    rows: list[dict[str, Any]] = []
    for task in ("asr", "er", "aqa"):
        found = [json.loads(line) for line in (KIT / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
        if form != "kaldi" or task == "asr":  # Kaldi's format has only transcripts
            rows += found[:: len(found) // 12]
    source = _exported(form, rows, tmp_path / "in")
    assert run(form, source, tmp_path / "out", "--follow", "--audio", str(KIT)) == 0
    imported = {r.metadata.get("original_id", r.key): r for r in read_manifest(tmp_path / "out" / "manifest.jsonl")}
    assert set(imported) == {r["id"] for r in rows} and len(rows) >= 12
    for row in rows:
        again = imported[row["id"]]
        assert again.metadata["answer"] == row["answer"] and again.metadata["task"] == row["task"]
        if form != "kaldi":
            assert again.metadata["instruction"] == row["instruction"]
            assert again.metadata.get("choices") == row.get("choices")
        (path,) = again.audio
        assert np.array_equal(heard(path.read_bytes()), heard((KIT / row["audio"]).read_bytes()))
        assert again.metadata["duration"] == pytest.approx(row["duration"], abs=0.05)


def _exported(form: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir()
    if form == "kaldi":
        for name, field in (("wav.scp", "audio"), ("text", "answer"), ("utt2lang", "language")):
            (folder / name).write_text("".join(f"{r['id']} {r[field]}\n" for r in rows), encoding="utf-8")
        return folder
    names = ("id", "task", "split", "instruction", "choices", "language", "duration")
    others = [{n: r[n] for n in names if n in r} for r in rows]
    if form == "nemo":
        pairs = zip(rows, others, strict=True)
        return lines(folder / "m.json", [{"audio_filepath": r["audio"], "text": r["answer"], **o} for r, o in pairs])
    with open(folder / "kit.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["audio", "text", *names])
        writer.writeheader()
        for r, o in zip(rows, others, strict=True):
            choices = {"choices": json.dumps(r["choices"])} if "choices" in r else {}
            writer.writerow({"audio": r["audio"], "text": r["answer"], **o, **choices})
    return folder / "kit.csv"


def test_rows_without_a_split_are_divided_by_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["audio,text,start,end,split"]
    for i in range(200):
        (tmp_path / f"{i}.wav").write_bytes(audio_bytes(0.1, kind="WAV"))
        rows += [f"{i}.wav,one,0,0.05,", f"{i}.wav,two,0.05,0.1,"]
    rows.append("0.wav,three,0,0.05,mine")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    source, out = tmp_path / "t.csv", tmp_path / "out"
    assert run("csv", source, out, "--divide", "dev=0.2,test=0.1") == 0
    found = manifest(out)
    assert found.pop()["split"] == "mine"
    assert [r["split"] for r in found[::2]] == [r["split"] for r in found[1::2]]
    counts = Counter(r["split"] for r in found[::2])
    assert 25 <= counts["dev"] <= 55 and 8 <= counts["test"] <= 32 and counts.total() == 200
    assert run("csv", source, out, "--divide", "dev=0.3") == 2  # OUT contains another import
    for wrong in ("dev", "dev=x", "dev=0.5,test=0.5", "dev=-1"):
        assert run("csv", source, out, "--divide", wrong) == 2
        assert f"--divide {wrong}" in capsys.readouterr().err


@pytest.mark.parametrize("num", [3, 5, 32])
def test_every_split_of_a_small_table_gets_a_recording(
    num: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(8):  # different names have different hashes, which choose the splits
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = ["audio,text"]
        for i in range(num):
            (folder / f"{seed}-{i}.wav").write_bytes(audio_bytes(0.1, kind="WAV"))
            rows.append(f"{seed}-{i}.wav,one")
        (folder / "t.csv").write_text("\n".join(rows))
        assert run("csv", folder / "t.csv", folder / "out", "--divide", "dev=0.1,test=0.1") == 0
        counts = Counter(r["split"] for r in manifest(folder / "out"))
        assert set(counts) == {"train", "dev", "test"} and counts["train"] >= 1
        line = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        assert f"splits: {line}\n" in capsys.readouterr().out


def test_a_table_with_one_split_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.1, kind="WAV"))
    (tmp_path / "t.csv").write_text("audio,text\na.wav,one\n")
    assert run("csv", tmp_path / "t.csv", tmp_path / "out", "--check") == 0
    assert "splits: train 1; training needs other samples for evaluation: --divide" in capsys.readouterr().out
    assert run("csv", tmp_path / "t.csv", tmp_path / "out", "--divide", "dev=0.1") == 0
    assert "splits: train 1; no sample is in dev, because there are too few recordings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "words", "options"),
    [
        (
            "audio,said",
            "specify its column with --map answer=NAME, and add --set task=asr for transcripts "
            "(the row has audio, said)",
            ["--map", "answer=said", "--set", "task=asr"],
        ),
        ("clip,text", "specify its column with --map audio=NAME (the row has clip, text)", ["--map", "audio=clip"]),
    ],
)
def test_a_column_with_an_unknown_name_is_asked_for(
    header: str, words: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.1, kind="WAV"))
    (tmp_path / "t.csv").write_text(f"{header}\na.wav,one\n")
    assert run("csv", tmp_path / "t.csv", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert run("csv", tmp_path / "t.csv", tmp_path / "out", *options) == 0


def test_recordings_that_are_not_files_of_their_own_are_divided_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "all.ark").write_bytes(b"")
    source, naming = Source(tmp_path), Naming(shares={"dev": 0.5})

    def splits(clips: list[Clip]) -> list[str]:
        rows = [Row(f"row {i}", {"audio": clip, "text": "one"}) for i, clip in enumerate(clips)]
        return [to_sample(row, i, source, naming, Ids()).fields["split"] for i, row in enumerate(rows)]

    embedded = splits([Clip(".wav", data=bytes([i // 2])) for i in range(40)])
    assert embedded[::2] == embedded[1::2] and set(embedded) == {"dev", "train"}
    assert set(splits([Clip("all.ark", span=(i, 1)) for i in range(20)])) == {"dev", "train"}
