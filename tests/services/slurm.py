"""A real Slurm on this machine: a controller, and nodes that are network namespaces with separate process trees.

    python -m tests.services.slurm DIR NODES      run until Ctrl-C, and print the environment variables for clients

It needs root and these Debian packages: slurmctld slurmd slurm-client munge iproute2. All nodes share this machine's
file systems. GPUs are simulated by character devices for Slurm, and by an `nvidia-smi` that reports healthy GPUs unless
`Cluster.gpus` sets errors.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare")
NODE_DOWN_SEC = 8
"""The number of seconds after which the controller regards a silent node as down."""
_START_SEC = 60.0

_CONF = """
ClusterName=earshot
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout={down_sec}
SlurmctldTimeout=10
BatchStartTimeout=20
MessageTimeout=10
KillWait=20
InactiveLimit=0
MinJobAge=3600
"""
_NVIDIA_SMI = """#!/bin/sh
# Prints what `nvidia-smi --query-gpu=index,name,memory.free,memory.total,ecc.errors.uncorrected.volatile.total` would.
exec cat "{root}/gpus-$(uname -n)"
"""


class Cluster:
    """A cluster of nodes n1 … nN.

    Args:
        root: The folder of its configuration, state and logs. Its path must be short, because it contains a socket.
        num_nodes: The number N of nodes.
        num_cpus: The number of CPUs that each node reports, which may exceed this machine's number.
        num_gpus: The number of simulated GPUs of each node.
    """

    def __init__(self, root: Path, num_nodes: int, num_cpus: int = 192, num_gpus: int = 8) -> None:
        self.root, self.num_nodes, self.num_cpus, self.num_gpus = root.resolve(), num_nodes, num_cpus, num_gpus
        number = os.getpid() % 250
        self._tag, self._net = f"es{number}", f"10.{80 + os.getpid() // 250 % 40}.{number}"
        self._port = _free_port()
        self._munged: subprocess.Popen[bytes] | None = None
        self._controller: subprocess.Popen[bytes] | None = None
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        """The IP address of this machine in the nodes' network."""
        return f"{self._net}.254"

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables for Slurm's commands. PATH contains the simulated `nvidia-smi`."""
        path = os.pathsep.join([str(self.root / "bin"), os.environ["PATH"]])
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": path}

    # ---- lifecycle

    def start(self) -> None:
        """Start the cluster, and wait until all nodes are idle."""
        self._configure()
        munge = ["munged", "--foreground", "--force", f"--key-file={self.root}/munge.key"]
        munge += [f"--{kind}-file={self.root}/munged.{kind}" for kind in ("pid", "log", "seed")]
        self._munged = self._launch([*munge, f"--socket={self.root}/munge.sock"], "munged")
        _until(lambda: (self.root / "munge.sock").exists(), "munged does not start")
        bridge = self._bridge
        for command in (
            f"link add {bridge} type bridge",
            f"addr add {self.address}/24 dev {bridge}",
            f"link set {bridge} up",
        ):
            _ip(command)
        for node in range(1, self.num_nodes + 1):
            self._wire(node)
        self.start_controller()
        for node in range(1, self.num_nodes + 1):
            self.start_node(node)
        self.wait_idle()

    def stop(self) -> None:
        """Stop all processes of the cluster, and remove its network. Only the folder remains."""
        for process in [*self._nodes.values(), self._controller, self._munged]:
            if process is not None:
                process.kill()
                process.wait()
        self._nodes.clear()
        for node in range(1, self.num_nodes + 1):
            _ip(f"link del {self._wire_of(node)}", check=False)
            _ip(f"netns del {self._tag}n{node}", check=False)
        _ip(f"link del {self._bridge}", check=False)
        subprocess.run(["umount", "-q", str(self.root / "small")], check=False, capture_output=True)

    def wait_idle(self, num_nodes: int | None = None) -> None:
        """Wait until a number of nodes are idle; None waits for all."""
        wanted = self.num_nodes if num_nodes is None else num_nodes
        _until(lambda: self.node_states().count("idle") >= wanted, "nodes do not become idle")

    def start_controller(self) -> None:
        """Start the controller. After `kill_controller`, it continues with its saved state."""
        assert self._controller is None
        self._controller = self._launch(["slurmctld", "-D", "-f", self.environ["SLURM_CONF"]], "slurmctld")

    def kill_controller(self) -> None:
        """Kill the controller with SIGKILL."""
        assert self._controller is not None
        self._controller.kill()
        self._controller.wait()
        self._controller = None

    # ---- nodes

    def start_node(self, node: int) -> None:
        """Start node `node`, counted from 1."""
        _ip(f"link set {self._wire_of(node)} up")
        shown = "/etc/hosts", "/etc/nsswitch.conf"
        binds = [f"mount --bind {self.root}/{Path(p).name} {p}" for p in shown]
        inside = " && ".join(["ip link set lo up", f"hostname n{node}", *binds, f"exec slurmd -D -N n{node}"])
        command = ["ip", "netns", "exec", f"{self._tag}n{node}", "unshare", "--uts", "--mount", "--pid", "--mount-proc"]
        self._nodes[node] = self._launch([*command, "--fork", "--kill-child=KILL", "sh", "-c", inside], f"n{node}")

    def kill_node(self, node: int) -> None:
        """Simulate a power failure of a node: its network is cut and all of its processes are killed."""
        self.cut(node)
        process = self._nodes.pop(node)
        process.kill()
        process.wait()

    def cut(self, node: int) -> None:
        """Disconnect the node's network. Its processes continue."""
        _ip(f"link set {self._wire_of(node)} down")

    def heal(self, node: int) -> None:
        """Connect the node's network again."""
        _ip(f"link set {self._wire_of(node)} up")

    def gpus(self, node: int, num_errors: int = 0) -> None:
        """Set what the node's `nvidia-smi` reports: all GPUs, the first of them with `num_errors` memory errors."""
        rows = [f"{i}, Fake GPU, 80000, 81559, {0 if i else num_errors}" for i in range(self.num_gpus)]
        (self.root / f"gpus-n{node}").write_text("".join(row + "\n" for row in rows))

    def small_disk(self, num_mib: int) -> Path:
        """Create a small file system that all nodes share, and return its folder. Call this method before `start`."""
        folder = self.root / "small"
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_mib}m", "tmpfs", str(folder)], check=True)
        return folder

    def node_states(self) -> list[str]:
        """Return the states of all nodes, such as `idle`, `allocated` or `down*`."""
        done = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False)
        return done.stdout.split()

    def pids(self, node: int, pattern: str) -> list[int]:
        """Return the sorted ids, on this machine, of a node's processes whose command lines match `pattern`."""
        space = os.readlink(f"/proc/{_only_child(self._nodes[node].pid)}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and os.readlink(entry / "ns/pid") == space:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if re.search(pattern, line):
                        found.append(int(entry.name))
            except OSError:  # the process has ended
                continue
        return sorted(found)

    # ---- jobs

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, check: bool = True, timeout_sec: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with the environment variables of this cluster."""
        environ = {**os.environ, **self.environ, **(env or {})}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_sec, check=check)

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """Submit a job with `sbatch`, and return its id."""
        environ = {**os.environ, **self.environ, **(env or {})}
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], cwd=cwd, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """Return the fields of `scontrol show job`, or an empty dict while the controller does not answer."""
        done = self.run("scontrol", "show", "job", "-o", str(job_id), check=False)
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    # ---- internals

    @property
    def _bridge(self) -> str:
        return f"{self._tag}br"

    def _wire_of(self, node: int) -> str:
        return f"{self._tag}w{node}"

    def _wire(self, node: int) -> None:
        space, wire = f"{self._tag}n{node}", self._wire_of(node)
        for command in (
            f"netns add {space}",
            f"link add {wire} type veth peer name eth0 netns {space}",
            f"link set {wire} master {self._bridge}",
            f"-n {space} addr add {self._net}.{node}/24 dev eth0",
            f"-n {space} link set eth0 up",
            f"-n {space} route add default via {self.address}",
        ):
            _ip(command)

    def _configure(self) -> None:
        root, nodes = self.root, range(1, self.num_nodes + 1)
        for folder in ("state", "bin", "dev"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        key = root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        text = _CONF.format(
            root=root,
            host=socket.gethostname().partition(".")[0],
            address=self.address,
            port=self._port,
            down_sec=NODE_DOWN_SEC,
        )
        size = f"CPUs={self.num_cpus} RealMemory=100000 Gres=gpu:{self.num_gpus}"
        text += "".join(f"NodeName=n{i} NodeAddr={self._net}.{i} {size} State=UNKNOWN\n" for i in nodes)
        common = f"Nodes=n[1-{self.num_nodes}] State=UP MaxTime=INFINITE"
        text += f"PartitionName=main {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30\n"
        text += f"PartitionName=urgent {common} PriorityTier=9 PreemptMode=OFF\n"
        (root / "slurm.conf").write_text(text)
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # slurmd would detect the version otherwise
        for i in range(self.num_gpus):
            subprocess.run(["mknod", str(root / "dev" / f"gpu{i}"), "c", "1", "3"], check=True)
        last = f"[0-{self.num_gpus - 1}]" if self.num_gpus > 1 else "0"
        (root / "gres.conf").write_text(f"Name=gpu File={root}/dev/gpu{last}\n" if self.num_gpus else "")
        here = socket.gethostname()
        hosts = ["127.0.0.1 localhost", f"{self.address} {here} {here.partition('.')[0]}"]
        (root / "hosts").write_text("\n".join([*hosts, *(f"{self._net}.{i} n{i}" for i in nodes)]) + "\n")
        (root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        smi = root / "bin" / "nvidia-smi"
        smi.write_text(_NVIDIA_SMI.format(root=root))
        smi.chmod(0o755)
        for i in nodes:
            self.gpus(i)

    def _launch(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with open(self.root / f"{name}.out", "ab") as out:
            environ = {**os.environ, **self.environ}
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ, start_new_session=True
            )


def why_not() -> str | None:
    """Return the reason why a cluster cannot run on this machine; None if it can."""
    missing = [p for p in PROGRAMS if shutil.which(p) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], check=False).returncode:
        return "namespaces cannot be created on this machine"
    return None


@contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """Start a cluster, and stop it at the end of the context."""
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _ip(arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments.split()], check=check, capture_output=not check)


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + _START_SEC
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{message} within {_START_SEC:g} s; see the logs in the cluster's folder")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: list[str]) -> int:
    """Run a cluster as a command until Ctrl-C."""
    reason = why_not()
    if reason or len(arguments) != 2:
        print(reason or __doc__, file=sys.stderr)
        return 2
    with running(Cluster(Path(arguments[0]), int(arguments[1]))) as cluster:
        print("\n".join(f"export {name}={value}" for name, value in cluster.environ.items()), flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
