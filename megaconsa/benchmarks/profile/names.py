"""Names that the recording of a profile and its reading share."""

from __future__ import annotations

from megaconsa.parallel.step_parts import Part

TRACE = "trace.json.gz"
MEMORY = "memory.pickle"
FIGURES = "profile.json"
EXTRA_STEPS = 3
"""Steps beside the skipped and the traced ones: the profiler's warm-up, the step before the traced
ones, and the memory snapshot."""
PREFIX = "megaconsa: "
"""Begins the names of our ranges in a trace. Libraries name ranges too."""


def rank_folder(rank: int) -> str:
    return f"rank_{rank}"


def range_name(part: str) -> str:
    """The name of a part's range in a trace.

    part: a Part, with the number of the layer if there are several.
    """
    return PREFIX + part


def part_of(name: str) -> Part | None:
    """The part that a range of a trace belongs to. None if the range is not ours."""
    if not name.startswith(PREFIX):
        return None
    return Part(name.removeprefix(PREFIX).rstrip("0123456789 "))
