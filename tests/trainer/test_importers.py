"""Tests that all importers read the same samples from a corpus in their formats, and skip bad rows with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data_corpus import audio_bytes
from tests.trainer.import_runs import manifest, run, skipped
from tests.trainer.import_sources import SOURCES, UTTERANCES, heard, lines
from trainer.data.manifest import read_manifest
from trainer.data.metadata import check_metadata
from trainer.data.shards import ShardSet, parse_sample
from trainer.importers.table import IMPORTERS
from trainer.storage.store import LocalStore


def test_every_format_has_a_source() -> None:
    assert set(SOURCES) == set(IMPORTERS)


@pytest.mark.parametrize("form", list(SOURCES))
def test_a_corpus_round_trips(form: str, tmp_path: Path) -> None:
    source = SOURCES[form](tmp_path / "in")
    assert run(form, source, tmp_path / "out") == 0
    rows = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert len(rows) == len(UTTERANCES) and skipped(tmp_path / "out") == []
    by_answer = {row.metadata["answer"]: row for row in rows}
    for u in UTTERANCES:
        row = by_answer[u.text]
        check_metadata(row.metadata, len(row.audio))
        assert (row.metadata["task"], row.metadata["split"]) == ("asr", "train")
        assert u.key in (row.key, row.metadata.get("original_id", "").rpartition("/")[2])
        (path,) = row.audio
        assert np.array_equal(heard(path.read_bytes()), heard(u.data))
        assert row.metadata["duration"] == pytest.approx(len(heard(u.data)) / 16_000, abs=1e-3)


@pytest.mark.parametrize("form", ["nemo", "hf"])
def test_shards_hold_the_same_samples(form: str, tmp_path: Path) -> None:
    source = SOURCES[form](tmp_path / "in")
    assert run(form, source, tmp_path / "out", "--shards", "--max-shard-samples", "2") == 0
    shards = ShardSet(LocalStore(tmp_path / "out"))
    assert len(shards.shards) == 2 and shards.index.num_samples == len(UTTERANCES)
    found = {}
    for number in range(2):
        for entry in shards.table(number):
            start, end = entry.span
            data = (tmp_path / "out" / shards.shards[number].name).read_bytes()[start:end]
            sample = parse_sample(entry, memoryview(data), {})
            found[sample.metadata["answer"]] = bytes(sample.clips[0])
    assert all(np.array_equal(heard(found[u.text]), heard(u.data)) for u in UTTERANCES)
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


def test_fields_get_their_names_types_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.2, kind="WAV"))
    (tmp_path / "t.tsv").write_text(
        'path\temo\tchoices\tduration\tlang\tn\na.wav\tsad\t["sad", "glad"]\t7.5\tde\t\n', encoding="utf-8"
    )
    options = ["--map", "answer=emo", "--set", "task=er", "--set", "instruction=How does it sound?", "--set", "lang=en"]
    assert run("csv", tmp_path / "t.tsv", tmp_path / "out", *options) == 0
    (row,) = manifest(tmp_path / "out")
    assert row == {
        "id": "a",
        "audio": str(tmp_path / "a.wav"),
        "choices": ["sad", "glad"],
        "duration": 0.2,
        "language": "de",
        "answer": "sad",
        "task": "er",
        "instruction": "How does it sound?",
        "lang": "en",
        "split": "train",
    }


def test_a_task_is_never_guessed_from_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("dog", "cat"):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "x.wav").write_bytes(audio_bytes(0.1, kind="WAV"))
    assert run("audiofolder", tmp_path / "in", tmp_path / "out") == 2
    assert "task is missing; set it with --set task=asr or another task" in capsys.readouterr().err
    assert run("audiofolder", tmp_path / "in", tmp_path / "out", "--set", "task=aqa", "--set", "instruction=?") == 0
    assert {(r["original_id"], r["answer"]) for r in manifest(tmp_path / "out")} == {("dog/x", "dog"), ("cat/x", "cat")}


def test_ids_become_safe_and_stay_different(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.1, kind="WAV"))
    ids = ["a.b", "a/b", "a b", "same", "same", "x" * 200, "größe", "-", "ok_1"]
    rows = [{"id": i, "audio": "a.wav", "text": "t"} for i in ids]
    assert run("nemo", lines(tmp_path / "m.json", rows), tmp_path / "out") == 0
    found = manifest(tmp_path / "out")
    assert [r.get("original_id", r["id"]) for r in found] == ids
    assert len({r["id"] for r in found}) == len(ids)
    assert len(read_manifest(tmp_path / "out" / "manifest.jsonl")) == len(ids)
    assert found[-1] == {**found[-1], "id": "ok_1"} and "original_id" not in found[-1]


def test_odd_rows_are_skipped_with_a_reason(tmp_path: Path) -> None:
    clip = audio_bytes(0.5, kind="WAV")
    (tmp_path / "a.wav").write_bytes(clip)
    (tmp_path / "half.wav").write_bytes(clip[: len(clip) // 2])
    (tmp_path / "text.wav").write_text("no audio")
    rows = [
        ({"audio": "a.wav", "text": "fine"}, None),
        ({"audio": "missing.wav", "text": "t"}, "no_file"),
        ({"audio": "half.wav", "text": "t"}, "broken"),
        ({"audio": "text.wav", "text": "t"}, "broken"),
        ({"audio": "a.wav", "text": " "}, "empty_answer"),
        ({"audio": "a.wav"}, "empty_answer"),
        ({"audio": "a.wav", "text": "t", "offset": 0.4, "duration": 0.5}, "broken"),
        ({"audio": "a.wav", "text": "t", "offset": "x"}, "wrong_type"),
        ({"audio": "a.wav", "text": "t", "offset": 0.3, "end": 0.2}, "empty"),
        ({"audio": "a.wav", "text": "t", "channel": 1}, "wrong_type"),
        ({"audio": ["a.wav", 3], "text": "t"}, "wrong_type"),
        ({"audio": "https://x.org/a.wav", "text": "t"}, "url"),
        ({"audio": "a.wav", "text": "t", "_skipme": True}, "skipme"),
        ({"text": "t"}, "no_audio"),
        ({"audio": "a.wav", "text": "t", "task": "dance", "instruction": "q"}, "unknown_task"),
        ({"audio": "a.wav", "text": ["t"]}, "wrong_type"),
    ]
    source = lines(tmp_path / "m.json", [fields for fields, _ in rows])
    source.write_text(source.read_text() + "{\n[1]\n", encoding="utf-8")
    expected = [(f"m.json:{i}", reason) for i, (_, reason) in enumerate(rows, 1) if reason]
    expected += [(f"m.json:{len(rows) + i}", "wrong_type") for i in (1, 2)]
    assert run("nemo", source, tmp_path / "out") == 1
    assert skipped(tmp_path / "out") == expected
    assert len(manifest(tmp_path / "out")) == 1
    assert run("nemo", source, tmp_path / "again", "--max-skipped-fraction", "0.97") == 0


def test_conversations_keep_their_turns_and_the_places_of_clips(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.1, kind="WAV"))
    user, said = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    tagged, unlearned = {"role": "user", "content": "<audio>Q"}, {**said, "loss": False}
    inside = {"role": "user", "content": "a <audio> b"}
    system = {"role": "system", "content": "S"}
    pair = ("Q", "A")
    rows: list[tuple[dict[str, Any], Any]] = [
        ({"messages": [tagged, said], "audios": "a.wav"}, pair),
        ({"instruction": "Q", "input": "", "output": "A", "audio": "a.wav"}, pair),
        ({"query": "Q<audio>", "response": "A", "audios": ["a.wav"]}, [{**user, "content": "Q<audio>"}, said]),
        ({"messages": [user, unlearned, user, said], "audios": ["a.wav"]}, [tagged, unlearned, user, said]),
        ({"messages": [system, user, said, inside, said], "audio": "a.wav"}, [system, user, said, inside, said]),
        ({"query": "Q", "response": "A", "history": [["Q", "A"]], "audios": "a.wav"}, [tagged, said, user, said]),
        ({"messages": [tagged, said], "audios": []}, "wrong_type"),
        ({"messages": [tagged, said], "audios": ["a.wav", "a.wav"]}, "wrong_type"),
        ({"messages": [user, {"role": "assistant", "content": None}], "audio": "a.wav"}, "bad_messages"),
        ({"messages": [{"role": "tool", "content": "x"}, said], "audio": "a.wav"}, "bad_messages"),
        ({"messages": [user, user, said], "audio": "a.wav"}, "bad_messages"),
        ({"messages": [user, {**said, "content": "<audio>"}], "audio": "a.wav"}, "bad_messages"),
        ({"messages": "x"}, "wrong_type"),
        ({}, "wrong_type"),
    ]
    source = lines(tmp_path / "m.jsonl", [fields for fields, _ in rows])
    assert run("swift", source, tmp_path / "out", "--set", "task=sqa", "--set", "instruction=none") == 1
    assert skipped(tmp_path / "out") == [(f"m.jsonl:{i}", r) for i, (_, r) in enumerate(rows, 1) if isinstance(r, str)]
    found = [r.get("messages") or (r["instruction"], r["answer"]) for r in manifest(tmp_path / "out")]
    assert found == [wanted for _, wanted in rows if not isinstance(wanted, str)]
    for row in read_manifest(tmp_path / "out" / "manifest.jsonl"):
        assert row.error is None and len(row.audio) == 1
        check_metadata(row.metadata, 1)
    shards = ["--shards", "--set", "task=sqa"]
    assert run("swift", source, tmp_path / "shards", *shards) == 1
    assert ShardSet(LocalStore(tmp_path / "shards")).index.num_samples == len(found)


def test_ambiguous_tars_are_refused(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in (
            "a.wav",
            "a.wav",
            "a.txt",
            "b.flac",
            "b.wav",
            "b.txt",
            "c.1.wav",
            "c.1.txt",
            "d.wav",
            "d.pkl",
            "d.txt",
        ):
            data = b"word" if name.endswith("txt") else b"" if name.endswith("pkl") else audio_bytes(0.1, kind="WAV")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert run("webdataset", tmp_path / "t.tar", tmp_path / "out") == 1
    assert skipped(tmp_path / "out") == [(f"t.tar/{k}", "ambiguous") for k in "abc"]
    assert [r["id"] for r in manifest(tmp_path / "out")] == ["d"]


def test_parts_of_lhotse_that_would_need_it_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.5, kind="WAV", channels=2))
    made = tmp_path / "made"

    def cut(recording: dict[str, Any], **fields: Any) -> dict[str, Any]:
        whole = {
            "sources": [{"type": "file", "channels": [0, 1], "source": "a.wav"}],
            "duration": 0.5,
            "channel_ids": [0, 1],
        }
        text = [{"id": "s", "start": 0.0, "duration": 0.5, "text": "t"}]
        base = {"id": "c", "start": 0.0, "duration": 0.5, "channel": 1, "supervisions": text, "type": "MonoCut"}
        return {**base, **fields, "recording": {**whole, **recording}}

    rows = [
        (cut({}), None),
        (cut({"sources": [{"type": "command", "channels": [1], "source": f"touch {made}"}]}), "pipe"),
        (cut({"sources": [{"type": "url", "channels": [1], "source": "https://x.org/a.wav"}]}), "url"),
        (cut({"sources": [{"type": "shar", "channels": [1], "source": ""}]}), "unsupported"),
        (cut({"transforms": [{"name": "Speed", "kwargs": {"factor": 1.1}}]}), "unsupported"),
        (cut({}, type="MixedCut"), "unsupported"),
        (cut({}, channel=7), "wrong_type"),
        (cut({}, duration="x"), "wrong_type"),
        (cut({}, supervisions=3), "wrong_type"),
        ({"id": "c", "type": "MonoCut", "start": 0, "duration": 1}, "no_audio"),
    ]
    assert run("lhotse", lines(tmp_path / "cuts.jsonl", [fields for fields, _ in rows]), tmp_path / "out") == 1
    assert skipped(tmp_path / "out") == [(f"cuts.jsonl:{i}", r) for i, (_, r) in enumerate(rows, 1) if r]
    assert not made.exists()
    (row,) = manifest(tmp_path / "out")
    import soundfile

    stereo = soundfile.read(tmp_path / "a.wav", dtype="int16")[0]
    assert np.array_equal(soundfile.read(tmp_path / "out" / row["audio"], dtype="int16")[0], stereo[:, 1])


def test_shar_refuses_audio_of_another_cut(tmp_path: Path) -> None:
    import gzip

    source = SOURCES["shar"](tmp_path / "in")
    path = source / "cuts.000000.jsonl.gz"
    cuts = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join([cuts[0], cuts[2], cuts[1]])))
    assert run("shar", source, tmp_path / "out") == 1
    assert [r["id"] for r in manifest(tmp_path / "out")] == ["a1"]
    assert [reason for _, reason in skipped(tmp_path / "out")] == ["no_audio", "no_audio"]


@pytest.mark.parametrize("num_bytes", [1, 7, 1 << 20])
def test_gigaspeech_is_read_in_blocks(num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.importers.formats.corpora._BLOCK_BYTES", num_bytes)
    (tmp_path / "a.wav").write_bytes(audio_bytes(2.0, kind="WAV"))
    texts = ["A <COMMA> B <QUESTIONMARK>", "<SIL>", "ÜBER 東京 <PERIOD>"]
    segments = [
        {"sid": f"s{i}", "begin_time": 0.5 * i, "end_time": 0.5 * i + 0.5, "text_tn": t} for i, t in enumerate(texts)
    ]
    audio = [{"path": "a.wav", "segments": segments[:2]}, {"path": "a.wav", "segments": segments[2:]}, {"segments": 1}]
    content = json.dumps({"version": "1", "audios": audio, "x": [1]}, indent=1, ensure_ascii=False)
    (tmp_path / "g.json").write_text(content, encoding="utf-8")
    assert run("gigaspeech", tmp_path / "g.json", tmp_path / "out") == 1
    assert [r["answer"] for r in manifest(tmp_path / "out")] == ["A, B?", "ÜBER 東京."]
    assert skipped(tmp_path / "out") == [("g.json[0] s1", "no_speech"), ("g.json[2]", "wrong_type")]
    (tmp_path / "half.json").write_text(content[:-40], encoding="utf-8")
    assert run("gigaspeech", tmp_path / "half.json", tmp_path / "half") == 2


def test_one_sound_serves_every_tag_of_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.5, kind="WAV"))
    ask = {"from": "human", "value": "<sound> or <speech>\nWhat?"}
    cut = {"from": "User", "type": "audio", "value": "a.wav", "offset": 0.1, "duration": 0.2}
    rows = [
        {
            "id": "one",
            "sound": "a.wav",
            "conversations": [{**ask, "value": "<sound>\nWhat?"}, {"from": "gpt", "value": "A"}],
        },
        {"id": "part", "conversations": [cut, {"from": "Assistant", "type": "text", "value": "A"}]},
    ]
    assert run("nemo-chat", lines(tmp_path / "m.jsonl", rows), tmp_path / "out", "--set", "task=sqa") == 0
    found = manifest(tmp_path / "out")
    assert [r["instruction"] for r in found] == ["What?", ""]
    assert [r["duration"] for r in found] == [0.5, 0.2]


def test_wenet_tars_are_read_as_well(tmp_path: Path) -> None:
    source = SOURCES["webdataset"](tmp_path / "in")
    assert run("wenet", source, tmp_path / "out") == 0
    assert {r["answer"] for r in manifest(tmp_path / "out")} == {u.text for u in UTTERANCES}
