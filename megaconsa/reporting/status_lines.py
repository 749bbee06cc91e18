"""A run's status as lines for the terminal."""

from __future__ import annotations

import time
from datetime import datetime

from megaconsa.files import binary_size, duration
from megaconsa.reporting.status import Status

BAR = 40
"""Width of the progress bar in characters."""


def status_lines(found: Status) -> list[str]:
    """Returns the lines, each with a label and a value. What is unknown is left out."""
    share = min(1.0, found.step / found.steps)
    done = int(share * BAR)
    bar = "█" * done + "░" * (BAR - done)
    holder = f" ({found.holder})" if found.holder else ""
    lines = [
        ("run", f"{found.run}: {found.state}{holder}"),
        (
            "steps",
            f"{bar} {found.step:,} of {found.steps:,} ({share:.1%}), {found.tokens:,} tokens",
        ),
    ]
    if found.remaining_seconds is not None:
        remaining = duration(found.remaining_seconds)
        lines.append(("to go", f"{remaining}, without validation and checkpoints"))
    if found.seconds_since_step is not None:
        lines.append(("newest step", f"{duration(found.seconds_since_step)} ago"))
    if found.tokens_per_second is not None:
        mfu = "" if found.mfu is None else f", MFU {found.mfu:.1%}"
        lines.append(("speed", f"{found.tokens_per_second:,.0f} tokens/s{mfu}"))
    if found.loss is not None:
        validation = ""
        if found.validation_loss is not None:
            validation = f", validation {found.validation_loss:.4f}"
        lines.append(("loss", f"{found.loss:.4f}{validation}"))
    if found.expected_sparsity is not None and found.target_sparsity is not None:
        expected = f"{found.expected_sparsity:.3f} expected"
        wanted = f"{found.target_sparsity:.3f} wanted at this step"
        lines.append(("sparsity", f"{expected}, {wanted}"))
    elif found.target_sparsity is not None:
        lines.append(("sparsity", f"{found.target_sparsity:.3f}"))
    if found.skipped:
        lines.append(("not applied", f"{found.skipped:,} steps"))
    lines.append(("checkpoint", _checkpoint(found)))
    if found.stop_requested:
        lines.append(("stop", "asked for by the file stop; it ends after the present step"))
    for number, entry in enumerate(found.incidents):
        label = "incidents" if number == 0 else ""
        place = _step(entry["step"])
        lines.append((label, f"{entry['time']}  {entry['kind']}, {place}: {entry['text']}"))
    width = max(len(label) for label, _ in lines)
    return [f"{label:<{width}}  {value}" for label, value in lines]


def _checkpoint(found: Status) -> str:
    if found.checkpoint is None:
        return "none yet"
    date = datetime.strptime(found.checkpoint["date"], "%Y-%m-%dT%H:%M:%S%z")
    age = duration(time.time() - date.timestamp())
    size = binary_size(found.checkpoint["bytes"])
    return f"step {found.checkpoint['step']:,}, {size}, {age} ago"


def _step(step: int | None) -> str:
    return "while starting" if step is None else f"step {step:,}"
