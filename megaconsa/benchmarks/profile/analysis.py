"""The figures of a profile. docs/profiling.md says how to read them.

All of them are means over the recorded steps of one rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from megaconsa.benchmarks.profile.attribution import Attribution, Pass, Place
from megaconsa.benchmarks.profile.idle import Cause, Gap, gaps, waiting_calls
from megaconsa.benchmarks.profile.intervals import inside, united
from megaconsa.benchmarks.profile.kernel_groups import Group, group_of
from megaconsa.benchmarks.profile.trace import OPERATOR, Event, Trace
from megaconsa.parallel.step_parts import Part

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass
class Amount:
    """Time and number of some kernels (of operators on a CPU), in a step."""

    ms: float = 0.0
    count: float = 0.0


@dataclass
class Work:
    """The work of one kind, by the pass that it belongs to."""

    passes: dict[Pass, Amount] = field(default_factory=dict)

    def of(self, direction: Pass) -> Amount:
        return self.passes.setdefault(direction, Amount())

    @property
    def total(self) -> Amount:
        amounts = self.passes.values()
        return Amount(sum(a.ms for a in amounts), sum(a.count for a in amounts))


@dataclass
class PartWork(Work):
    """The work of one part of the step."""

    idle_ms: float = 0.0
    """Time in which the device waited for a launch from this part."""


@dataclass
class Wait:
    """The calls of one place in which the host waits for the device, in a step."""

    place: str
    operator: str
    """The outermost operator around the calls. Empty if there is none."""
    call: str
    count: float = 0.0
    ms: float = 0.0
    """Time in the calls."""
    idle_ms: float = 0.0
    """Time after them in which the device was idle."""


@dataclass(frozen=True)
class DeviceTime:
    """How the device spends a step. The three times add up to the step."""

    computing_ms: float
    """Something other than communication runs."""
    communicating_ms: float
    """Only communication runs."""
    idle_ms: float
    """Nothing runs."""
    launches: float
    idle: dict[Cause, float]
    """Milliseconds of `idle_ms` by cause."""


@dataclass(frozen=True)
class Analysis:
    """The figures of one rank."""

    steps: int
    """Recorded steps."""
    step_ms: float
    device: DeviceTime | None
    """None without a GPU. The other figures are then of operators on the CPU."""
    groups: dict[Group, Work]
    """The kernels by what they do. Empty without a GPU."""
    names: dict[str, Amount]
    """Each kernel or operator. The time of an operator excludes the operators inside it."""
    parts: dict[Part, PartWork]
    waits: list[Wait]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def analyse(trace: Trace) -> Analysis:
    """Computes the figures of a trace."""
    return _Analysis(trace).result()


class _Analysis:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._attribution = Attribution(trace)
        self._start, self._end = trace.window
        self._scale = 1 / 1000 / len(trace.steps)
        """From microseconds of all steps to milliseconds of one."""
        self._device = [event for event in trace.device if self._is_recorded(event)]

    def result(self) -> Analysis:
        found = list(gaps(self._trace)) if self._device else []
        groups: dict[Group, Work] = defaultdict(Work)
        names: dict[str, Amount] = defaultdict(Amount)
        parts: dict[Part, PartWork] = defaultdict(PartWork)
        for event, place in self._kernels():
            self._add(groups[group_of(event.name)].of(place.direction), event.duration)
            self._add(names[event.name], event.duration)
            self._add(parts[place.part].of(place.direction), event.duration)
        if not self._device:
            for operator, duration in self._operators():
                place = self._attribution.place(operator.thread, operator.start)
                self._add(names[operator.name], duration)
                self._add(parts[place.part].of(place.direction), duration)
        for gap in found:
            if gap.launch is not None:
                place = self._attribution.place(gap.launch.thread, gap.launch.start)
                parts[place.part].idle_ms += gap.duration * self._scale
        return Analysis(
            steps=len(self._trace.steps),
            step_ms=(self._end - self._start) * self._scale,
            device=self._device_time(found) if self._device else None,
            groups=_sorted(groups, lambda work: work.total.ms),
            names=_sorted(names, lambda amount: amount.ms),
            parts=_sorted(parts, lambda work: work.total.ms),
            waits=self._waits(found),
        )

    def _device_time(self, found: list[Gap]) -> DeviceTime:
        # A kernel may run across the border of two steps. Each step has its part of that time.
        def busy(events: Iterable[Event]) -> float:
            intervals = united((event.start, event.end) for event in events)
            return inside(intervals, self._start, self._end) * self._scale

        idle: dict[Cause, float] = defaultdict(float)
        for gap in found:
            for cause, duration in gap.causes.items():
                idle[cause] += duration * self._scale
        device = self._trace.device
        computing = busy(e for e in device if group_of(e.name) is not Group.COMMUNICATION)
        return DeviceTime(
            computing_ms=computing,
            communicating_ms=busy(device) - computing,
            idle_ms=sum(idle.values()),
            launches=len(self._device) / len(self._trace.steps),
            idle=dict(idle),
        )

    def _kernels(self) -> Iterable[tuple[Event, Place]]:
        for event in self._device:
            launch = self._trace.launch(event)
            place = Place(Part.OTHER, Pass.NEITHER)
            if launch is not None:
                place = self._attribution.place(launch.thread, launch.start)
            yield event, place

    def _operators(self) -> Iterable[tuple[Event, float]]:
        for nesting in self._trace.threads.values():
            for event, duration in nesting.self_times():
                if event.category == OPERATOR and self._is_recorded(event):
                    yield event, duration

    def _waits(self, found: list[Gap]) -> list[Wait]:
        idle_after: dict[Event, float] = defaultdict(float)
        for gap in found:
            if gap.waiting_call is not None:
                idle_after[gap.waiting_call] += gap.causes[Cause.WAITED]
        waits: dict[tuple[str, str, str], Wait] = {}
        for call in waiting_calls(self._trace):
            is_recorded = self._is_recorded(call)
            # The first step's idle time may follow a call before that step.
            if not is_recorded and call not in idle_after:
                continue
            key = (
                str(self._attribution.place(call.thread, call.start)),
                self._outermost_operator(call),
                call.name,
            )
            wait = waits.setdefault(key, Wait(*key))
            wait.idle_ms += idle_after[call] * self._scale
            if is_recorded:
                wait.count += 1 / len(self._trace.steps)
                wait.ms += call.duration * self._scale
        return sorted(waits.values(), key=lambda wait: -wait.idle_ms)

    def _outermost_operator(self, call: Event) -> str:
        name = ""
        for event in self._trace.around(call.thread, call.start):
            if event.category == OPERATOR and not event.is_node:
                name = event.name
        return name

    def _is_recorded(self, event: Event) -> bool:
        return self._start <= event.start < self._end

    def _add(self, amount: Amount, duration: float) -> None:
        amount.ms += duration * self._scale
        amount.count += 1 / len(self._trace.steps)


def _sorted(values: dict[Key, Value], size: Callable[[Value], float]) -> dict[Key, Value]:
    """The values with the largest first."""
    return dict(sorted(values.items(), key=lambda item: -size(item[1])))
