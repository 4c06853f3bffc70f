"""Serve the status of runs to Prometheus.

    earshot metrics runs --port 9464                     serve http://127.0.0.1:9464/metrics
    earshot metrics runs --textfile /var/lib/node_exporter/earshot.prom     write a file for node_exporter, once

DIR is the folder of a run or a folder of runs. The command reads the same files as `earshot status`, so it neither
slows down the training nor requires settings in the recipe.

Exit code 0: success, or Ctrl-C. 2: there is no run, or the port or the file cannot be used.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from model.errors import UserError
from tools.run_status import STATES, Status, find_runs, is_run, read_status
from trainer.telemetry.jsonl import write_atomically

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HELP = {
    "earshot_run_state": ("gauge", "1 for the current state of the run, 0 for all other states"),
    "earshot_step": ("gauge", "Finished steps"),
    "earshot_steps_planned": ("gauge", "Steps of the whole run"),
    "earshot_loss": ("gauge", "Loss of the last logging interval"),
    "earshot_learning_rate": ("gauge", "Learning rate"),
    "earshot_gradient_norm": ("gauge", "Global gradient norm before clipping"),
    "earshot_tokens_per_second": ("gauge", "LLM positions per second, audio tokens included"),
    "earshot_audio_seconds_per_second": ("gauge", "Seconds of audio per second"),
    "earshot_mfu_ratio": ("gauge", "Model FLOPs utilization"),
    "earshot_goodput_ratio": (
        "gauge",
        "Fraction of the time since the first start that was spent on steps that were kept",
    ),
    "earshot_memory_peak_bytes": ("gauge", "Peak memory of rank 0"),
    "earshot_score": ("gauge", "Main scores of the last evaluation"),
    "earshot_updates_skipped": ("gauge", "Optimizer updates that were skipped"),
    "earshot_samples_skipped": ("gauge", "Samples that could not be used"),
    "earshot_seconds_since_progress": ("gauge", "Seconds since the last event or logged step of a running attempt"),
    "earshot_events_total": ("counter", "Events by kind"),
    "earshot_unreadable": ("gauge", "1 for a run whose files cannot be read"),
}
_LATEST = {
    "lr": "earshot_learning_rate",
    "grad_norm": "earshot_gradient_norm",
    "tokens_per_sec": "earshot_tokens_per_second",
    "audio_sec_per_sec": "earshot_audio_seconds_per_second",
    "mfu": "earshot_mfu_ratio",
    "peak_bytes": "earshot_memory_peak_bytes",
}

Sample = tuple[str, Mapping[str, str], float]
"""The name, the labels and the value of a sample."""


def metrics(folder: Path, now_sec: float) -> str:
    """Return the metrics of all runs in `folder` in Prometheus' text format.

    Raises:
        UserError: If the folder contains no run.
    """
    samples: list[Sample] = []
    for run in [folder] if is_run(folder) else find_runs(folder):
        name = run.resolve().name if run == folder else str(run.relative_to(folder))
        try:
            samples += _samples(name, read_status(run, now_sec))
        except UserError:
            samples.append(("earshot_unreadable", {"run": name}, 1.0))
    lines = []
    for metric, (kind, text) in _HELP.items():
        own = [s for s in samples if s[0] == metric]
        if own:
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
            lines += [f"{metric}{{{_labels(labels)}}} {_number(value)}" for _, labels, value in own]
    return "\n".join(lines) + "\n"


def _samples(name: str, status: Status) -> Iterator[Sample]:
    run = {"run": name, "host": status.host or ""}
    for state in STATES:
        yield "earshot_run_state", {**run, "state": state}, float(status.state == state)
    values = {
        "earshot_step": status.step,
        "earshot_steps_planned": status.num_steps,
        "earshot_loss": status.losses[-1] if status.losses else None,
        "earshot_goodput_ratio": status.goodput,
        "earshot_updates_skipped": status.num_skipped_updates,
        "earshot_samples_skipped": status.num_samples_skipped,
        "earshot_seconds_since_progress": status.silent_sec,
        **{metric: status.latest.get(key) for key, metric in _LATEST.items()},
    }
    for metric, value in values.items():
        if value is not None:
            yield metric, run, float(value)
    for score, value in status.scores.items():
        yield "earshot_score", {**run, "score": score}, value
    for event, num in status.event_counts.items():
        yield "earshot_events_total", {**run, "event": event}, float(num)


def _labels(labels: Mapping[str, str]) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def make_server(folder: Path, address: str, port: int) -> ThreadingHTTPServer:
    """Return a server for the metrics of `folder`. It listens on the port, but does not answer requests yet.

    Raises:
        UserError: If the address cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                self.send_error(404)
                return
            try:
                body = metrics(folder, time.time()).encode()
            except (UserError, OSError) as error:
                self.send_error(503, explain=str(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing. The base class would print every request."""

    try:
        return ThreadingHTTPServer((address, port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: {address} cannot be used ({error.strerror}); choose another port") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a run, or a folder of runs")
    parser.add_argument("--port", type=int, default=9464, help="port to listen on (default: 9464)")
    parser.add_argument(
        "--address", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; 0.0.0.0 for all addresses)"
    )
    parser.add_argument(
        "--textfile", type=Path, metavar="FILE", help="write the metrics to FILE once, instead of serving them"
    )
    options = parser.parse_args(arguments)
    try:
        text = metrics(options.folder, time.time())
        if options.textfile is not None:
            try:
                write_atomically(options.textfile, text)
            except OSError as error:
                raise UserError(f"--textfile {options.textfile}: cannot be written ({error.strerror})") from None
            return 0
        with make_server(options.folder, options.address, options.port) as server:
            print(f"serving http://{options.address}:{server.server_port}/metrics", flush=True)
            server.serve_forever()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
