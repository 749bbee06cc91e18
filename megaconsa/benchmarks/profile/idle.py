"""The time in which the device has nothing to do, and what it waits for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from megaconsa.benchmarks.profile.intervals import inside, united
from megaconsa.benchmarks.profile.names import part_of
from megaconsa.benchmarks.profile.trace import Event, Trace
from megaconsa.parallel.step_parts import Part

WAITING_CALLS = frozenset(
    {
        "cudaDeviceSynchronize",
        "cudaStreamSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpy",
        "cudaFree",
        "cuCtxSynchronize",
        "cuStreamSynchronize",
        "cuEventSynchronize",
    }
)
"""Calls that return once the device has done what it was given."""


class Cause(StrEnum):
    """Why the device was idle until something began on it."""

    QUEUED = "between kernels that were queued"
    """The host had launched it before the device became idle."""
    DATA = "the host read or loaded data"
    WAITED = "the host had waited for the device"
    """Between the launches of what ran before and after, the host called one of WAITING_CALLS."""
    LAUNCHING = "the host was slow to launch"
    """All other time until the launch."""
    UNKNOWN = "unknown"
    """The trace does not hold the launch."""


@dataclass(frozen=True)
class Gap:
    """A time without anything on the device."""

    start: float
    end: float
    causes: dict[Cause, float]
    """Microseconds by cause."""
    launch: Event | None
    """The launch that ended it. None if nothing more ran, or if the trace does not hold it."""
    waiting_call: Event | None
    """The longest call in which the host waited, if that is a cause."""

    @property
    def duration(self) -> float:
        return self.end - self.start


def gaps(trace: Trace) -> Iterator[Gap]:
    """Yields the times of the recorded steps in which nothing is on the device."""
    start, end = trace.window
    finder = _Causes(trace)
    before: Event | None = None
    reached = start
    for event in trace.device:
        if event.start >= end:
            break
        if event.start > reached:
            yield finder.gap(before, event, reached, event.start)
        if event.end >= reached:
            before = event
            reached = event.end
    if reached < end:
        yield finder.gap(before, None, reached, end)


class _Causes:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._waits = waiting_calls(trace)
        self._wait_starts = [call.start for call in self._waits]
        self._data = united(
            (event.start, event.end)
            for nesting in trace.threads.values()
            for event in nesting.events
            if part_of(event.name) is Part.DATA
        )

    def gap(self, before: Event | None, after: Event | None, start: float, end: float) -> Gap:
        """Explains the time between two events on the device.

        before: None at the beginning of the trace.
        after: None at its end.
        """
        launch = self._trace.launch(after) if after is not None else None
        if after is not None and launch is None:
            return Gap(start, end, {Cause.UNKNOWN: end - start}, None, None)
        if launch is not None and launch.end <= start:
            return Gap(start, end, {Cause.QUEUED: end - start}, launch, None)
        launched = end if launch is None else launch.start
        data = inside(self._data, start, min(end, launched))
        causes = {Cause.DATA: data} if data > 0 else {}
        call = self._longest_wait(before, launched)
        rest = Cause.LAUNCHING if call is None else Cause.WAITED
        causes[rest] = end - start - data
        return Gap(start, end, causes, launch, call)

    def _longest_wait(self, before: Event | None, launched: float) -> Event | None:
        """The longest waiting call after the launch of `before` and until `launched`."""
        earlier = self._trace.launch(before) if before is not None else None
        since = earlier.end if earlier is not None else float("-inf")
        longest: Event | None = None
        for index in range(bisect_left(self._wait_starts, since), len(self._waits)):
            call = self._waits[index]
            if call.start >= launched:
                break
            if call.end <= launched and (longest is None or call.duration > longest.duration):
                longest = call
        return longest


def waiting_calls(trace: Trace) -> list[Event]:
    """The calls in which the host waits for the device, by start."""
    return [call for call in trace.calls if call.name in WAITING_CALLS]
