"""Functions that run work on all ranks, and that raise an error on all of them if the work fails on any rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from model.errors import UserError
from trainer.checkpoint.reader import DamagedError
from trainer.parallel.groups import Groups
from trainer.parallel.values import Kinds, all_gather_values, broadcast_value

T = TypeVar("T")


def gather(groups: Groups, value: T) -> list[T]:
    """Return the values of all ranks, in rank order.

    Collective: every rank of the world must call it.
    """
    return all_gather_values(value, groups.world)


def together(groups: Groups, doing: str, work: Callable[[], T]) -> T:
    """Call `work` on every rank, and raise the same error on all ranks if it fails on any of them.

    Collective: every rank of the world must call it.

    Args:
        groups: This rank's process groups.
        doing: A description of the work, with which the error message begins.
        work: The function to call, which must not contain collectives.

    Returns:
        The result of `work` on this rank.

    Raises:
        UserError: If `work` fails on any rank.
    """
    result, failure = None, None
    try:
        result = work()
    except (OSError, EOFError, UserError, DamagedError) as error:
        failure = str(error)
    for rank, text in enumerate(gather(groups, failure)):
        if text is not None:
            raise UserError(f"{doing}: rank {rank}: {text}")
    return result  # type: ignore[return-value]


def from_rank0(groups: Groups, doing: str, work: Callable[[], T], kinds: Kinds = ()) -> T:
    """Call `work` on rank 0, and return its result on every rank.

    Collective: every rank of the world must call it.

    Args:
        groups: This rank's process groups.
        doing: A description of the work, with which the error message begins.
        work: The function to call, which must not contain collectives.
        kinds: The dataclasses and named tuples whose instances the result may contain.

    Raises:
        UserError: If `work` fails.
    """
    found = together(groups, doing, lambda: work() if groups.rank == 0 else None)
    return broadcast_value(found, groups.world, kinds)  # type: ignore[return-value]
