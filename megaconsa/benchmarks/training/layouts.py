"""The results of `megaconsa bench-training`, and their table.

Each topology and each peer is compared with one process on the same batches: its speed, and how far
its losses deviate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from megaconsa.benchmarks.training.peers import TITLES
from megaconsa.errors import InputError
from megaconsa.tables import Row, Table

AXES = ("tensor", "context", "pipeline", "data")


@dataclass(frozen=True)
class Layout:
    """A topology to measure."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def processes(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(named) or "one process"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Reads a layout such as `tensor=2,data=2`. Raises InputError for any other form."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.strip().partition("=")
            if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
                raise InputError(
                    f"--topology {text} is not of the form tensor=2,pipeline=2,data=2; "
                    "leave out what is 1"
                )
            sizes[axis] = int(size)
        return cls(**sizes)


@dataclass(frozen=True)
class Measurement:
    """The speed, the memory and the losses of one layout, or of a peer."""

    layout: Layout
    peer: str | None
    """None for our own trainer."""
    tokens_per_second: float
    """From the median duration of the steps after the first `skip`."""
    step_seconds: float
    mfu: float | None
    memory_gib: float
    """Peak memory of the rank that uses most."""
    speedup: float
    """Tokens per second divided by those of the first layout."""
    communicating: float | None
    """Share of a step in which the GPUs only communicate, or wait for other ranks to do so. None
    for peers, and without GPUs."""
    idle: float | None
    """Share of a step in which nothing runs on the GPUs, mostly because the host is too slow."""
    loss_deviation: float
    """Largest relative distance from the first layout's loss at the same step."""
    losses: list[float]

    @property
    def efficiency(self) -> float:
        """Speed-up divided by the number of processes."""
        return self.speedup / self.layout.processes

    @property
    def title(self) -> str:
        return str(self.layout) if self.peer is None else TITLES[self.peer]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"efficiency": self.efficiency}


def measure(
    layout: Layout,
    result: dict[str, Any],
    skip: int,
    first: dict[str, Any],
    peer: str | None = None,
) -> Measurement:
    """Compares a layout, or a peer, with the first layout.

    result: what the module rank, or peer_rank, wrote for it.
    skip: steps at the beginning that are not timed.
    first: what the module rank wrote for the layout to compare with.
    """

    def seconds(rows: list[dict[str, Any]]) -> float:
        return median(row["step_seconds"] for row in rows[skip:])

    rows = result["rows"]
    first_rows = first["rows"]
    own_seconds = seconds(rows)
    shares = [row["mfu"] for row in rows[skip:] if row["mfu"] is not None]
    deviations = [
        abs(row["loss"] / other["loss"] - 1) for row, other in zip(rows, first_rows, strict=True)
    ]
    return Measurement(
        layout=layout,
        peer=peer,
        tokens_per_second=rows[0]["tokens"] / own_seconds,
        step_seconds=own_seconds,
        mfu=median(shares) if shares else None,
        memory_gib=result["memory_gib"],
        speedup=seconds(first_rows) / own_seconds,
        communicating=result.get("communicating"),
        idle=result.get("idle"),
        loss_deviation=max(deviations),
        losses=[row["loss"] for row in rows],
    )


def training_table(measurements: list[Measurement]) -> Table:
    """The measurements as a table for the terminal, one row per layout or peer."""
    names = ("tokens/s", "speed-up", "efficiency", "MFU", "GiB", "waits", "idle", "loss off by")
    table = Table(("topology", *names))
    for m in measurements:
        cells = (
            m.title,
            f"{m.tokens_per_second:,.0f}",
            f"{m.speedup:.2f}",
            f"{m.efficiency:.2f}",
            _percent(m.mfu),
            f"{m.memory_gib:.1f}",
            _percent(m.communicating),
            _percent(m.idle),
            f"{m.loss_deviation:.2%}",
        )
        table.rows.append(Row(cells))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
