"""Accelerators and networks by name, from their makers' data sheets: what an estimate divides by.

Peaks are of dense bfloat16 products, without sparsity. Bandwidths are of one accelerator in one direction: InfiniBand
and EFA have a card for each, Ethernet one for the eight of a node. What real runs reach of them is an assumption, which
is printed beside every estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from pipeline.config.errors import ConfigError

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Accelerator:
    name: str
    flops: float  # dense bfloat16 a second
    memory_bytes: float
    memory_bandwidth: float  # bytes a second
    per_node: int = 8
    inside: float = 0.0  # bytes a second to others of its node, one direction; 0: over PCIe

    @property
    def inside_bandwidth(self) -> float:
        return self.inside or PCIE


@dataclass(frozen=True)
class Network:
    """What joins nodes. `latency` is of one step of a collective, in seconds."""

    name: str
    bandwidth: float  # bytes a second of each accelerator, one direction
    latency: float
    efficiency: float  # of the bandwidth, as collectives of large messages reach it


PCIE = 25 * GB  # generation 4, 16 streams, as measured copies reach it
INTRA_LATENCY = 5e-6
INTRA_EFFICIENCY = 0.8

ACCELERATORS = {
    each.name: each
    for each in (
        Accelerator("b200", 2250 * TERA, 180 * GB, 8000 * GB, inside=900 * GB),
        Accelerator("h200", 989 * TERA, 141 * GB, 4800 * GB, inside=450 * GB),
        Accelerator("h100", 989 * TERA, 80 * GB, 3350 * GB, inside=450 * GB),  # SXM5
        Accelerator("h100-pcie", 756 * TERA, 80 * GB, 2000 * GB),
        Accelerator("a100-80", 312 * TERA, 80 * GB, 2039 * GB, inside=300 * GB),
        Accelerator("a100-40", 312 * TERA, 40 * GB, 1555 * GB, inside=300 * GB),
        Accelerator("l40s", 362 * TERA, 48 * GB, 864 * GB),
        Accelerator("a10g", 70 * TERA, 24 * GB, 600 * GB),
        Accelerator("v100", 125 * TERA, 32 * GB, 900 * GB, inside=150 * GB),  # float16: it has no bfloat16
        Accelerator("mi300x", 1307 * TERA, 192 * GB, 5300 * GB, inside=448 * GB),
    )
}
NETWORKS = {
    each.name: each
    for each in (
        Network("nvlink", 450 * GB, 5e-6, 0.8),  # every accelerator in one NVLink domain
        Network("ib-400", 50 * GB, 10e-6, 0.85),  # InfiniBand NDR, a card each
        Network("ib-200", 25 * GB, 10e-6, 0.85),  # InfiniBand HDR, a card each
        Network("efa-400", 50 * GB, 20e-6, 0.7),  # AWS p5: 3,200 Gbit/s a node of eight
        Network("ethernet-100", 100 * GB / 8 / 8, 40e-6, 0.7),  # one card of 100 Gbit/s for the eight of a node
        Network("ethernet-25", 25 * GB / 8 / 8, 50e-6, 0.7),  # one card of 25 Gbit/s for the eight of a node
    )
}

Named = TypeVar("Named", Accelerator, Network)


def accelerator_named(name: str) -> Accelerator:
    """Raises ConfigError listing the known names."""
    return _named("--accelerator", ACCELERATORS, name)


def network_named(name: str) -> Network:
    """Raises ConfigError listing the known names."""
    return _named("--network", NETWORKS, name)


def accelerator_like(device: str) -> Accelerator | None:
    """The accelerator that a driver calls `device` ("NVIDIA H100 80GB HBM3"); None for one that is not in the table."""
    words = device.lower().replace("-", " ").split()
    found = [each for name, each in ACCELERATORS.items() if name.split("-")[0] in words]
    if len(found) > 1:
        small = any(word in ("40gb", "pcie") for word in words)
        found = [each for each in found if each.name.endswith(("-40", "-pcie")) == small] or found
    return found[0] if found else None


def _named(option: str, table: dict[str, Named], name: str) -> Named:
    if name not in table:
        near = get_close_matches(name, table, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"{option} {name}: {hint}known: {', '.join(table)}")
    return table[name]
