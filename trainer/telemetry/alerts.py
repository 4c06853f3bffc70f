"""Alerts about a run's events, posted to a webhook such as Slack's.

The URL is a secret, so it is read only from the environment variable `EARSHOT_ALERT_WEBHOOK`. If the variable is not
set, no alerts are sent. Whether an event causes an alert depends only on the run's events, so that all processes of all
attempts agree without communicating. For example, if several ranks fail at once, only the first failure causes an
alert.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from model.errors import UserError, check_least
from trainer.telemetry.events import EVENTS, Event, read_events

log = logging.getLogger(__name__)

WEBHOOK = "EARSHOT_ALERT_WEBHOOK"
"""The environment variable that contains the URL."""
_ENDING = frozenset("failed corrupted hang peer_lost diverged finished stopped requeued refused cancelled".split())
"""Events after which the process may end. Their alerts are sent before `Alerts` returns."""
_TIMEOUT_SEC = 5.0


@dataclass(frozen=True)
class AlertConfig:
    """The recipe's section `telemetry.alerts`: the events that are posted to the webhook in `EARSHOT_ALERT_WEBHOOK`."""

    events: tuple[str, ...] = (
        "failed",
        "hang",
        "diverged",
        "requeued",
        "refused",
        "cancelled",
        "skip",
        "straggler",
        "gpu_fault",
        "corrupted",
        "save_failed",
        "finished",
    )
    """The events that are posted (see `docs/operations.md`). `[]` posts none."""
    skipped_updates: int = 5
    """The number of skipped updates between two alerts about `skip` in an attempt."""
    min_interval_sec: float = 60.0
    """The shortest time between two alerts about the same kind of event, in seconds."""

    def __post_init__(self) -> None:
        check_least("telemetry.alerts", self, skipped_updates=1, min_interval_sec=0)
        for event in self.events:
            if event not in EVENTS:
                raise UserError(f"telemetry.alerts.events: {event} is not one of {', '.join(EVENTS)}")


def is_due(events: Sequence[Event], config: AlertConfig) -> bool:
    """Return whether the last of a run's events causes an alert."""
    last = events[-1]
    kind = last["event"]
    if kind not in config.events:
        return False
    same = [e for e in events if e["event"] == kind]
    if kind == "skip":
        num = sum(e["attempt"] == last["attempt"] for e in same)
        return num % config.skipped_updates == 0
    sent = -float("inf")
    for event in same:
        is_sent = event["time"] >= sent + config.min_interval_sec
        sent = event["time"] if is_sent else sent
    return is_sent


def text_of(event: Event, name: str) -> str:
    """Return an alert as one line of text."""
    step = f" at step {event['step']}" if event.get("step") is not None else ""
    what = str(event["event"]).replace("_", " ")
    hidden = ("time", "event", "attempt", "host", "step", "samples", "history", "fingerprint", "num_steps", "compared")
    details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in hidden)
    text = f"{name}: {what}{step} (attempt {event['attempt']}, {event['host']})" + (f": {details}" if details else "")
    return text if len(text) <= 1000 else text[:999] + "…"


@dataclass(frozen=True)
class Alerts:
    """A callable that posts an event of a run to the webhook. It never raises, and never delays a training step.

    It is passed to `EventLog`, which calls it with every event that was written.

    Args:
        run_dir: The run's folder.
        config: The section of the recipe; None reads it from the recipe in the folder.
        environ: The environment variables.
    """

    run_dir: Path
    config: AlertConfig | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __call__(self, event: Event) -> None:
        url = self.environ.get(WEBHOOK)
        if not url:
            return
        try:
            events = read_events(self.run_dir)
            until = events.index(dict(event)) + 1 if dict(event) in events else len(events)
            if not is_due(events[:until], self.config or _stored_config(self.run_dir)):
                return
        except OSError as error:
            log.warning("an alert could not be sent: %s", error)
            return
        thread = threading.Thread(target=post, args=(url, text_of(event, self.run_dir.name)), daemon=True)
        thread.start()
        if event["event"] in _ENDING:
            thread.join(_TIMEOUT_SEC + 1)


def post(url: str, text: str) -> None:
    """Post text to a webhook. A failure is only logged, without the path of the URL, which is a secret."""
    try:
        body = json.dumps({"text": text}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SEC):
            pass
    except (OSError, ValueError, urllib.error.HTTPError) as error:
        reason = error.code if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        host = urlsplit(url).hostname if "://" in url else None
        log.warning("an alert could not be sent to %s: %s", host or f"the URL in {WEBHOOK}", reason)


Notify = Callable[[Event], None]


def _stored_config(run_dir: Path) -> AlertConfig:
    """Return the section of the recipe in a run's folder. If it cannot be read, the defaults are returned."""
    import yaml

    try:
        tree: Any = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        found = tree["telemetry"]["alerts"]
        return AlertConfig(**{**found, "events": tuple(found["events"])})
    except (OSError, yaml.YAMLError, KeyError, TypeError, UserError):
        return AlertConfig()
