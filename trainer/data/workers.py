"""Decoding processes, and the shared memory through which they return arrays.

Each process runs a generator and sends the lists that the generator yields, in order. Arrays are passed through a ring
buffer in shared memory. All other values, including the offsets of the arrays, are passed through a pipe. The size of
the ring buffer and `num_ahead` limit how far a process works in advance.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from model.errors import UserError
from trainer.plugins import inherit_plugins
from trainer.scoring.declared import inherit_tasks

_ALIGN_BYTES = 64


class LostWorkerError(RuntimeError):
    """Raised when a decoding process has died.

    A retry may succeed, because the kernel may have killed the process to free memory.
    """


class Workers:
    """A group of decoding processes, one per element of `jobs`.

    Args:
        jobs: The arguments of `serve` for each process, as values that can be pickled.
        serve: A generator function that yields lists. It must be importable by name.
        num_ahead: The largest number of lists that a process may prepare in advance.
        buffer_bytes: The size of the shared memory per process. Lists whose arrays do not fit are passed through the
            pipe.
    """

    def __init__(
        self,
        jobs: Sequence[tuple[Any, ...]],
        *,
        serve: Callable[..., Iterator[list[Any]]],
        num_ahead: int,
        buffer_bytes: int,
    ) -> None:
        # Forking is unsafe, since gloo, NCCL and the store's client run threads in the training process.
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._inboxes: list[_Inbox] = []
        for number, job in enumerate(jobs):
            ours, theirs = context.Pipe()
            inbox = _Inbox(ours, buffer_bytes)
            process = context.Process(
                target=_run, args=(theirs, inbox.path, num_ahead, serve, job), name=f"data-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._inboxes.append(inbox)

    def lane_batches(self, batch: int) -> list[Any]:
        """Return the next list of every process, interleaved in the order of the lanes.

        `SampleStream` assigns lanes to processes in turn. The result therefore contains the first element of each list,
        then the second element of each list, and so on.

        Args:
            batch: The number of the batch; it is not used, since the processes send batches in order.

        Raises:
            UserError: If a process raised UserError.
            LostWorkerError: If a process died.
            RuntimeError: If a process raised any other error; the message contains its traceback.
        """
        lists = [self._take(i) for i in range(len(self._inboxes))]
        longest = max(map(len, lists))
        return [items[i] for i in range(longest) for items in lists if i < len(items)]

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for inbox in self._inboxes:
            inbox.close()
        self._processes, self._inboxes = [], []

    def _take(self, number: int) -> list[Any]:
        try:
            found = self._inboxes[number].receive()
        except (EOFError, ConnectionResetError):
            process = self._processes[number]
            process.join()
            raise LostWorkerError(
                f"decoding process {number} died (exit code {process.exitcode}; -9 usually means out of memory); if it "
                "happens again, lower data.num_workers, data.buffer_mib or data.read_ahead_mib"
            ) from None
        if isinstance(found, _Failure):
            raise UserError(found.text) if found.of_user else RuntimeError(f"in a decoding process:\n{found.text}")
        return found


class _Failure:
    """The error that ended a process: the message of a UserError, or the traceback of another error."""

    def __init__(self, text: str, of_user: bool) -> None:
        self.text, self.of_user = text, of_user


class _Inbox:
    """The receiving end of a connection to a decoding process. It belongs to the training process."""

    def __init__(self, connection: Connection, num_bytes: int) -> None:
        self._connection = connection
        self._file = os.memfd_create("decoded audio")
        os.ftruncate(self._file, num_bytes)
        self._memory = mmap.mmap(self._file, num_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def receive(self) -> Any:
        """Receive the next list, and free its part of the ring buffer."""
        header, location = self._connection.recv()
        if location is None:
            found = pickle.loads(header)
        else:
            start, sizes = location
            # All arrays of a list are copied at once, since they are used and freed together.
            with memoryview(self._memory) as ring:
                block = memoryview(bytearray(ring[start : start + sum(map(_aligned, sizes))]))
            buffers, at = [], 0
            for size in sizes:
                buffers.append(block[at : at + size])
                at += _aligned(size)
            found = pickle.loads(header, buffers=buffers)
        with suppress(BrokenPipeError, ConnectionResetError):  # If the process has died, the next call reports it.
            self._connection.send(None)  # The process then reuses the memory.
        return found

    def close(self) -> None:
        """Free the shared memory."""
        self._connection.close()
        self._memory.close()
        os.close(self._file)


class _Outbox:
    """The sending end of a connection to the training process. It belongs to a decoding process."""

    def __init__(self, connection: Connection, path: str, num_ahead: int) -> None:
        self._connection, self._num_ahead = connection, num_ahead
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._waiting: list[tuple[int, int]] = []
        """The byte ranges of the lists that have not been received yet, oldest first. The range of a list that was sent
        through the pipe is empty."""

    def send(self, value: Any) -> None:
        """Send a value, after waiting for free space. Arrays that do not fit into the ring buffer use the pipe."""
        buffers: list[pickle.PickleBuffer] = []
        header = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        views = [b.raw() for b in buffers]
        size = sum(_aligned(len(v)) for v in views)
        while len(self._waiting) >= self._num_ahead:
            self._wait()
        if size > len(self._memory):
            self._waiting.append((0, 0))
            self._connection.send((pickle.dumps(value, protocol=5), None))
            return
        start = self._room(size)
        self._waiting.append((start, start + size))
        at = start
        for view in views:
            self._memory[at : at + len(view)] = view
            at += _aligned(len(view))
        self._connection.send((header, (start, [len(v) for v in views])))

    def _room(self, size: int) -> int:
        """Wait until `size` consecutive bytes are free, and return their offset."""
        while True:
            taken = [(start, end) for start, end in self._waiting if start != end]
            if not taken:
                return 0
            first, last = taken[0][0], taken[-1][1]
            if first < last:  # The free bytes are after the newest list and before the oldest one.
                if last + size <= len(self._memory):
                    return last
                if size < first:
                    return 0
            elif last + size < first:
                return last
            self._wait()

    def _wait(self) -> None:
        self._connection.recv()
        self._waiting.pop(0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN_BYTES) * _ALIGN_BYTES


def _run(
    connection: Connection,
    path: str,
    num_ahead: int,
    serve: Callable[..., Iterator[list[Any]]],
    job: tuple[Any, ...],
) -> None:
    """Run one decoding process until the training process closes its connection."""
    # Only the training process handles these signals. It needs data until it stops, and then kills this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    outbox = _Outbox(connection, path, num_ahead)
    try:
        try:
            inherit_plugins()
            inherit_tasks()
            for value in serve(*job):
                outbox.send(value)
        except UserError as error:
            outbox.send(_Failure(str(error), of_user=True))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except Exception:
            outbox.send(_Failure(traceback.format_exc(), of_user=False))
        while True:
            connection.recv()  # Wait until the training process has received everything and closes the connection.
    except (BrokenPipeError, EOFError, ConnectionResetError):
        # sys.exit would wait for threads that are reading from an unreachable store.
        os._exit(0)
