"""Tests of the recordings that an import writes: parts, channels, and formats that libsndfile does not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data_corpus import audio_bytes
from tests.trainer.import_runs import av_bytes, manifest, run, skipped
from tests.trainer.import_sources import lines


def test_parts_and_channels_are_exact(tmp_path: Path) -> None:
    import soundfile

    stereo = np.random.default_rng(0).integers(-9000, 9000, (16_000, 2), dtype=np.int16)
    for kind in ("WAV", "FLAC", "AIFF", "AU", "W64"):
        soundfile.write(tmp_path / f"s.{kind.lower()}", stereo, 16_000, format=kind, subtype="PCM_16")
    names = ["s.wav", "s.flac", "s.aiff", "s.au", "s.w64"]
    rows = [{"audio": n, "start": 0.25, "end": 0.75, "channel": c, "text": "t"} for n in names for c in (0, 1)]
    assert run("nemo", lines(tmp_path / "m.json", rows), tmp_path / "out") == 0
    for row in manifest(tmp_path / "out"):
        values, rate = soundfile.read(tmp_path / "out" / row["audio"], dtype="int16")
        source = row.get("original_id", row["id"])
        assert rate == 16_000 and values.ndim == 1, source
        assert any(np.array_equal(values, stereo[4000:12000, c]) for c in (0, 1))
    assert len(manifest(tmp_path / "out")) == 10


@pytest.mark.parametrize("kind", ["MP3", "OGG", "OPUS"])
def test_parts_of_compressed_recordings_equal_those_of_the_decoded_whole(kind: str, tmp_path: Path) -> None:
    import soundfile

    (tmp_path / "a.x").write_bytes(audio_bytes(3.0, kind=kind))
    whole = soundfile.read(tmp_path / "a.x", dtype="float32")[0]
    rate = soundfile.info(tmp_path / "a.x").samplerate
    rows = [{"audio": "a.x", "offset": s, "duration": 0.5, "text": "t"} for s in (0.0, 1.25, 0.5, 2.4)]
    assert run("nemo", lines(tmp_path / "m.json", rows), tmp_path / "out") == 0
    for row, fields in zip(manifest(tmp_path / "out"), rows, strict=True):
        part = soundfile.read(tmp_path / "out" / row["audio"], dtype="float32")[0]
        first = round(fields["offset"] * rate)
        assert len(part) == round(0.5 * rate)
        assert np.abs(part - np.clip(whole, -1, 1)[first : first + len(part)]).max() <= 1.01 / 32768


@pytest.mark.parametrize(
    ("kind", "codec", "ending"),
    [("mp4", "aac", "m4a"), ("asf", "wmav2", "wma"), ("adts", "aac", "aac")],
)
def test_files_that_libsndfile_lacks_become_flac(kind: str, codec: str, ending: str, tmp_path: Path) -> None:
    import soundfile

    data = av_bytes(kind, codec)
    (tmp_path / f"a.{ending}").write_bytes(data)
    (tmp_path / f"half.{ending}").write_bytes(data[: len(data) // 2])
    rows = [{"id": k, "audio": f"{k}.{ending}", "text": "t"} for k in ("a", "half")]
    rows.append({"id": "part", "audio": f"a.{ending}", "text": "t", "start": 0.25, "end": 0.75})
    run("nemo", lines(tmp_path / "m.json", rows), tmp_path / "out")
    found = {r["id"]: r for r in manifest(tmp_path / "out")}
    values, rate = soundfile.read(tmp_path / "out" / found["a"]["audio"])
    assert rate == 48_000 and len(values) == pytest.approx(48_000, rel=0.1)
    spectrum = np.abs(np.fft.rfft(values[4000:44_000]))
    assert np.argmax(spectrum) == pytest.approx(440 * 40_000 / 48_000, abs=1)
    part = soundfile.read(tmp_path / "out" / found["part"]["audio"])[0]
    assert np.array_equal(part, values[12_000:36_000])
    if ending != "aac":  # an AAC stream declares no length
        assert skipped(tmp_path / "out") == [("m.json:2", "broken")]


def test_opus_in_webm_keeps_its_packets(tmp_path: Path) -> None:
    import io

    import soundfile

    av = pytest.importorskip("av")
    data = av_bytes("webm", "libopus")
    (tmp_path / "a.webm").write_bytes(data)
    (tmp_path / "half.webm").write_bytes(data[: len(data) // 2])
    rows = [{"audio": "a.webm", "text": "t"}, {"audio": "half.webm", "text": "t"}]
    rows += [{"audio": "a.webm", "text": "t", "start": 0.25, "end": 0.75}]
    assert run("nemo", lines(tmp_path / "m.json", rows), tmp_path / "out") == 1
    assert skipped(tmp_path / "out") == [("m.json:2", "broken")]
    whole, part = (tmp_path / "out" / r["audio"] for r in manifest(tmp_path / "out"))
    assert (whole.suffix, part.suffix) == (".opus", ".flac")

    def packets(content: bytes) -> list[bytes]:
        with av.open(io.BytesIO(content)) as container:
            return [bytes(p) for p in container.demux(audio=0) if p.size]

    assert packets(whole.read_bytes()) == packets(data)
    assert soundfile.info(whole).duration == pytest.approx(1.0, abs=0.03)
    assert len(soundfile.read(part)[0]) == 24_000


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    source = lines(tmp_path / "m.json", [{"audio": "a.m4a", "text": "t"}])
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("nemo", source, tmp_path / "out") == 2
    assert "a.m4a: needs the package av; pip install 'earshot[import]'" in capsys.readouterr().err
