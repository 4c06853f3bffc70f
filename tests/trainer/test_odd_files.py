"""Tests of damaged files of a run, unusual names of metrics, and unusual environment variables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import UserError
from tests.trainer.data_corpus import audio_bytes, row, write_shards
from trainer.data.shards import ShardSet
from trainer.job.slurm import Allocation, _num_gpus
from trainer.run.launch import rendezvous
from trainer.storage.store import ChangedError, LocalStore
from trainer.telemetry.events import read_events
from trainer.telemetry.jsonl import StepLog, read_lines, read_metrics
from trainer.telemetry.trackers.mlflow import metric_name

RECORDS = [b'{"step": 1, "train/loss": 2.0}', b'{"step": 2, "note": "a\xe2\x80\xa8b"}', b'{"step": 3, "x": "nan"}']


def test_a_run_whose_metrics_were_damaged_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = [
        RECORDS[0],
        b"\xff\xfe",
        RECORDS[1],
        b'{"step": "2"}',
        b"[" * 100_000,
        RECORDS[2],
        b'{"step": 9}',
        b'{"st',
    ]
    path.write_bytes(b"\n".join(damaged))
    with pytest.raises(
        UserError, match=r"metrics.jsonl line 2: is not a JSON object with a step \(not UTF-8 at byte 0\)"
    ):
        list(read_lines(path))
    StepLog(path, resume_step=3).close()
    assert path.read_bytes() == b"\n".join(RECORDS) + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(damaged)
    assert "3 damaged lines are dropped (the first is line 2); " in caplog.text
    assert [record["step"] for _, record in read_lines(path)] == [1, 2, 3]


def test_metrics_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(RECORDS[0] + b"\n" + RECORDS[2] + b'\n{"step": 4, "train/loss": [1]}\n')
    with pytest.raises(UserError, match=r"line 3: train/loss = \[1\], but must be a number"):
        list(read_metrics(path))


def test_damaged_events_are_skipped(tmp_path: Path) -> None:
    good = {"time": 1.5, "event": "started", "attempt": 1, "host": "a\u2028b"}
    odd = [
        b"\xff",
        b"[" * 100_000,
        b'{"event": "x", "attempt": true, "time": 1}',
        b'{"event": "x", "attempt": 1, "time": 1e99}',
    ]
    (tmp_path / "events.jsonl").write_bytes(
        b"\n".join([*odd, json.dumps(good, ensure_ascii=False).encode(), b'{"event": "x"'])
    )
    assert read_events(tmp_path) == [good]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shards.json", ('"num_samples": 2', '"num_samples": "2"')),
        ("shards.json", ('"seconds": 0.2', '"seconds": -1')),
        ("shards.json", ('"language": "en"', '"language": ["en"]')),
        ("shards.json", ('"sha256": "', '"sha256": 7, "x": "')),
        ("shard-000000.idx.json", ('["flac", 512', '["flac", -512')),
        ("shard-000000.idx.json", ('["flac", 512', '["flac", 51200000')),
        ("shard-000000.idx.json", ('["flac", 512', '["flac", "512"')),
        ("shard-000000.idx.json", ('[["flac"', "[[7")),
        ("shard-000000.idx.json", ('["one", 0, 0.1', '["one", 0, "0.1"')),
        ("shard-000000.idx.json", ('["one", 0, 0.1', '["one", 5, 0.1')),
        ("shard-000000.idx.json", ('["one", 0, 0.1', "[null, 0, 0.1")),
    ],
)
def test_tables_with_other_types_are_refused(tmp_path: Path, name: str, change: tuple[str, str]) -> None:
    samples = [(row(key), [("flac", audio_bytes(0.1))]) for key in ("one", "two")]
    path = write_shards(tmp_path / "out", samples, per_shard=2) / name
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises((UserError, ChangedError), match="malformed"):
        ShardSet(LocalStore(tmp_path / "out")).table(0)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8, unique=True))
def test_mlflow_accepts_every_name_and_keeps_them_apart(subsets: list[str]) -> None:
    from mlflow.utils.validation import _validate_metric_name

    names = [f"eval/test/asr/{subset}/wer" for subset in subsets]
    found = [metric_name(name) for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        _validate_metric_name(name)
    assert metric_name("eval/test/asr/tel 8k/wer") == "eval/test/asr/tel 8k/wer"


@pytest.mark.parametrize(
    ("asked", "num"),
    [("h100", 1), ("h100:4", 4), ("4", 4), ("gpu:a100:2", 2), ("a100:2,h100:3", 5), ("2(S:0-1)", 2), ("0", 0)],
)
def test_gpus_of_slurm_are_counted(asked: str, num: int) -> None:
    assert _num_gpus(asked) == num


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "SLURM_JOB_ID = ''"),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID = 'x': must be a whole number"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID = ''"),
    ],
)
def test_a_job_without_slurms_variables_is_a_one_line_error(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Allocation.read(environ)
    assert message in str(caught.value)


def test_empty_variables_count_as_missing_ones() -> None:
    slurm = {"MASTER_ADDR": "", "MASTER_PORT": "", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert rendezvous(slurm) == ("n1", 20_007)
    assert rendezvous({"MASTER_ADDR": "x", "MASTER_PORT": "", "SLURM_JOB_ID": ""}) == ("x", 20_000)
    for port in ("x", "-1", "70000", "1.5"):
        with pytest.raises(UserError, match="MASTER_PORT = "):
            rendezvous({"MASTER_ADDR": "x", "MASTER_PORT": port})
