"""Check this node before ranks are started on it. This module does not need torch.

    python -m trainer.job.node_check JSON

`JSON` is a JSON object with the fields of `Wanted`. The command prints a `Report` as one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from model.errors import UserError
from trainer.job.gpu_check import Report, check_gpus
from trainer.parallel.environment import low_limit, raise_descriptor_limit

GIB = 2**30


@dataclass(frozen=True)
class Wanted:
    """The requirements of a run on each node."""

    num_gpus: int
    run_dir: str
    """The run's folder, which must be writable."""
    stores: tuple[str, ...]
    """URLs of buckets that must be reachable."""
    trackers: tuple[str, ...]
    """URLs of the servers to which trackers send metrics."""
    min_memory_gib: float
    """The host memory that must be available."""
    min_disk_gib: float
    """The disk space that must be free in the run's folder and in the folder for temporary files."""
    num_ranks: int = 1
    """The number of ranks of the run, which determines how many files a process opens."""
    checkpoints: str = ""
    """The folder of the run's checkpoints; empty if they are not written to a disk."""
    checkpoints_gib: float = 0.0
    """The disk space that the run's checkpoints need in addition to `min_disk_gib`. Existing checkpoints are
    included."""


def look(wanted: Wanted) -> Report:
    """Check this node and return the report."""
    report = Report(socket.gethostname().partition(".")[0])
    check_gpus(wanted.num_gpus, report)
    _memory(wanted.min_memory_gib, report)
    _descriptors(wanted, raise_descriptor_limit(), report)
    for path in dict.fromkeys([wanted.run_dir, tempfile.gettempdir()]):
        _disk(Path(path), wanted.min_disk_gib, report)
    if wanted.checkpoints:
        _checkpoint_space(wanted, report)
    for url in wanted.stores:
        _try(report, f"store {url}", lambda url=url: _reach_store(url))  # type: ignore[misc]
    for url in wanted.trackers:
        address = urlsplit(url)
        host, port = address.hostname or "", address.port or 443
        fault = _try(report, f"tracker {host}:{port}", lambda host=host, port=port: _connect(host, port))  # type: ignore[misc]
        if fault:  # Training continues without the server.
            report.faults.remove(fault)
            report.warnings.append(f"{fault}; metrics go to metrics.jsonl only")
    return report


def _memory(min_gib: float, report: Report) -> None:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    gib = next(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("MemAvailable:"))
    report.facts.append(f"{gib:.0f} GiB memory")
    if gib < min_gib:
        report.faults.append(f"{gib:.1f} GiB of memory available, {min_gib:g} needed (PREFLIGHT_MIN_MEMORY_GIB)")


def _descriptors(wanted: Wanted, limit: int, report: Report) -> None:
    fault = low_limit(limit, wanted.num_ranks, wanted.num_gpus > 0)
    if fault is not None:
        report.faults.append(fault)


def _disk(folder: Path, min_gib: float, report: Report) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        gib = shutil.disk_usage(folder).free / GIB
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        report.faults.append(f"{folder} cannot be written: {error.strerror}")
        return
    report.facts.append(f"{gib:.0f} GiB free in {folder}")
    if gib < min_gib:
        report.faults.append(f"{gib:.2f} GiB free in {folder}, {min_gib:g} needed (PREFLIGHT_MIN_DISK_GIB)")


def _checkpoint_space(wanted: Wanted, report: Report) -> None:
    """Check that the disk has space for the run's checkpoints in addition to `min_disk_gib`."""
    folder = Path(wanted.checkpoints)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(folder).free / GIB, wanted.checkpoints_gib
        # This job replaces existing checkpoints of the run. Their sizes are read only if they matter, because all nodes
        # would query the file system at the same time.
        if needed and free < needed + wanted.min_disk_gib:
            used = sum(path.stat().st_size for path in folder.glob("checkpoints/**/*") if path.is_file()) / GIB
            needed = max(0.0, needed - used)
    except OSError as error:
        report.faults.append(f"{folder} cannot be written: {error.strerror}")
        return
    if free < needed + wanted.min_disk_gib:
        report.faults.append(
            f"{free:.2f} GiB free in {folder}, but checkpoints need {needed:.2f} (checkpoint.keep_last), and "
            f"{wanted.min_disk_gib:g} must remain (PREFLIGHT_MIN_DISK_GIB)"
        )


def _reach_store(url: str) -> None:
    from trainer.data.shards import INDEX_NAME
    from trainer.storage.open import open_store

    open_store(url, retry_sec=30.0).size_bytes(INDEX_NAME)


def _connect(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=10).close()


def _try(report: Report, what: str, work: Callable[[], None]) -> str | None:
    start = time.perf_counter()
    try:
        work()
    except (UserError, OSError) as error:
        fault = f"{what}: {error}"
        report.faults.append(fault)
        return fault
    report.facts.append(f"{what} in {1000 * (time.perf_counter() - start):.0f} ms")
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `python -m trainer.job.node_check`, which checks this node and prints the report.

    Args:
        arguments: The command line's arguments; None uses those of the process.

    Returns:
        The exit code 0, since faults are in the report.
    """
    (text,) = sys.argv[1:] if arguments is None else arguments
    print(json.dumps(asdict(look(Wanted(**json.loads(text))))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
