"""Checking of shards against their index, and building of an index for tars that other programs wrote."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from typing import Any

import xxhash

from model.errors import UserError
from trainer.data.decode import AUDIO_TYPES, SampleError, check_audio
from trainer.data.shard_writer import Groups, write_index, write_table
from trainer.data.shards import INDEX_NAME, Entry, Shard, ShardSet
from trainer.storage.store import Store

Member = tuple[str, int, int]
"""(extension, first byte, number of bytes) of a file in a tar."""


def check_shard(shards: ShardSet, shard: int) -> list[str]:
    """Read a whole shard and compare it with the index and its offset table.

    Returns:
        One line for each problem: a wrong size or SHA-256, an unusable table, or a sample that differs from its hash.

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
    return problems


def build_index(
    store: Store, defaults: Mapping[str, str], on_shard: Callable[[int], Any] = lambda num: None
) -> list[str]:
    """Write offset tables and an index for existing tars, which are not changed.

    Args:
        store: store that contains `*.tar` files in WebDataset format. The members of each sample must be consecutive.
        defaults: values of manifest fields that a sample's metadata may lack.
        on_shard: called with 1 after every shard.

    Returns:
        One line for each skipped sample, with the reason.

    Raises:
        UserError: If there is an index already, there is no tar, a tar cannot be read, or no sample can be used.
    """
    names = store.list()
    if INDEX_NAME in names:
        raise UserError(f"{store.url}: has {INDEX_NAME} already; delete it to build a new index")
    tars = [name for name in names if name.endswith(".tar") and "/" not in name]
    if not tars:
        raise UserError(f"{store.url}: contains no *.tar; give the folder or prefix that contains the shards")
    shards: list[Shard] = []
    skipped_samples: list[str] = []
    for name in tars:
        data = memoryview(store.get(name))
        groups, entries = Groups(), []
        for key, members in _samples(data, f"{store.url}/{name}"):
            try:
                entries.append(_entry(key, members, data, defaults, groups))
            except SampleError as error:
                skipped_samples.append(f"{name}: {key}: {error}")
        shard = Shard(name, len(data), len(entries), hashlib.sha256(data).hexdigest(), groups.lines())
        write_table(store, shard, entries)
        shards.append(shard)
        on_shard(1)
    if not any(s.num_samples for s in shards):
        raise UserError(
            f"{store.url}: no sample can be used; first problem: {(skipped_samples or ['the tars are empty'])[0]}"
        )
    write_index(store, shards, defaults)
    return skipped_samples


def _samples(data: memoryview, where: str) -> list[tuple[str, list[Member]]]:
    """Return the key and members of every sample, in the order of the tar."""
    samples: list[tuple[str, list[Member]]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, slash, file = info.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = folder + slash + stem
                if not samples or samples[-1][0] != key:
                    samples.append((key, []))
                samples[-1][1].append((extension.lower(), info.offset_data, info.size))
    except tarfile.TarError as error:
        raise UserError(f"{where}: cannot be read as a tar ({error}); copy or make it again") from None
    return samples


def _entry(key: str, members: list[Member], data: memoryview, defaults: Mapping[str, str], groups: Groups) -> Entry:
    """Check a sample, count it in `groups`, and return its entry for the offset table.

    Raises:
        SampleError: If the sample cannot be used.
    """
    metadata: dict[str, Any] = dict(defaults)
    seconds = 0.0
    for extension, offset, size in members:
        kind, part = extension.split(".")[-1], data[offset : offset + size]
        if kind in AUDIO_TYPES:
            seconds += check_audio(part)
        elif kind == "json":
            try:
                metadata |= json.loads(bytes(part))
            except (ValueError, TypeError) as error:
                raise SampleError("wrong_type", f"metadata is not a JSON object ({error})") from None
    if not any(extension.split(".")[-1] in (*AUDIO_TYPES, "json", "txt") for extension, _, _ in members):
        raise SampleError("wrong_type", f"no audio, .json or .txt among its files {[m[0] for m in members]}")
    span = data[members[0][1] : members[-1][1] + members[-1][2]]
    return groups.entry(key, metadata, seconds, xxhash.xxh3_64_hexdigest(span), tuple(members))
