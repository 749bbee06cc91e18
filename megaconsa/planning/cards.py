"""Memory of GPUs by name, and whether a plan fits."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from megaconsa.errors import InputError
from megaconsa.model.flops import peak_flops

# Memory in GB as on the datasheet, by a word of the name. An A100 with 40 GB is `a100-40gb`.
_GIGABYTES = {
    "a100": 80,
    "a800": 80,
    "a40": 48,
    "a6000": 48,
    "l4": 24,
    "l40": 48,
    "l40s": 48,
    "h20": 96,
    "h100": 80,
    "h800": 80,
    "gh200": 96,
    "h200": 141,
    "b200": 180,
    "b300": 270,
    "gb200": 186,
    "gb300": 278,
    "mi300x": 192,
    "mi325x": 256,
}
USABLE = 0.985
"""GiB that a process can allocate for each GB of the datasheet. An H100 with 80 GB has 79.2 GiB."""
RESERVED_GIB = 2.0
"""What CUDA and NCCL take beside the tensors."""
SLACK = 1.02
"""Allocated memory over the estimate, as measured for 0.6B and 1.7B on an H200 (docs/flops.md)."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP/s."""
    gigabytes: int
    """Memory as on the datasheet."""

    @property
    def limit_bytes(self) -> int:
        """The largest estimate that is expected to fit."""
        usable = self.gigabytes * USABLE - RESERVED_GIB
        return int(usable / SLACK * 2**30)


def find_card(name: str) -> Card:
    """Returns the card called `name`, such as `h100` or `a100-40gb`.

    Raises InputError for an unknown one.
    """
    peak = peak_flops(name)
    words = re.findall(r"[a-z0-9]+", name.lower())
    chip = next((word for word in words if word in _GIGABYTES), None)
    if peak is None or chip is None:
        near = difflib.get_close_matches(name.lower(), _GIGABYTES, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_GIGABYTES)}"
        raise InputError(f"--gpu {name} is no GPU whose bf16 peak and memory are known; {hint}")
    sizes = [int(word[:-2]) for word in words if re.fullmatch(r"[0-9]+gb", word)]
    return Card(name, peak, sizes[0] if sizes else _GIGABYTES[chip])
