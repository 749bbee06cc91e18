"""The figures of one run."""

from __future__ import annotations

from megaconsa import run_folder
from megaconsa.report.runs import Run
from megaconsa.reporting import gate_plots, training_plots
from megaconsa.reporting.plot_style import Drawing

SMOOTH_SHARE = 0.04
"""Share of a run's steps over which curves are averaged, if the user names no number."""


def smooth_steps(run: Run, chosen: int | None) -> int:
    """Returns the number of steps of the moving average of a run's curves."""
    if chosen is not None:
        return max(1, chosen)
    return max(1, round(SMOOTH_SHARE * len(run.rows)))


def run_drawings(run: Run, unigram_entropy: float | None, smooth: int) -> list[Drawing]:
    """Draws everything that the run's files allow.

    unigram_entropy: of the data, in nats per token, if it is known.
    smooth: number of steps of the moving average.
    """
    rows = run.rows
    found = [
        training_plots.loss(rows, unigram_entropy, smooth),
        _allocation_maps(run),
    ]
    if run.learning:
        found += [
            gate_plots.layer_history(rows),
            gate_plots.sparsity(rows),
            gate_plots.evidence(rows),
            _unit_evidence(run),
            gate_plots.decided(rows),
            gate_plots.multipliers(rows),
        ]
    found += [
        training_plots.learning_rate(rows),
        training_plots.gradient_norm(rows, smooth),
        training_plots.throughput(rows, smooth),
    ]
    return [drawing for drawing in found if drawing is not None and _has_content(drawing)]


def _has_content(drawing: Drawing) -> bool:
    """Whether anything is drawn. A run may lack the field of a figure."""
    return any(axis.lines or axis.collections or axis.images for axis in drawing.figure.axes)


def _allocation_maps(run: Run) -> Drawing | None:
    """Draws the gates and the table, whichever of them the run has."""
    probability = run.gates["probability_full"] if run.gates else None
    if probability is None and run.allocation is None:
        return None
    step = run.gates.get("step") if run.gates else None
    full = None
    window = None
    if run.allocation:
        full = run.allocation.full
        window = run.allocation.window
    elif run.config:
        window = run.config.attention.window
    finished = not run.learning or (run.folder / run_folder.ALLOCATION).is_file()
    origin = "Allocation" if finished else "Top-k now"
    return gate_plots.allocation_maps(probability, step, full, origin, window)


def _unit_evidence(run: Run) -> Drawing | None:
    """Draws each unit's score with its error, if the run's gates have them."""
    if run.gates is None or "standard_error" not in run.gates:
        return None
    full = run.allocation.full if run.allocation else None
    return gate_plots.unit_evidence(run.gates["mean_gradient"], run.gates["standard_error"], full)
