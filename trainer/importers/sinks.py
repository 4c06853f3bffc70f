"""The outputs of an import: a manifest with a folder of audio, shards, or nothing.

Each output keeps a journal, so that an import that was killed can resume after the last rows that were written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.data.shard_build import SKIPPED_NAME, ShardLimits
from trainer.data.shard_writer import ShardWriter, write_index, write_json
from trainer.data.shards import INDEX_NAME, Shard, read_shard
from trainer.files import locked, sweep_leftovers, write_whole
from trainer.importers.work import Outcome, Target
from trainer.storage.store import Store

MANIFEST_NAME = "manifest.jsonl"
_JOURNAL_NAME = "importing.jsonl"
_CLAIM_NAME = "importing.json"
_LOCK_NAME = ".importing.lock"


@dataclass
class Totals:
    """The counts of the rows that an import has handled."""

    num_rows: int = 0
    num_samples: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    """The number of skipped rows by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row that was skipped for each reason."""
    digest: str = ""
    """A hash of all rows that were counted."""
    splits: dict[str, int] = field(default_factory=dict)
    """The number of samples by split."""

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.num_rows += 1
        self.digest = outcome.item.digest
        if outcome.error is None:
            self.num_samples += 1
            self.seconds += outcome.seconds
            assert outcome.item.sample is not None
            split = str(outcome.item.sample.fields["split"])
            self.splits[split] = self.splits.get(split, 0) + 1
            return
        reason = outcome.error.reason
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, _escaped(f"{outcome.item.where}: {outcome.error.detail}"))

    def reasons(self) -> str:
        """Return, as text, the number of skipped rows by reason, with the first row for each reason."""
        return "; ".join(f"{n} {reason} (first: {self.examples[reason]})" for reason, n in sorted(self.skipped.items()))


class Sink:
    """An output that only counts the samples. Subclasses also write them."""

    def __init__(self, target: Target = Target()) -> None:  # noqa: B008 (frozen)
        self.target = target
        self.totals = Totals()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Open the output. If it contains an unfinished import of the same rows, set `totals` to its counts.

        Raises:
            UserError: If the output contains anything else.
        """

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count and write the outcomes of the next rows."""
        for outcome in outcomes:
            self.totals.add(outcome)

    def finish(self) -> None:
        """Complete the output."""

    def discard(self) -> None:
        """Delete what `begin` wrote, if no sample has been added."""


class ManifestSink(Sink):
    """An output with `manifest.jsonl`, `skipped.jsonl`, and a folder of audio that had to be cut or converted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        super().__init__(Target(folder=self.folder))
        self._journal: IO[bytes] | None = None

    def begin(self, identity: Mapping[str, Any]) -> None:
        path = self.folder / _JOURNAL_NAME
        head = json.dumps(identity, sort_keys=True).encode() + b"\n"
        if (self.folder / MANIFEST_NAME).exists() and not path.exists():
            raise UserError(f"{self.folder}: contains {MANIFEST_NAME}; delete it or choose another path")
        others = [p.name for p in self.folder.iterdir() if p.name != _LOCK_NAME]
        if others and not path.exists():
            raise UserError(f"{self.folder}: is neither empty nor an unfinished import; choose another path")
        num_bytes = 0
        if path.exists():
            with open(path, "rb") as file:
                if (first := file.readline()) and first != head:
                    raise UserError(
                        f"{self.folder}: is an unfinished import of other data or with other options; delete it "
                        "or choose another path"
                    )
                num_bytes = len(first)
                for line in file:
                    if (totals := _read_totals(line)) is None:
                        break
                    num_bytes, self.totals = num_bytes + len(line), totals
        self._journal = open(path, "ab")  # noqa: SIM115 (until `finish`)
        self._journal.truncate(num_bytes)
        if not num_bytes:
            self._journal.write(head)
            self._journal.flush()

    def add(self, outcomes: Sequence[Outcome]) -> None:
        assert self._journal is not None
        super().add(outcomes)
        samples = [o.metadata for o in outcomes if o.error is None]
        line = {"totals": asdict(self.totals), "samples": samples, "skipped": _skipped(outcomes)}
        self._journal.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._journal.flush()

    def finish(self) -> None:
        assert self._journal is not None
        self._journal.close()
        write_whole(self.folder / SKIPPED_NAME, self._lines("skipped"))
        write_whole(self.folder / MANIFEST_NAME, self._lines("samples"))
        (self.folder / _JOURNAL_NAME).unlink()

    def discard(self) -> None:
        assert self._journal is not None
        self._journal.close()
        (self.folder / _JOURNAL_NAME).unlink()

    def _lines(self, name: str) -> Iterator[bytes]:
        with open(self.folder / _JOURNAL_NAME, "rb") as file:
            next(file)
            for line in file:
                for value in json.loads(line)[name]:
                    yield json.dumps(value, ensure_ascii=False).encode() + b"\n"


class ShardSink(Sink):
    """An output that consists of shards in a folder or a bucket, in the order of the rows."""

    def __init__(self, store: Store, limits: ShardLimits) -> None:
        super().__init__(Target(with_data=True))
        self.store, self.limits = store, limits
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None
        self._skipped: list[dict[str, str]] = []
        """The rows that were skipped since the last finished shard."""

    def begin(self, identity: Mapping[str, Any]) -> None:
        names = {name for name in self.store.list() if name != _LOCK_NAME}
        if INDEX_NAME in names and _CLAIM_NAME not in names:
            raise UserError(f"{self.store.url}: contains finished shards; delete them or choose another path")
        if names and _CLAIM_NAME not in names:
            raise UserError(f"{self.store.url}: is neither empty nor an unfinished import; choose another path")
        if not self.store.put_if_absent(_CLAIM_NAME, json.dumps(dict(identity), sort_keys=True).encode()):
            raise UserError(
                f"{self.store.url}: is an unfinished import of other data or with other options; delete it "
                "or choose another path"
            )
        while (name := _part_name(len(self._shards))) in names:
            try:
                part = parse_json(self.store.get(name))
                shard, totals = read_shard(part["shard"]), Totals(**part["totals"])
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            self._shards.append(shard)
            self.totals = totals

    def add(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.totals.add(outcome)
            if outcome.error is not None:
                self._skipped += _skipped([outcome])
                continue
            if self._writer is None:
                self._writer = ShardWriter(self.store, len(self._shards))
            metadata = outcome.metadata
            self._writer.add(metadata["id"], outcome.clips, metadata, outcome.seconds)
            full = self._writer.num_bytes >= self.limits.max_bytes
            if full or len(self._writer.entries) >= self.limits.max_samples:
                self._finish_shard()

    def finish(self) -> None:
        if self._writer is not None:
            self._finish_shard()
        parts = [parse_json(self.store.get(_part_name(n))) for n in range(len(self._shards))]
        skipped = [line for part in parts for line in part["skipped"]] + self._skipped
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
        self.store.put(SKIPPED_NAME, [lines.encode()])
        write_index(self.store, self._shards)
        for number in range(len(self._shards)):
            self.store.delete(_part_name(number))
        self.store.delete(_CLAIM_NAME)

    def discard(self) -> None:
        self.store.delete(_CLAIM_NAME)

    def _finish_shard(self) -> None:
        assert self._writer is not None
        shard = self._writer.finish()
        part = {"shard": asdict(shard), "totals": asdict(self.totals), "skipped": self._skipped}
        write_json(self.store, _part_name(len(self._shards)), part)
        self._shards.append(shard)
        self._writer, self._skipped = None, []


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Create the folder of an import, and lock it against other imports. A new folder that stays empty is deleted.

    Raises:
        UserError: If the folder cannot be written, or another import has locked it.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _LOCK_NAME, wait=False) as held:
            if held:
                sweep_leftovers(folder, older_sec=0)
            yield
    except BlockingIOError:
        raise UserError(f"{folder}: another import is writing there; wait for it or choose another path") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; check the path and its permissions") from None
    finally:
        if is_new:
            with suppress(OSError):  # A folder that is not empty is kept.
                folder.rmdir()


def _read_totals(line: bytes) -> Totals | None:
    """Return the counts of a line of the journal, or None if it was not written completely."""
    try:
        return Totals(**parse_json(line)["totals"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def _skipped(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    return [
        {"where": _escaped(o.item.where), "reason": o.error.reason, "detail": _escaped(o.error.detail)}
        for o in outcomes
        if o.error is not None
    ]


def _escaped(text: str) -> str:
    """Return `text`, which may be a file name in another encoding, as text that can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _part_name(number: int) -> str:
    return f"import-{number:06d}.part.json"
