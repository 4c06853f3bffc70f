"""Rates and memory of accelerators: data-sheet values, and the fractions of them that a run is assumed to reach."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError

GIB = 2**30

# The fractions are estimates, neither measured nor fitted to bench/published.csv. `bench.calibrate` measures a device.
H100_MATRIX = ((64.0, 0.17), (256.0, 0.50), (1024.0, 0.68), (4096.0, 0.74))
A100_MATRIX = ((64.0, 0.35), (256.0, 0.66), (1024.0, 0.79), (4096.0, 0.84))
"""The fractions of the peak rate that bf16 matmuls are assumed to reach on each device, as in `Accelerator.matrix`."""


@dataclass(frozen=True)
class Accelerator:
    """One device and its links. Rates are per device and per direction."""

    name: str = "custom"
    tflops: float = 989.0
    """The peak rate of dense bf16 matmuls, in TFLOP/s."""
    fp32_tflops: float = 67.0
    """The peak rate of fp32 matmuls without TF32, in TFLOP/s."""
    memory_gib: float = 79.1
    """The memory that the driver reports, in GiB."""
    memory_tb_s: float = 3.35
    """The memory bandwidth, in TB/s."""
    node_gb_s: float = 450.0
    """The bandwidth to a device in the same node, in GB/s."""
    network_gb_s: float = 50.0
    """The bandwidth to a device in another node, in GB/s."""
    per_node: int = 8
    """The number of devices per node."""
    matrix: tuple[tuple[float, float], ...] = H100_MATRIX
    """The fraction of the peak rate that a matmul reaches, as pairs (FLOPs per byte, fraction) in ascending order.

    An [m, k] by [k, n] matmul in bf16 has mnk / (mk + kn + mn) FLOPs per byte. `python -m bench.calibrate` measures
    the table."""
    efficiency: float = 0.0
    """The fraction of the peak rate that every matmul is assumed to reach; 0 to use the fractions in `matrix`."""
    attention_efficiency: float = 0.5
    """The fraction of the peak rate that fused attention is assumed to reach."""
    memory_efficiency: float = 0.8
    """The fraction of the memory bandwidth that element-wise operations are assumed to reach."""
    kernel_us: float = 4.0
    """The duration of a kernel launch, in microseconds."""
    link_efficiency: float = 0.7
    """The fraction of the links' bandwidth that collectives are assumed to reach."""
    node_latency_us: float = 3.4
    """The latency of a hop within a node, in microseconds, from NCCL's tuning table for rings over NVLink."""
    network_latency_us: float = 14.0
    """The latency of a hop between nodes, in microseconds, from NCCL's tuning table for rings over a network."""
    reserve_gib: float = 6.0
    """The memory that the CUDA context, NCCL, library workspaces and fragmentation are assumed to use, in GiB."""

    @property
    def usable_bytes(self) -> float:
        """The memory available to tensors, in bytes."""
        return (self.memory_gib - self.reserve_gib) * GIB

    def matrix_share(self, rows: float, columns: float, inner: float) -> float:
        """Return the fraction of the peak rate that a [rows, inner] by [inner, columns] matmul reaches.

        Between the entries of `matrix`, the fraction is interpolated over the logarithm of the FLOPs per byte. Below
        the first entry, it is proportional to the FLOPs per byte.
        """
        if self.efficiency:
            return self.efficiency
        intensity = 1 / (1 / rows + 1 / columns + 1 / inner)
        below, share = self.matrix[0]
        if intensity <= below:
            return share * intensity / below
        for above, next_share in self.matrix[1:]:
            if intensity <= above:
                return share + (next_share - share) * math.log(intensity / below) / math.log(above / below)
            below, share = above, next_share
        return share

    def ranging(self, change: float) -> Accelerator:
        """Return this accelerator with all assumed fractions multiplied, and all latencies divided, by 1 + `change`.

        Fractions may then exceed 1, because `bench.calibrate` stores a measured memory bandwidth with the fraction 1.
        """
        factor = 1 + change
        return dataclasses.replace(
            self,
            matrix=tuple((at, share * factor) for at, share in self.matrix),
            **{k: getattr(self, k) * factor for k in _SHARES},
            **{k: getattr(self, k) / factor for k in _LATENCIES},
        )

    def without_fixed_costs(self) -> Accelerator:
        """Return this accelerator without link latencies and kernel-launch overhead."""
        return dataclasses.replace(self, kernel_us=0.0, node_latency_us=0.0, network_latency_us=0.0)


_SHARES = ("efficiency", "attention_efficiency", "memory_efficiency", "link_efficiency")
_LATENCIES = ("kernel_us", "node_latency_us", "network_latency_us")

KNOWN = {
    "h100": Accelerator("h100"),
    "h200": Accelerator("h200", memory_gib=139.8, memory_tb_s=4.8),
    "a100": Accelerator(
        "a100",
        tflops=312,
        fp32_tflops=19.5,
        memory_gib=79.1,
        memory_tb_s=2.04,
        node_gb_s=300,
        network_gb_s=25,
        matrix=A100_MATRIX,
    ),
}
"""The predefined accelerators by name.

The values are from NVIDIA's data sheets for SXM modules, with 80 GB for the a100 and h100. Each device is assumed to
have one network port with 400 Gb/s (a100: 200 Gb/s).
"""


def parse_accelerator(text: str) -> Accelerator:
    """Parse the value of `--accelerator`.

    Args:
        text: A name (`h100`), a name with changed values (`h100,memory_gib=90`), or only values (`memory_gib=90`).
            Values that are not given are taken from the named accelerator, or from the h100 if no name is given.

    Returns:
        The accelerator, named `text` if any value was changed.

    Raises:
        UserError: If a name or key is unknown, or a value is not a positive number (`reserve_gib` may be 0).
    """
    first, *rest = text.split(",")
    if "=" in first:
        first, rest = "h100", [first, *rest]
    base = KNOWN.get(first) or _load(first)
    if base is None:
        raise UserError(
            f"--accelerator {first}: must be one of {', '.join(KNOWN)}; or specify values as key=value,… "
            "or a .json file from bench.calibrate"
        )
    legal = [f.name for f in dataclasses.fields(Accelerator) if f.name not in ("name", "matrix")]
    changes: dict[str, float] = {}
    for item in rest:
        key, _, value = item.partition("=")
        if key not in legal:
            raise UserError(f"--accelerator {item}: known keys are {', '.join(legal)}")
        try:
            changes[key] = int(value) if key == "per_node" else float(value)
        except ValueError:
            raise UserError(f"--accelerator {item}: {value!r} is not a number") from None
        if not changes[key] > 0 and key not in ("reserve_gib", "efficiency", *_LATENCIES):
            raise UserError(f"--accelerator {item}: must be positive")
    found: Accelerator = dataclasses.replace(base, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(found, name=text) if changes else found


def _load(text: str) -> Accelerator | None:
    """Return the accelerator that `bench.calibrate` wrote to a file; None if `text` does not end with .json.

    Raises:
        UserError: If the file cannot be read.
    """
    path = Path(text)
    if path.suffix != ".json":
        return None
    try:
        found = json.loads(path.read_text())
        found["matrix"] = tuple((float(at), float(share)) for at, share in found["matrix"])
        return Accelerator(**found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--accelerator {text}: cannot be read ({error}); write it with python -m bench.calibrate"
        ) from None
