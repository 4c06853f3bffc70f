"""What a device can do, by its data sheet, and what is usable of it, by assumption."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from model.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device and its links. Rates are per device and direction."""

    name: str = "custom"
    tflops: float = 989.0
    """Dense bf16 matrix products."""
    fp32_tflops: float = 67.0
    """Of fp32 ones, without TF32."""
    memory_gib: float = 79.1
    """As the driver reports it."""
    memory_tb_s: float = 3.35
    node_gb_s: float = 450.0
    """To a device of the same node."""
    network_gb_s: float = 50.0
    """To another node."""
    per_node: int = 8
    """Devices of a node."""
    efficiency: float = 0.6
    """Assumed share of the peak rate that the model's matrix products reach."""
    link_efficiency: float = 0.7
    """Assumed share of the links' rates that collectives reach."""
    reserve_gib: float = 6.0
    """Assumed: CUDA context, NCCL, workspaces of libraries, fragments of the allocator."""

    @property
    def usable_bytes(self) -> float:
        """Memory that tensors may take."""
        return (self.memory_gib - self.reserve_gib) * GIB


KNOWN = {
    "h100": Accelerator("h100"),
    "h200": Accelerator("h200", memory_gib=139.8, memory_tb_s=4.8),
    "a100": Accelerator(
        "a100", tflops=312, fp32_tflops=19.5, memory_gib=79.1, memory_tb_s=2.04, node_gb_s=300, network_gb_s=25
    ),
}
"""SXM, 80 GB for a100 and h100: NVIDIA's data sheets; one 400 Gb/s (a100: 200 Gb/s) network port per device."""


def parse_accelerator(text: str) -> Accelerator:
    """`h100`, or `h100,memory_gib=90,…`, or only numbers: those not given are the h100's.

    Raises:
        UserError: unknown name or key, or a value that is no positive number.
    """
    first, *rest = text.split(",")
    if "=" in first:
        first, rest = "h100", [first, *rest]
    if first not in KNOWN:
        raise UserError(f"--accelerator {first}: legal names are {', '.join(KNOWN)}; or give numbers, key=value,…")
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
