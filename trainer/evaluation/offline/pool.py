"""The worker processes that share an evaluation's samples."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from model.errors import UserError
from trainer.evaluation.offline.worker import Outcome, Request, Worker, serve

AnswerJobs = Callable[[Sequence[Sequence[int]]], Iterator[list[Outcome]]]
"""A function of batches of sample indices that yields the outcomes of each batch, in the order in which they are ready.

Exhaust the iterator before the next call.
"""
_AHEAD = 2
"""The number of batches that a worker has: one that it answers, and one whose audio it reads."""
_JOIN_SEC = 10.0
"""How long to wait for a worker whose connection was lost, to learn its exit code."""


@contextmanager
def open_workers(request: Request, num: int) -> Iterator[AnswerJobs]:
    """Load the model in `num` processes that share the machine's devices, and stop them when the block ends.

    Args:
        request: the evaluation.
        num: the number of processes; with 1, the model is loaded in this process.

    Raises:
        UserError: If the data or the model cannot be used, or a worker died.
    """
    if num == 1:
        yield Worker(request).answer_jobs
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for index in range(num):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=serve, args=(theirs, request, index, num), daemon=True)
            process.start()
            theirs.close()  # The process must hold the only copy, so that its end closes the connection.
            workers[ours] = process
        yield lambda jobs: _outcomes(workers, jobs)
    finally:
        for connection, ended in workers.items():
            connection.close()
            ended.terminate()
        for ended in workers.values():
            ended.join()


def _outcomes(workers: Mapping[Connection, BaseProcess], jobs: Sequence[Sequence[int]]) -> Iterator[list[Outcome]]:
    todo = list(jobs)[::-1]
    num_given = dict.fromkeys(workers, 0)

    def give(connection: Connection) -> None:
        # A dead worker is reported where its outcomes are received.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(todo[-1] if todo else None)
            if todo:
                todo.pop()
                num_given[connection] += 1

    for connection in list(workers) * _AHEAD:
        give(connection)
    while busy := [connection for connection, num in num_given.items() if num]:
        for ready in wait(busy):
            assert isinstance(ready, Connection)
            outcomes = _received(ready, workers[ready])
            num_given[ready] -= 1
            give(ready)
            yield outcomes
    if todo:  # Every worker is dead.
        raise _ended(next(iter(workers.values())))


def _received(connection: Connection, process: BaseProcess) -> list[Outcome]:
    try:
        message: list[Outcome] | str = connection.recv()
    except (EOFError, ConnectionResetError):  # The connection is reset if the worker died with unread batches.
        raise _ended(process) from None
    if isinstance(message, str):
        raise UserError(message)
    return message


def _ended(process: BaseProcess) -> UserError:
    process.join(_JOIN_SEC)
    return UserError(
        f"a worker ended with exit code {process.exitcode}; if it ran out of memory, lower --nproc or --batch-size; "
        "rerun the same command to resume with the predictions made so far"
    )
