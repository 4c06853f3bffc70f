"""Rates and memory of accelerators: data-sheet values, and the assumed share of them that a run reaches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from model.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device and its links; rates are per device and per direction."""

    name: str = "custom"
    tflops: float = 989.0
    """The peak rate of dense bf16 matrix products, in TFLOP/s."""
    fp32_tflops: float = 67.0
    """The peak rate of fp32 matrix products without TF32, in TFLOP/s."""
    memory_gib: float = 79.1
    """The memory that the driver reports, in GiB."""
    memory_tb_s: float = 3.35
    """The memory bandwidth, in TB/s."""
    node_gb_s: float = 450.0
    """The bandwidth to a device of the same node, in GB/s."""
    network_gb_s: float = 50.0
    """The bandwidth to a device of another node, in GB/s."""
    per_node: int = 8
    """The number of devices per node."""
    efficiency: float = 0.6
    """The share of the peak rate that the model's matrix products are assumed to reach."""
    link_efficiency: float = 0.7
    """The share of the links' bandwidth that collectives are assumed to reach."""
    reserve_gib: float = 6.0
    """The memory assumed to be taken by the CUDA context, NCCL, library workspaces and fragmentation, in GiB."""

    @property
    def usable_bytes(self) -> float:
        """The memory available to tensors, in bytes."""
        return (self.memory_gib - self.reserve_gib) * GIB


KNOWN = {
    "h100": Accelerator("h100"),
    "h200": Accelerator("h200", memory_gib=139.8, memory_tb_s=4.8),
    "a100": Accelerator(
        "a100", tflops=312, fp32_tflops=19.5, memory_gib=79.1, memory_tb_s=2.04, node_gb_s=300, network_gb_s=25
    ),
}
"""The accelerators that have a name, by that name.

Values are those of NVIDIA's data sheets for SXM modules, with 80 GB for the a100 and h100. Each device is assumed to
have one network port of 400 Gb/s (a100: 200 Gb/s).
"""


def parse_accelerator(text: str) -> Accelerator:
    """Parse the value of `--accelerator`.

    Args:
        text: a name (`h100`), a name with changed values (`h100,memory_gib=90`), or only values (`memory_gib=90`).
            Values that are not given are those of the named accelerator, or of the h100 if no name is given.

    Returns:
        The accelerator, named `text` if any value was changed.

    Raises:
        UserError: If a name or key is unknown, or a value is not a positive number (`reserve_gib` may be 0).
    """
    first, *rest = text.split(",")
    if "=" in first:
        first, rest = "h100", [first, *rest]
    if first not in KNOWN:
        raise UserError(f"--accelerator {first}: legal names are {', '.join(KNOWN)}; or give numbers as key=value,…")
    legal = [f.name for f in dataclasses.fields(Accelerator) if f.name != "name"]
    changes: dict[str, float] = {}
    for item in rest:
        key, _, value = item.partition("=")
        if key not in legal:
            raise UserError(f"--accelerator {item}: legal keys are {', '.join(legal)}")
        try:
            changes[key] = int(value) if key == "per_node" else float(value)
        except ValueError:
            raise UserError(f"--accelerator {item}: {value!r} is not a number") from None
        if not changes[key] > 0 and key != "reserve_gib":
            raise UserError(f"--accelerator {item}: must be positive")
    found: Accelerator = dataclasses.replace(KNOWN[first], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(found, name=text) if changes else found
