"""A real S3 server on this machine: OpenStack Swift with its S3 API, in its own virtual environment.

    python -m tests.services.swift install           install Swift once; tests that need Swift also install it
    python -m tests.services.swift run DIR [PORT]    run until Ctrl-C, and print the environment variables for clients

The environment is `.venv/swift`, or $SWIFT_VENV. Root is not needed. The access key id is `test:tester`.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

SWIFT = "swift==2.38.3"
KEY_ID, REGION = "test:tester", "us-east-1"
VENV = Path(os.environ.get("SWIFT_VENV", Path(__file__).parents[2] / ".venv" / "swift"))
_SERVERS = ("object", "container", "account")
_START_SEC = 30.0

_SWIFT_CONF = """[swift-hash]
swift_hash_path_suffix = tests
swift_hash_path_prefix = tests
[storage-policy:0]
name = only
default = yes
"""
_RINGS = """
import sys
from swift.common.ring import RingBuilder
for kind, port in zip(("object", "container", "account"), sys.argv[2:]):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev(dict(region=1, zone=1, ip="127.0.0.1", port=int(port), device="d1", weight=1))
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""
_STORAGE_CONF = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {etc}
devices = {root}/srv
mount_check = false
disable_fallocate = true
log_address = {root}/no-syslog
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
recon_cache_path = {root}/cache
fallocate_reserve = 0
"""
_PROXY_CONF = """[DEFAULT]
bind_ip = {host}
bind_port = {port}
workers = 0
user = {user}
swift_dir = {etc}
log_address = {root}/no-syslog
[pipeline:main]
pipeline = catch_errors cache listing_formats s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
object_chunk_size = 1048576
client_chunk_size = 1048576
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
dns_compliant_bucket_names = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:slo]
use = egg:swift#slo
"""


def install() -> None:
    """Create the virtual environment, unless it exists.

    Raises:
        CalledProcessError: If the installation fails.
    """
    if (VENV / ".installed").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    subprocess.run([VENV / "bin" / "pip", "install", "--quiet", SWIFT], check=True)
    (VENV / ".installed").touch()


class Swift:
    """An S3 server that consists of a proxy with the S3 API and three storage servers.

    Args:
        root: The folder of its configuration and data.
        port: The port of the proxy; None for any free port.
        host: The address at which the proxy listens.
    """

    def __init__(self, root: Path, port: int | None = None, host: str = "127.0.0.1") -> None:
        self.host = host
        self.root = root.resolve()
        self.port, *self._storage_ports = [port or _free_port(), *(_free_port() for _ in _SERVERS)]
        self.secret = secrets.token_hex(16)
        self._storage: list[subprocess.Popen[bytes]] = []
        self._proxy: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables for a client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": REGION,
        }

    def start(self) -> None:
        """Start all servers, and wait until they answer."""
        self._configure()
        self._storage = [self._launch(kind) for kind in _SERVERS]
        self.start_proxy()
        for port in self._storage_ports:
            _wait_for_port(port)

    def start_proxy(self, secret: str | None = None) -> None:
        """Start the proxy again after `kill_proxy`. If `secret` is not None, it replaces the secret key."""
        assert self._proxy is None
        self.secret = secret or self.secret
        self._write("proxy", _PROXY_CONF, self.port, secret=self.secret)
        self._proxy = self._launch("proxy")
        _wait_for_port(self.port, self.host)

    def kill_proxy(self) -> None:
        """Kill the proxy with SIGKILL. Its connections are closed, and new ones are refused."""
        assert self._proxy is not None
        self._proxy.kill()
        self._proxy.wait()
        self._proxy = None

    def stop(self) -> None:
        """Stop all servers."""
        for process in [*self._storage, *([self._proxy] if self._proxy else [])]:
            process.kill()
            process.wait()
        self._storage, self._proxy = [], None

    def make_bucket(self, name: str) -> None:
        """Create a bucket with a signed PUT, like any S3 client."""
        url = obstore.sign(self._open(name), "PUT", "", timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30) as answer:
            assert answer.status == 200, answer.status

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """Upload all files of `folder` under `prefix`."""
        for path in (p for p in folder.rglob("*") if p.is_file()):
            obstore.put(self._open(bucket), f"{prefix}/{path.relative_to(folder).as_posix()}", path)

    def _open(self, bucket: str) -> S3Store:
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            access_key_id=KEY_ID,
            secret_access_key=self.secret,
            region=REGION,
            client_options={"allow_http": True},
        )

    def _configure(self) -> None:
        etc = self.root / "etc"
        for folder in (etc, self.root / "srv" / "d1", self.root / "log", self.root / "cache"):
            folder.mkdir(parents=True, exist_ok=True)
        (etc / "swift.conf").write_text(_SWIFT_CONF)
        subprocess.run([VENV / "bin" / "python", "-c", _RINGS, etc, *map(str, self._storage_ports)], check=True)
        for kind, port in zip(_SERVERS, self._storage_ports, strict=True):
            self._write(kind, _STORAGE_CONF, port)

    def _write(self, kind: str, template: str, port: int, secret: str = "") -> None:
        user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        etc = self.root / "etc"
        path = etc / f"{kind}.conf"
        path.touch(mode=0o600)
        fields = {"port": port, "user": user, "etc": etc, "root": self.root, "kind": kind, "host": self.host}
        path.write_text(template.format(**fields, secret=secret))

    def _launch(self, kind: str) -> subprocess.Popen[bytes]:
        command = [VENV / "bin" / f"swift-{kind}-server", self.root / "etc" / f"{kind}.conf"]
        with open(self.root / "log" / f"{kind}.log", "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextmanager
def running(root: Path, port: int | None = None, host: str = "127.0.0.1") -> Iterator[Swift]:
    """Start a server, and stop it at the end of the context."""
    install()
    server = Swift(root, port, host)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, host: str = "127.0.0.1") -> None:
    deadline = time.monotonic() + _START_SEC
    while True:
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no Swift server on port {port} after {_START_SEC} s") from None
            time.sleep(0.05)


def shell_exports(environ: Mapping[str, str]) -> str:
    """Return shell commands that export the environment variables."""
    return "\n".join(f"export {name}={value}" for name, value in environ.items())


def main(arguments: list[str]) -> int:
    """Install or run the server as a command."""
    if arguments[:1] == ["install"]:
        install()
        return 0
    if arguments[:1] == ["run"] and len(arguments) in (2, 3):
        with running(Path(arguments[1]), int(arguments[2]) if len(arguments) == 3 else None) as server:
            print(shell_exports(server.environ), flush=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
