"""Verification of a checkpoint by all ranks, each of which reads a part of the files."""

from __future__ import annotations

from collections.abc import Callable

from trainer.checkpoint.folder import Folder
from trainer.checkpoint.layout import rank_of
from trainer.checkpoint.reader import DamagedError, check_files, manifest_text, parse_manifest
from trainer.checkpoint.together import from_rank0, gather, together
from trainer.parallel.groups import Groups


def find_damage(groups: Groups, folder: Folder, heartbeat: Callable[[str], None]) -> str | None:
    """Return a description of the damage to a checkpoint, or None if the checkpoint is undamaged.

    Collective: every rank of the world must call it. Rank 0 reads the manifest for all ranks.

    Args:
        groups: This rank's process groups.
        folder: The checkpoint.
        heartbeat: A function that is called with a description of every file before it is verified.
    """

    def read() -> tuple[str, str | None]:
        try:
            return manifest_text(folder), None
        except DamagedError as error:
            return "", str(error)

    text, unreadable = from_rank0(groups, folder.url, read)
    if unreadable is not None:
        return unreadable

    def check() -> str | None:
        try:
            manifest = parse_manifest(folder, text)
            mine = [n for n in manifest.files if rank_of(n) % groups.topology.world == groups.rank]
            check_files(folder, manifest, mine, heartbeat)
        except DamagedError as error:
            return str(error)
        return None

    own = together(groups, folder.url, check)
    return next((damage for damage in gather(groups, own) if damage is not None), None)
