"""Reads a trace of torch's profiler: what ran on the device, and what the host did meanwhile.

The trace is in Chrome's format. Times are microseconds.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaconsa.benchmarks.profile.names import part_of
from megaconsa.errors import InputError
from megaconsa.parallel.step_parts import Part

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
OPERATOR = "cpu_op"
RANGE = "user_annotation"
NODE = "autograd::engine::evaluate_function: "
"""Begins the name of a node of the backward pass. The node's operators lie inside it."""


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    category: str
    name: str
    start: float
    end: float
    thread: int
    """Of the host. It means nothing where the event is on the device."""
    correlation: int | None = None
    """Shared by a kernel and the call that launched it."""
    sequence: int | None = None
    """Shared by an operator of the forward pass and its node of the backward pass."""

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def is_node(self) -> bool:
        return self.name.startswith(NODE)


class Nesting:
    """Events of one thread, which lie inside one another.

    Attributes:
        events: sorted by start, the outer ones first.
        parents: the index of the event around each event, or None.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = sorted(events, key=lambda event: (event.start, -event.end))
        self.parents: list[int | None] = []
        self._times: list[float] = []
        self._innermost: list[int | None] = []
        """The innermost event from each of the times on."""
        opened: list[int] = []
        for index, event in enumerate(self.events):
            self._close(opened, event.start)
            self.parents.append(opened[-1] if opened else None)
            opened.append(index)
            self._mark(event.start, index)
        self._close(opened, float("inf"))

    def around(self, time: float) -> Iterator[Event]:
        """Yields the events around a moment, the innermost first."""
        place = bisect_right(self._times, time) - 1
        index = self._innermost[place] if place >= 0 else None
        while index is not None:
            yield self.events[index]
            index = self.parents[index]

    def self_times(self) -> Iterator[tuple[Event, float]]:
        """Yields each event with its microseconds outside the events inside it."""
        inside: dict[int, float] = defaultdict(float)
        for event, parent in zip(self.events, self.parents, strict=True):
            if parent is not None:
                inside[parent] += event.duration
        for index, event in enumerate(self.events):
            yield event, max(0.0, event.duration - inside[index])

    def _close(self, opened: list[int], time: float) -> None:
        while opened and self.events[opened[-1]].end <= time:
            ended = self.events[opened.pop()]
            self._mark(ended.end, opened[-1] if opened else None)

    def _mark(self, time: float, innermost: int | None) -> None:
        # Times are rounded, so an inner event may seem to end after the outer one.
        self._times.append(max(time, self._times[-1]) if self._times else time)
        self._innermost.append(innermost)


@dataclass
class Trace:
    """The events of one rank."""

    device: list[Event] = field(default_factory=list)
    """Kernels, copies and fills by start."""
    calls: list[Event] = field(default_factory=list)
    """Calls to CUDA by start."""
    threads: dict[int, Nesting] = field(default_factory=dict)
    """Operators and our ranges on each thread of the host."""
    steps: list[Event] = field(default_factory=list)
    """The recorded steps."""
    launches: dict[int, Event] = field(default_factory=dict)
    """The call that launched a kernel, copy or fill, by correlation."""

    @property
    def window(self) -> tuple[float, float]:
        """Start and end of the recorded steps."""
        return self.steps[0].start, self.steps[-1].end

    def launch(self, event: Event) -> Event | None:
        """The call that launched a kernel. None if the profiler has lost it."""
        return None if event.correlation is None else self.launches.get(event.correlation)

    def around(self, thread: int, time: float) -> Iterator[Event]:
        """Yields operators and ranges around a moment on a thread, the innermost first."""
        if thread in self.threads:
            yield from self.threads[thread].around(time)


def read_trace(path: Path) -> Trace:
    """Reads the trace.json.gz of a profile.

    Raises InputError if the file is no such trace.
    """
    try:
        with gzip.open(path) as file:
            trace = parse_trace(json.load(file)["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a trace: {error}") from None
    if not trace.steps:
        raise InputError(f"{path} holds no steps; name a trace that megaconsa profile wrote")
    return trace


def parse_trace(rows: Iterable[dict[str, Any]]) -> Trace:
    """Sorts the events of a Chrome trace.

    rows: the trace's events, as dictionaries. Those that the tables do not need are left out.
    """
    events = [_event(row) for row in rows if row.get("ph") == "X" and "cat" in row]
    events.sort(key=lambda event: event.start)
    threads: dict[int, list[Event]] = defaultdict(list)
    trace = Trace()
    for event in events:
        if event.category in ON_DEVICE:
            trace.device.append(event)
        elif event.category in CALLS:
            trace.calls.append(event)
            if event.correlation is not None:
                trace.launches[event.correlation] = event
        elif event.category == OPERATOR:
            threads[event.thread].append(event)
        elif event.category == RANGE and (part := part_of(event.name)) is not None:
            threads[event.thread].append(event)
            if part is Part.STEP:
                trace.steps.append(event)
    trace.threads = {thread: Nesting(found) for thread, found in threads.items()}
    return trace


def _event(row: dict[str, Any]) -> Event:
    details = row.get("args", {})
    return Event(
        category=row["cat"],
        name=row["name"],
        start=row["ts"],
        end=row["ts"] + row["dur"],
        thread=row["tid"] if isinstance(row["tid"], int) else -1,
        correlation=details.get("correlation"),
        sequence=details.get("Sequence number"),
    )
