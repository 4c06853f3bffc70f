"""Serve a model to OpenAI clients and on a page in the browser.

    earshot serve out/model                     an exported model, at http://127.0.0.1:8000
    earshot serve runs/demo --port 9000         the newest checkpoint of a run

MODEL is a folder from `earshot export`, a checkpoint or a run. The server answers requests to /v1/chat/completions and
/v1/audio/transcriptions, one after another. It is meant for trying a model, not for production traffic.

Without --host, only clients on this machine can connect. If the environment variable EARSHOT_API_KEY is set, clients
must send this key.

Exit code 0: ended by Ctrl-C or SIGTERM. 2: the model or the port cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

from model.errors import UserError
from tools.options import check_at_least, check_model
from trainer.__main__ import be_calm

KEY_VARIABLE = "EARSHOT_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "python_multipart")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="an exported folder, a checkpoint, or a run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any free port (default: 8000)")
    parser.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names by which clients on other machines address this server",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum number of tokens of an answer (default: as in the training run)",
    )
    parser.add_argument(
        "--max-request-mib", type=int, default=100, metavar="N", help="maximum size of a request, in MiB (default: 100)"
    )
    parser.add_argument(
        "--max-upload-sec", type=int, default=60, metavar="N", help="time limit for receiving a request (default: 60)"
    )
    options = parser.parse_args(arguments)
    be_calm()
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    sizes = {name: getattr(options, name) for name in ("max_new_tokens", "max_request_mib", "max_upload_sec")}
    check_at_least(1, **sizes)
    try:
        for package in _PACKAGES:
            __import__(package)
    except ImportError:
        raise UserError("earshot serve needs additional packages: pip install 'earshot[serve]'") from None
    for name in options.allow_host:
        if "*" in name.removeprefix("*."):
            raise UserError(f"--allow-host {name}: must be a name, or a pattern such as *.example.org")
    check_model(options.model)
    import uvicorn

    class Server(uvicorn.Server):
        """A server that shuts down cleanly on Ctrl-C or SIGTERM, and does not raise the signal again afterwards."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            previous = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    from trainer.serving.app import make_app
    from trainer.serving.service import Service

    listener = _listen(options.host, options.port)
    with listener:
        service = Service(options.model, options.max_new_tokens)
        host, port = listener.getsockname()[:2]
        hosts = ("localhost", "127.0.0.1", "[::1]", options.host, *options.allow_host)
        key, max_bytes = os.environ.get(KEY_VARIABLE) or None, options.max_request_mib * 2**20
        app = make_app(service, hosts, key, max_bytes, options.max_upload_sec)
        print(f"{service.name} is ready: http://{host}:{port}", flush=True)
        Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. It is created before the model is loaded, so that a port in use is reported early."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: must be 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--host {host} --port {port}: {reason}; choose another one") from None
    listener.listen(128)
    return listener


if __name__ == "__main__":
    sys.exit(main())
