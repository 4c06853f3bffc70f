"""Hardware faults of a run's nodes: their events, and the nodes to avoid. This module does not import torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from trainer.telemetry.events import Event, EventLog
from trainer.telemetry.gpu_health import GpuFault, GpuWatch, node_name

log = logging.getLogger(__name__)


def suspect_nodes(events: Sequence[Event]) -> dict[str, str]:
    """Return the nodes with a hardware fault, each with a description of its most recent fault.

    A node is included if one of its GPUs reported an error after which the GPU must not be used, or if the weights of
    its ranks differed from those of most replicas of the LLM. A node that is only slow is not included.

    Args:
        events: Events of a run.
    """
    found: dict[str, str] = {}
    for event in events:
        if event["event"] == "gpu_fault" and event.get("broken"):
            found[str(event.get("node"))] = f"GPU {event.get('gpu')}: {event.get('what')}"
        if event["event"] == "corrupted" and event.get("certain"):
            for node in event.get("nodes") or ():
                found[str(node)] = f"other weights than most replicas after step {event.get('step')}"
    return found


def events_of_job(events: Sequence[Event]) -> Sequence[Event]:
    """Return the events since a person submitted the run's newest job, including those of its restarts."""
    begins = [i for i, e in enumerate(events) if e["event"] == "submitted" and not e.get("restarts")]
    return events[begins[-1] :] if begins else events


def watch_gpus(events: EventLog, step: Callable[[], int | None]) -> GpuWatch:
    """Return a context manager that emits an event for every new hardware fault of this node's GPUs.

    Args:
        events: The event log of this rank.
        step: A function that returns the most recently started step.
    """

    def emit(fault: GpuFault) -> None:
        fields = {"gpu": fault.gpu, "what": fault.what, "broken": fault.is_broken, "node": node_name()}
        try:
            events.add("gpu_fault", step(), **fields)
        except OSError as error:
            log.error("the event 'gpu_fault' %s could not be written: %s", fields, error)

    return GpuWatch(emit)
