"""What `megaconsa bench-training` measured: speed of each topology beside one process on the same batches, and how far losses part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from megaconsa.errors import InputError

AXES = ("tensor", "pipeline", "data")


@dataclass(frozen=True)
class Layout:
    """A topology to measure."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(named) or "one process"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`tensor=2,data=2`; InputError where it is not of that form."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.strip().partition("=")
            if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
                raise InputError(
                    f"--topology {text} is not of the form tensor=2,pipeline=2,data=2; leave out what is 1"
                )
            sizes[axis] = int(size)
        return cls(**sizes)


@dataclass(frozen=True)
class Measurement:
    layout: Layout
    tokens_per_second: float
    """From the median of the steps after the first `skip`."""
    step_seconds: float
    mfu: float | None
    memory_gib: float
    """Of the rank with most."""
    speedup: float
    """Tokens per second over those of the first layout."""
    loss_deviation: float
    """Largest relative distance from the first layout's loss at the same step."""
    losses: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    layout: Layout, result: dict[str, Any], skip: int, first: dict[str, Any]
) -> Measurement:
    """result, first: what megaconsa.benchmarks.training.rank wrote for this layout and for the one to compare with."""

    def seconds(rows: list[dict[str, Any]]) -> float:
        return median(row["step_seconds"] for row in rows[skip:])

    rows, own = result["rows"], seconds(result["rows"])
    shares = [row["mfu"] for row in rows[skip:] if row["mfu"] is not None]
    return Measurement(
        layout,
        rows[0]["tokens"] / own,
        own,
        median(shares) if shares else None,
        result["memory_gib"],
        seconds(first["rows"]) / own,
        max(
            abs(row["loss"] / other["loss"] - 1)
            for row, other in zip(rows, first["rows"], strict=True)
        ),
        [row["loss"] for row in rows],
    )


def training_table(measurements: list[Measurement]) -> Table:
    table = Table("topology", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("processes", "tokens/s", "speed-up", "MFU", "memory", "loss differs by"):
        table.add_column(name, justify="right")
    for m in measurements:
        mfu = "-" if m.mfu is None else f"{m.mfu:.1%}"
        figures = [
            f"{m.tokens_per_second:,.0f}",
            f"{m.speedup:.2f}",
            mfu,
            f"{m.memory_gib:.1f} GiB",
            f"{m.loss_deviation:.2%}",
        ]
        table.add_row(str(m.layout), str(m.layout.processes), *figures)
    return table
