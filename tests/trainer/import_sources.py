"""Functions that write a small corpus in the formats of other programs, according to the formats' documentation."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.trainer.data_corpus import audio_bytes
from trainer.data.decode import decode_audio


@dataclass(frozen=True)
class Utterance:
    key: str
    text: str
    data: bytes

    @property
    def name(self) -> str:
        return f"{self.key}.wav"


UTTERANCES = tuple(
    Utterance(key, text, audio_bytes(0.3 + 0.05 * i, seed=i, kind="WAV"))
    for i, (key, text) in enumerate([("a1", "one, two"), ("b-2", 'he said "three"'), ("c_3", "vier ünd fünf")])
)


def joined() -> tuple[bytes, list[tuple[float, float]]]:
    """Return the content of a WAV file with all utterances, and the start and end of each utterance in seconds."""
    import soundfile

    parts = [soundfile.read(io.BytesIO(u.data), dtype="int16")[0] for u in UTTERANCES]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate(parts), 16_000, format="WAV")
    ends = np.cumsum([len(p) for p in parts]) / 16_000
    return buffer.getvalue(), [(float(e - len(p) / 16_000), float(e)) for p, e in zip(parts, ends, strict=True)]


def clips(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for u in UTTERANCES:
        (folder / u.name).write_bytes(u.data)


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def _csv(folder: Path) -> Path:
    clips(folder)
    with open(folder / "set.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("audio", "text"), *((u.name, u.text) for u in UTTERANCES)])
    return folder / "set.csv"


def _audiofolder(folder: Path) -> Path:
    clips(folder / "train")
    lines(folder / "train" / "metadata.jsonl", [{"file_name": u.name, "transcription": u.text} for u in UTTERANCES])
    return folder


def _hf(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    audio = pa.array([{"bytes": u.data, "path": u.name} for u in UTTERANCES])
    columns = {
        "id": [u.key for u in UTTERANCES],
        "audio": audio,
        "sentence": [u.text for u in UTTERANCES],
        "who": [1, 0, 1],
    }
    features = {"who": {"names": ["f", "m"], "_type": "ClassLabel"}, "audio": {"_type": "Audio"}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=2)
    return folder


def _nemo(folder: Path) -> Path:
    folder.mkdir()
    data, times = joined()
    (folder / "all.wav").write_bytes(data)
    cuts = [
        {"audio_filepath": "all.wav", "offset": s, "duration": e - s, "text": u.text, "id": u.key}
        for u, (s, e) in zip(UTTERANCES, times, strict=True)
    ]
    return lines(folder / "train.json", cuts)


def _kaldi(folder: Path) -> Path:
    folder.mkdir()
    data, times = joined()
    (folder / "all.wav").write_bytes(data)
    (folder / "wav.scp").write_text("rec/1.0 all.wav\n")
    last = UTTERANCES[-1].key
    (folder / "segments").write_text(
        "".join(
            f"{u.key} rec/1.0 {s} {-1 if u.key == last else e}\n" for u, (s, e) in zip(UTTERANCES, times, strict=True)
        )
    )
    (folder / "text").write_text("".join(f"{u.key} {u.text}\n" for u in UTTERANCES), encoding="utf-8")
    (folder / "utt2spk").write_text("".join(f"{u.key}\tspk{u.key}\n" for u in UTTERANCES))
    return folder


def _openai(folder: Path) -> Path:
    folder.mkdir()
    records = []
    for u in UTTERANCES:
        audio = {"data": base64.b64encode(u.data).decode(), "format": "wav"}
        content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": "What is said?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": u.text}]
        records.append({"id": u.key, "task": "asr", "messages": turns})
    return lines(folder / "chat.jsonl", records)


def _swift(folder: Path) -> Path:
    clips(folder)
    records = []
    for u in UTTERANCES:
        turns = [{"role": "user", "content": "<audio>What is said?"}, {"role": "assistant", "content": u.text}]
        records.append({"id": u.key, "task": "asr", "messages": turns, "audios": [u.name]})
    return lines(folder / "swift.jsonl", records)


def _webdataset(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "000.tar", "w") as tar:
        for u in UTTERANCES:
            fields = json.dumps({"id": u.key, "language": "de"}).encode()
            for ending, data in (("wav", u.data), ("txt", u.text.encode()), ("json", fields)):
                info = tarfile.TarInfo(f"x/{u.key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def _gz(path: Path, records: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


def _cut(u: Utterance, start: float, seconds: float, recording: dict[str, Any]) -> dict[str, Any]:
    supervision = {
        "id": u.key,
        "recording_id": "r",
        "start": 0.0,
        "duration": seconds,
        "text": u.text,
        "language": "de",
    }
    cut = {"id": u.key, "start": start, "duration": seconds, "channel": 0, "type": "MonoCut"}
    return {**cut, "supervisions": [supervision], "recording": recording}


def _recording(kind: str, source: str, seconds: float) -> dict[str, Any]:
    sources = [{"type": kind, "channels": [0], "source": source}]
    return {"id": "r", "sources": sources, "sampling_rate": 16_000, "duration": seconds, "channel_ids": [0]}


def _lhotse(folder: Path) -> Path:
    folder.mkdir()
    data, times = joined()
    (folder / "all.wav").write_bytes(data)
    whole = _recording("file", "all.wav", times[-1][1])
    cuts = [_cut(u, s, e - s, whole) for u, (s, e) in zip(UTTERANCES[:1], times, strict=False)]
    # The last cut has two supervisions, whose starts count from the start of the cut.
    last = _cut(UTTERANCES[1], times[1][0], times[2][1] - times[1][0], whole)
    last["supervisions"] = [
        {"id": u.key, "start": s - times[1][0], "duration": e - s, "text": u.text}
        for u, (s, e) in zip(UTTERANCES[1:], times[1:], strict=True)
    ]
    _gz(folder / "my_cuts.jsonl.gz", [*cuts, last])
    return folder


def _shar(folder: Path) -> Path:
    folder.mkdir()
    seconds = [len(heard(u.data)) / 16_000 for u in UTTERANCES]
    placeholders = [_recording("shar", "", s) for s in seconds]
    cuts = [_cut(u, 7.5, s, r) for u, s, r in zip(UTTERANCES, seconds, placeholders, strict=True)]
    _gz(folder / "cuts.000000.jsonl.gz", cuts)
    with tarfile.open(folder / "recording.000000.tar", "w") as tar:
        for u, placeholder in zip(UTTERANCES, placeholders, strict=True):
            for ending, data in (("wav", u.data), ("json", json.dumps(placeholder).encode())):
                info = tarfile.TarInfo(f"{u.key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def _llamafactory(folder: Path) -> Path:
    clips(folder)
    records = []
    for u in UTTERANCES:
        turns = [{"from": "human", "value": "<audio>What is said?"}, {"from": "gpt", "value": u.text}]
        records.append({"id": u.key, "task": "asr", "conversations": turns, "audios": [u.name]})
    (folder / "data.json").write_text(json.dumps(records, indent=1))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def _commonvoice(folder: Path) -> Path:
    clips(folder / "de" / "clips")
    head = "client_id\tpath\tsentence\tup_votes\tgender\n"
    text = "".join(f"c{u.key}\t{u.name}\t{u.text}\t2\tmale\n" for u in UTTERANCES)
    (folder / "de" / "train.tsv").write_text(head + text, encoding="utf-8")
    (folder / "de" / "validated.tsv").write_text(head + text, encoding="utf-8")
    return folder / "de"


def _gigaspeech(folder: Path) -> Path:
    folder.mkdir()
    data, times = joined()
    (folder / "all.wav").write_bytes(data)
    pairs = zip(UTTERANCES, times, strict=True)
    segments = [
        {"sid": u.key, "begin_time": s, "end_time": e, "text_tn": u.text.replace(",", " <COMMA>"), "subsets": ["{XL}"]}
        for u, (s, e) in pairs
    ]
    audio = [
        {"title": "no [such] thing", "path": "all.wav", "aid": "A", "segments": segments[i : i + 1]} for i in range(3)
    ]
    (folder / "GigaSpeech.json").write_text(json.dumps({"dataset": "GigaSpeech", "audios": audio}, indent=2))
    return folder


def _fleurs(folder: Path) -> Path:
    clips(folder / "audio" / "train")
    rows = "".join(f"17\t{u.name}\tRAW\t{u.text}\tc | h\t9600\tMALE\n" for u in UTTERANCES)
    (folder / "train.tsv").write_text(rows, encoding="utf-8")
    return folder


def _wenet(folder: Path) -> Path:
    clips(folder)
    return lines(folder / "data.list", [{"key": u.key, "wav": u.name, "txt": u.text} for u in UTTERANCES])


def _nemo_chat(folder: Path) -> Path:
    clips(folder)
    records = []
    for u in UTTERANCES:
        question = {"from": "User", "type": "text", "value": "What is said?"}
        audio = {"from": "User", "type": "audio", "value": u.name, "duration": 1.0}
        answer = {"from": "Assistant", "type": "text", "value": u.text}
        records.append({"id": u.key, "task": "asr", "conversations": [question, audio, answer]})
    return lines(folder / "chat.jsonl", records)


def _slam(folder: Path) -> Path:
    clips(folder)
    lines(folder / "multiprompt.jsonl", [{"task": "ASR", "prompt": p} for p in ("Transcribe.", "Write it down.")])
    lines(folder / "data.jsonl", [{"key": u.key, "task": "ASR", "target": u.text, "path": u.name} for u in UTTERANCES])
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "csv": _csv,
    "audiofolder": _audiofolder,
    "hf": _hf,
    "nemo": _nemo,
    "kaldi": _kaldi,
    "openai": _openai,
    "swift": _swift,
    "webdataset": _webdataset,
    "lhotse": _lhotse,
    "shar": _shar,
    "llamafactory": _llamafactory,
    "commonvoice": _commonvoice,
    "gigaspeech": _gigaspeech,
    "fleurs": _fleurs,
    "wenet": _wenet,
    "nemo-chat": _nemo_chat,
    "slam": _slam,
}
"""The functions by format. Each one writes the corpus to a new folder, and returns the path that is imported."""


def heard(data: bytes) -> NDArray[np.float32]:
    return decode_audio(data)
