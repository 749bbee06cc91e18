"""Traces made by hand, in the format that torch's profiler writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megaconsa.benchmarks.profile.analysis import Analysis, analyse
from megaconsa.benchmarks.profile.names import range_name
from megaconsa.benchmarks.profile.trace import NODE, parse_trace

MAIN = 1
"""The thread that trains."""
AUTOGRAD = 2
"""The thread that runs the backward pass."""


@dataclass
class TraceBuilder:
    """Adds events. Times are microseconds."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def range(self, part: str, start: float, end: float, thread: int = MAIN) -> None:
        self._add("user_annotation", range_name(part), start, end, thread)

    def operator(
        self,
        name: str,
        start: float,
        end: float,
        thread: int = MAIN,
        sequence: int | None = None,
    ) -> None:
        number = {} if sequence is None else {"Sequence number": sequence}
        self._add("cpu_op", name, start, end, thread, **number)

    def node(self, name: str, start: float, end: float, sequence: int | None = None) -> None:
        self.operator(NODE + name, start, end, AUTOGRAD, sequence)

    def call(self, name: str, start: float, end: float, thread: int = MAIN) -> None:
        self._add("cuda_runtime", name, start, end, thread, correlation=len(self.rows))

    def kernel(
        self,
        name: str,
        called: float,
        start: float,
        end: float,
        thread: int = MAIN,
        category: str = "kernel",
    ) -> None:
        """Adds what runs on the device from `start` to `end`.

        called: when the host began the launch, which takes one microsecond.
        """
        number = len(self.rows)
        self._add(
            "cuda_runtime", "cudaLaunchKernel", called, called + 1, thread, correlation=number
        )
        self._add(category, name, start, end, 7, correlation=number)

    def analysis(self) -> Analysis:
        return analyse(parse_trace(self.rows))

    def _add(
        self, category: str, name: str, start: float, end: float, thread: int, **details: Any
    ) -> None:
        event = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread}
        self.rows.append({**event, "ts": start, "dur": end - start, "args": details})
