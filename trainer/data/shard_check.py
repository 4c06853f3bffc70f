"""Check shards against their index, and build an index for tars that other programs wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import xxhash

from model.errors import UserError
from trainer.data.decode import check_audio
from trainer.data.errors import SampleError, sample_errors
from trainer.data.metadata import check_metadata
from trainer.data.shard_writer import Groups, write_index, write_table
from trainer.data.shards import INDEX_NAME, Entry, RawSample, Shard, ShardSet, parse_sample
from trainer.data.tar_samples import TarSample, tar_samples
from trainer.storage.store import Store


@dataclass(frozen=True)
class SkippedSample:
    """A sample of a tar that is not in the index, with the reason."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}: {self.detail}"


def summary_of(skipped: Sequence[SkippedSample]) -> str:
    """Return one line with the number of skipped samples and the first one for each reason; empty if there are none."""
    by_reason: dict[str, list[SkippedSample]] = {}
    for sample in skipped:
        by_reason.setdefault(sample.reason, []).append(sample)
    return "; ".join(
        f"{len(found)} {reason} (first: {found[0].shard} {found[0].key}: {found[0].detail})"
        for reason, found in sorted(by_reason.items())
    )


def check_shard(shards: ShardSet, shard: int, on_sample: Callable[[RawSample], Any] = lambda sample: None) -> list[str]:
    """Read a whole shard and compare it with the index and its offset table.

    Args:
        shards: The shards.
        shard: The number of the shard.
        on_sample: A function that is called with each sample that matches the table and can be read.

    Returns:
        One line for each problem: a wrong size or SHA-256, an unusable table, or a sample that does not match its hash.

    Raises:
        UserError: If the shard is missing, or the store is unreachable or refuses the request.
    """
    info = shards.shards[shard]
    where = f"{shards.store.url}/{info.name}"
    data = memoryview(shards.store.get(info.name))
    problems = []
    if len(data) != info.num_bytes:
        problems.append(f"{where}: has {len(data)} bytes, but its index says {info.num_bytes}")
    elif hashlib.sha256(data).hexdigest() != info.sha256:
        problems.append(f"{where}: its SHA-256 differs from the index")
    try:
        table = shards.table(shard)
    except UserError as error:
        return [*problems, str(error)]
    for entry in table:
        start, end = entry.span
        if end > len(data) or xxhash.xxh3_64_hexdigest(data[start:end]) != entry.xxh3:
            problems.append(f"{where}: sample {entry.key} is truncated or altered")
            continue
        with suppress(SampleError):
            on_sample(parse_sample(entry, data[start:end], shards.index.defaults))
    return problems


def build_index(
    store: Store, defaults: Mapping[str, str], on_shard: Callable[[int], Any] = lambda num: None
) -> list[SkippedSample]:
    """Write offset tables and an index for existing tars, without changing the tars.

    Tars that several jobs wrote may contain several samples with the same key. All but the first of them get a number,
    as in `KEY~2`.

    Args:
        store: The store that contains `*.tar` files in WebDataset format. The members of each sample must be
            consecutive.
        defaults: The values of manifest fields that a sample's metadata may lack.
        on_shard: A function that is called with 1 after every shard.

    Returns:
        The samples that are not in the index, with their reasons.

    Raises:
        UserError: If the store already has an index, contains no tar or no usable sample, or has a tar that cannot be
            read.
    """
    names = store.list()
    if INDEX_NAME in names:
        raise UserError(f"{store.url}: has {INDEX_NAME} already; delete it to build a new index")
    tars = [name for name in names if name.endswith(".tar") and "/" not in name]
    if not tars:
        raise UserError(f"{store.url}: contains no *.tar; use the folder or prefix that contains the shards")
    shards: list[Shard] = []
    skipped: list[SkippedSample] = []
    keys: set[str] = set()
    for name in tars:
        data = memoryview(store.get(name))
        groups, entries = Groups(), []
        for sample in tar_samples(data, f"{store.url}/{name}"):
            key = _unique(sample.key, keys)
            try:
                with sample_errors(key):
                    entries.append(_entry(sample, key, data, defaults, groups))
            except SampleError as error:
                skipped.append(SkippedSample(name, key, error.reason, error.detail))
        shard = Shard(name, len(data), len(entries), hashlib.sha256(data).hexdigest(), groups.lines())
        write_table(store, shard, entries)
        shards.append(shard)
        on_shard(1)
    if not any(s.num_samples for s in shards):
        raise UserError(f"{store.url}: no sample can be used: {summary_of(skipped) or 'the tars are empty'}")
    write_index(store, shards, defaults)
    return skipped


def _entry(sample: TarSample, key: str, data: memoryview, defaults: Mapping[str, str], groups: Groups) -> Entry:
    """Check a sample, count it in `groups`, and return its entry for the offset table.

    Raises:
        SampleError: If the sample cannot be used.
    """
    if sample.problem is not None:
        raise sample.problem
    span = data[sample.members[0][1] : sample.members[-1][1] + sample.members[-1][2]]
    entry = Entry(key, "", "", "", 0.0, xxhash.xxh3_64_hexdigest(span), sample.members)
    raw = parse_sample(entry, span, defaults)
    check_metadata(raw.metadata, len(raw.clips))
    seconds = sum(check_audio(clip) for clip in raw.clips)
    return groups.entry(key, raw.metadata, seconds, entry.xxh3, entry.members)


def _unique(key: str, used: set[str]) -> str:
    """Return `key`, with a number appended if `used` contains it, and add the result to `used`."""
    found, number = key, 2
    while found in used:
        found, number = f"{key}~{number}", number + 1
    used.add(found)
    return found
