"""Which part of the step a moment on the host belongs to, in the forward and backward pass.

A kernel belongs to the part in which the host launched it. The forward pass is inside ranges with
the names of the parts. The backward pass has no such ranges: autograd runs it, on a thread of its
own if there is a GPU. Each of its nodes has the sequence number of the operator that it is the
gradient of, and that operator is inside a range of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megaconsa.benchmarks.profile.names import part_of
from megaconsa.benchmarks.profile.trace import OPERATOR, Event, Trace
from megaconsa.parallel.step_parts import ENCLOSING, LAYERS, Part


class Pass(StrEnum):
    FORWARD = "forward"
    RECOMPUTED = "forward again"
    """The forward pass of a layer again, inside the backward pass (activation checkpointing)."""
    BACKWARD = "backward"
    NEITHER = "neither"


@dataclass(frozen=True)
class Place:
    part: Part
    direction: Pass

    def __str__(self) -> str:
        if self.direction is Pass.NEITHER:
            return self.part
        return f"{self.part}, {self.direction}"


class Attribution:
    """Finds the place of any moment of a trace."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._nodes: dict[Event, Part] = {}
        """The part whose gradient each node computes."""
        parts = self._forward_parts()
        for nesting in trace.threads.values():
            last = Part.OTHER
            for event in nesting.events:
                if event.is_node:
                    # A node that accumulates a weight's gradient has no number. It runs directly
                    # after the node that computed this gradient.
                    if event.sequence is not None:
                        last = parts.get(event.sequence, Part.OTHER)
                    self._nodes[event] = last

    def place(self, thread: int, time: float) -> Place:
        """The place of a moment on a thread of the host."""
        found: Part | None = None
        direction = Pass.NEITHER
        for event in self._trace.around(thread, time):
            if event.is_node:
                if found is None:
                    return Place(self._nodes[event], Pass.BACKWARD)
                return Place(found, Pass.RECOMPUTED)
            part = part_of(event.name)
            if part is Part.FORWARD:
                direction = Pass.FORWARD
            elif part is Part.BACKWARD:
                direction = Pass.BACKWARD
            elif found is None and part not in (None, *ENCLOSING):
                found = part
        return Place(found or Part.OTHER, direction)

    def _forward_parts(self) -> dict[int, Part]:
        """The part that each sequence number belongs to."""
        parts: dict[int, Part] = {}
        for thread in {step.thread for step in self._trace.steps}:
            for event in self._trace.threads[thread].events:
                if event.category != OPERATOR or event.sequence is None or event.is_node:
                    continue
                place = self._forward_place(event)
                if place is not None:
                    # An operator without gradient has the number of the next one that has a
                    # gradient. So the last of several operators counts.
                    parts[event.sequence] = place
        return parts

    def _forward_place(self, operator: Event) -> Part | None:
        """The part of an operator. None inside a node: its numbers are of the forward pass."""
        found: Part | None = None
        for event in self._trace.around(operator.thread, operator.start):
            if event.is_node:
                return None
            part = part_of(event.name)
            if found is None and part in LAYERS:
                found = part
        return found or Part.OTHER
