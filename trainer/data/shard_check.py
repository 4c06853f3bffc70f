"""Shards compared with their index, byte by byte; and an index made for shards of others."""

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
"""Extension, first byte, bytes."""


def check_shard(shards: ShardSet, shard: int) -> list[str]:
    """What is wrong with one shard, one line each: size, SHA-256, table, or the samples that are not as indexed.

    Reads the whole shard. Raises UserError if the store is away or refuses.
    """
    info = shards.shards[shard]
    where = f"{shards.store.url}/{info.name}"
    data = memoryview(shards.store.get(info.name))
    wrong = []
    if len(data) != info.num_bytes:
        wrong.append(f"{where}: {len(data)} bytes, its index says {info.num_bytes}")
    elif hashlib.sha256(data).hexdigest() != info.sha256:
        wrong.append(f"{where}: its SHA-256 is not the index's")
    try:
        table = shards.table(shard)
    except UserError as error:
        return [*wrong, str(error)]
    for entry in table:
        start, end = entry.span
        if end > len(data) or xxhash.xxh3_64_hexdigest(data[start:end]) != entry.xxh3:
            wrong.append(f"{where}: sample {entry.key} is cut or altered")
    return wrong


def build_index(
    store: Store, defaults: Mapping[str, str], on_shard: Callable[[int], Any] = lambda num: None
) -> list[str]:
    """Write tables and index for the tars in `store`; the tars stay as they are.

    Args:
        store: holds `*.tar` as webdataset writes them: the members of a sample follow each other.
        defaults: manifest fields of samples whose own metadata lack them.
        on_shard: called with 1 after every shard.

    Returns:
        Samples that are left out, and why, one line each.

    Raises:
        UserError: there is an index already, or no tar; a tar cannot be read; no sample can be used.
    """
    names = store.list()
    if INDEX_NAME in names:
        raise UserError(f"{store.url}: has {INDEX_NAME} already; delete it to index the shards anew")
    tars = [name for name in names if name.endswith(".tar") and "/" not in name]
    if not tars:
        raise UserError(f"{store.url}: no *.tar in it; give the folder or prefix that holds the shards")
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
            f"{store.url}: no sample can be used; the first: {(skipped_samples or ['the tars are empty'])[0]}"
        )
    write_index(store, shards, defaults)
    return skipped_samples


def _samples(data: memoryview, where: str) -> list[tuple[str, list[Member]]]:
    """Key and members of every sample, in the tar's order."""
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
        raise UserError(f"{where}: not a readable tar ({error}); make or copy it again") from None
    return samples


def _entry(key: str, members: list[Member], data: memoryview, defaults: Mapping[str, str], groups: Groups) -> Entry:
    """The table's line, with the sample counted in `groups`. Raises SampleError."""
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
        raise SampleError("wrong_type", f"no audio, .json or .txt among {[m[0] for m in members]}")
    span = data[members[0][1] : members[-1][1] + members[-1][2]]
    return groups.entry(key, metadata, seconds, xxhash.xxh3_64_hexdigest(span), tuple(members))
