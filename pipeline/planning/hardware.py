"""Accelerators and networks by name, from their manufacturers' data sheets.

Peaks are dense bfloat16 FLOPS. Bandwidths are per accelerator in one direction: InfiniBand and EFA have a card per
accelerator, Ethernet one for the eight of a node.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from pipeline.config.errors import ConfigError

GB, TERA = 10**9, 10**12
PCIE = 25 * GB  # generation 4, 16 streams, as measured in copies


@dataclass(frozen=True)
class Accelerator:
    """Peak performance of one accelerator."""

    name: str
    flops: float  # dense bfloat16 per second
    memory_bytes: float
    inside_bandwidth: float = PCIE  # bytes per second to others of the node, one direction
    per_node: int = 8


@dataclass(frozen=True)
class Network:
    """Interconnect between nodes. `latency` is that of one step of a collective, in seconds."""

    name: str
    bandwidth: float  # bytes per second per accelerator, one direction
    latency: float
    efficiency: float  # fraction of the bandwidth that collectives of large messages reach


INTRA_LATENCY = 5e-6
INTRA_EFFICIENCY = 0.8

ACCELERATORS = {
    item.name: item
    for item in (
        Accelerator("b200", 2250 * TERA, 180 * GB, 900 * GB),
        Accelerator("h200", 989 * TERA, 141 * GB, 450 * GB),
        Accelerator("h100", 989 * TERA, 80 * GB, 450 * GB),  # SXM5
        Accelerator("h100-pcie", 756 * TERA, 80 * GB),
        Accelerator("a100-80", 312 * TERA, 80 * GB, 300 * GB),
        Accelerator("a100-40", 312 * TERA, 40 * GB, 300 * GB),
        Accelerator("l40s", 362 * TERA, 48 * GB),
        Accelerator("a10g", 70 * TERA, 24 * GB),
        Accelerator("v100", 125 * TERA, 32 * GB, 150 * GB),  # float16; it does not support bfloat16
        Accelerator("mi300x", 1307 * TERA, 192 * GB, 448 * GB),
    )
}
NETWORKS = {
    item.name: item
    for item in (
        Network("nvlink", 450 * GB, 5e-6, 0.8),  # every accelerator in one NVLink domain
        Network("ib-400", 50 * GB, 10e-6, 0.85),  # InfiniBand NDR, a card each
        Network("ib-200", 25 * GB, 10e-6, 0.85),  # InfiniBand HDR, a card each
        Network("efa-400", 50 * GB, 20e-6, 0.7),  # AWS p5: 3,200 Gbit/s a node of eight
        Network("ethernet-100", 100 * GB / 8 / 8, 40e-6, 0.7),  # one card of 100 Gbit/s for the eight of a node
        Network("ethernet-25", 25 * GB / 8 / 8, 50e-6, 0.7),  # one card of 25 Gbit/s for the eight of a node
    )
}

Named = TypeVar("Named", Accelerator, Network)


def hardware_named(option: str, table: dict[str, Named], name: str) -> Named:
    """Return the entry of that name. Raises ConfigError, naming the command-line option, with the known names."""
    if name not in table:
        matches = get_close_matches(name, table, n=1)
        hint = f"did you mean '{matches[0]}'? " if matches else ""
        raise ConfigError(f"{option} {name}: {hint}known: {', '.join(table)}")
    return table[name]


def accelerator_like(device: str) -> Accelerator | None:
    """Return the accelerator with the driver's name `device` ("NVIDIA H100 80GB HBM3"), or None if it is unknown."""
    words = device.lower().replace("-", " ").split()
    matches = [accelerator for name, accelerator in ACCELERATORS.items() if name.split("-")[0] in words]
    if len(matches) > 1:
        small = any(word in ("40gb", "pcie") for word in words)
        matches = [match for match in matches if match.name.endswith(("-40", "-pcie")) == small] or matches
    return matches[0] if matches else None
