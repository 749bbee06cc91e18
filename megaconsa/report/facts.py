"""The figures at the top of a run's section, and what produced the run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megaconsa.model.flops import kv_cache_bytes, training_flops
from megaconsa.provenance import Start
from megaconsa.report.comparison import amount, duration, final_loss
from megaconsa.report.runs import Run
from megaconsa.reporting.metrics import Row, last, series


@dataclass(frozen=True)
class Fact:
    """One figure at the top of a section."""

    label: str
    value: str
    note: str = ""


def facts(run: Run) -> list[Fact]:
    """Returns the final figures. What the rows do not have is left out."""
    rows = run.rows
    steps = rows[-1]["step"]
    planned = run.config.training.steps if run.config else None
    note = f"of {planned:,}" if planned and planned != steps else ""
    found = [Fact("steps", f"{steps:,}", note)]
    tokens = last(rows, "tokens")
    if tokens is not None:
        before = ""
        if run.continues:
            before = f"after {amount(run.tokens_before)} of {run.continues}"
        found.append(Fact("tokens", amount(tokens), before))
    loss = final_loss(run)
    if loss is not None:
        error = "" if loss.error is None else f"± {loss.error:.4f}, "
        found.append(Fact("training loss", f"{loss.value:.4f}", f"{error}mean of the last tenth"))
    validation = last(rows, "validation_loss")
    if validation is not None:
        lowest = series(rows, "validation_loss")[1].min()
        found.append(Fact("validation loss", f"{validation:.4f}", f"lowest {lowest:.4f}"))
    if run.learning:
        found += _learning_facts(rows)
    if run.allocation is not None:
        share = f"{run.allocation.sparsity:.1%}"
        found.append(Fact("windowed heads", share, f"window {run.allocation.window:,}"))
        found += _savings(run)
    speed = series(rows, "tokens_per_second")[1]
    if len(speed):
        mfu = series(rows, "mfu")[1]
        note = f"MFU {statistics.median(mfu):.1%}" if len(mfu) else ""
        found.append(Fact("tokens/s, median", f"{statistics.median(speed):,.0f}", note))
    seconds = series(rows, "step_seconds")[1]
    waiting = series(rows, "data_seconds")[1]
    if len(seconds):
        total = float(seconds.sum())
        note = f"{waiting.sum() / total:.1%} for data" if len(waiting) and total > 0 else ""
        found.append(Fact("time in steps", duration(total), note))
    memory = series(rows, "memory_gib")[1]
    if len(memory) and memory.max() > 0:
        found.append(Fact("memory", f"{memory.max():.1f} GiB", "peak of a rank"))
    return found


def _learning_facts(rows: Sequence[Row]) -> list[Fact]:
    """Returns the final figures of a run that learns its allocation."""
    found = []
    expected = last(rows, "expected_sparsity")
    if expected is not None:
        target = last(rows, "target_sparsity")
        note = "" if target is None else f"target {target:.3f}"
        found.append(Fact("expected sparsity", f"{expected:.3f}", note))
    agreement = last(rows, "split_agreement")
    if agreement is not None:
        found.append(Fact("split agreement", f"{agreement:.2f}", "rank correlation of two halves"))
    separated = last(rows, "separated_share")
    if separated is not None:
        note = "two standard errors from the cut"
        found.append(Fact("separated units", f"{separated:.0%}", note))
    decided = last(rows, "decided_share")
    if decided is not None:
        found.append(Fact("decided units", f"{decided:.1%}", "no evidence by itself"))
    return found


def _savings(run: Run) -> list[Fact]:
    """Returns what the allocation saves over full attention at the training length.

    Learning saves nothing yet, because it computes both kinds of attention.
    """
    if run.config is None or run.allocation is None:
        return []
    model_config = run.config.to_model_config()
    length = run.config.training.sequence_length
    dense_flops = training_flops(model_config, None, length, [length])
    flops = training_flops(model_config, run.allocation, length, [length]) / dense_flops
    cache = kv_cache_bytes(model_config, run.allocation, length) / kv_cache_bytes(
        model_config, None, length
    )
    note = f"at {length:,} tokens"
    if run.learning:
        note += "; learning saves none"
    name = "FLOPs of stage 2" if run.learning else "training FLOPs"
    return [
        Fact(name, f"{flops - 1:+.1%}", note),
        Fact("KV cache", f"{cache - 1:+.1%}", f"at {length:,} tokens"),
    ]


def provenance(start: Start) -> list[tuple[str, str]]:
    """Returns what produced a run in one of its starts, as names and values."""
    commit = start.commit or "not known"
    if start.modified:
        commit += ", with uncommitted changes"
    devices = [
        f"{name} ({ranks} ranks)" if ranks > 1 else name for name, ranks in start.devices.items()
    ]
    entries = [
        ("command", start.command),
        ("began", start.started),
        ("ended", start.ended or "not recorded: it still runs, or was killed"),
        (
            "steps",
            f"{start.first_step:,} to {'?' if start.last_step is None else f'{start.last_step:,}'}",
        ),
        ("megaconsa", start.version),
        ("commit", commit),
        ("devices", ", ".join(devices)),
        ("hosts", ", ".join(start.hosts)),
        ("Slurm job", start.job or ""),
        ("libraries", ", ".join(f"{name} {version}" for name, version in start.libraries.items())),
        ("Python", start.python),
        ("system", start.system),
    ]
    return [(name, value) for name, value in entries if value]
