"""One self-contained HTML page about a run, or about a folder of runs that belong together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from megaconsa import config as configuration
from megaconsa import run_folder
from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation
from megaconsa.console import check_out
from megaconsa.errors import InputError
from megaconsa.files import parse_json, replace_text
from megaconsa.model.flops import kv_cache_bytes, training_flops
from megaconsa.planning.assumptions import planned_allocation
from megaconsa.reporting import gate_plots, training_plots
from megaconsa.reporting.metrics import Row, last, read_metrics, series
from megaconsa.reporting.plot_style import NARROW, style, to_svg


@dataclass(frozen=True)
class Run:
    """The files of a run folder that the report uses. A file that does not exist is None."""

    folder: Path
    rows: list[Row]
    config: Config | None
    allocation: Allocation | None
    """The finished table, or the table that the current gates would give."""
    gates: dict[str, Any] | None

    @property
    def learning(self) -> bool:
        """Whether the run learns its allocation."""
        if self.config:
            return self.config.learning
        return "expected_sparsity" in self.rows[-1]


@dataclass(frozen=True)
class Fact:
    """One figure at the top of a section."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    title: str
    kind: str
    facts: list[Fact]
    figures: list[tuple[str, Markup]]
    """CSS class and SVG of each. The class is the figure's width, half or narrow."""
    settings: list[tuple[str, str]]
    """Dotted names and values of the configuration."""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the page about a run, or about a folder that holds runs. Returns its path.

    out: the file to write. None is `folder`/report.html.

    Raises InputError if there is nothing to report or the file cannot be written.
    """
    runs = find_runs(folder)
    out = folder / "report.html" if out is None else out
    check_out(out)
    replace_text(out, render(folder.resolve().name, runs))
    return out


def find_runs(folder: Path) -> list[Run]:
    """Returns the run in `folder`, or the runs in its subfolders.

    Runs that learn come first. Otherwise the order is by name.

    Raises InputError if there is no run, or no step has ended in any.
    """
    if not folder.is_dir():
        raise InputError(f"run {folder} does not exist")
    if _is_run(folder):
        folders = [folder]
    else:
        folders = sorted(child for child in folder.iterdir() if _is_run(child))
    if not folders:
        raise InputError(
            f"{folder} is not a run folder: neither it nor a folder in it holds metrics.jsonl"
        )
    runs = [run for run in map(_read_run, folders) if run.rows]
    if not runs:
        raise InputError(f"{folder} has nothing to report yet: no step has ended")
    return sorted(runs, key=lambda run: not run.learning)


def render(title: str, runs: Sequence[Run]) -> str:
    """Returns the page as text."""
    entropy = None
    for run in runs:
        entropy = _unigram_entropy(run)
        if entropy is not None:
            break
    with style():
        together = None
        if len(runs) > 1:
            named = [(run.folder.name, run.rows) for run in runs]
            together = Markup(to_svg(training_plots.losses_together(named, entropy)))
        sections = [_section(run, entropy) for run in runs]
    environment = Environment(
        loader=PackageLoader("megaconsa.reporting", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html").render(
        title=title, sections=sections, together=together
    )


def _is_run(folder: Path) -> bool:
    return (folder / run_folder.METRICS).is_file()


def _read_run(folder: Path) -> Run:
    rows = read_metrics(folder / run_folder.METRICS)
    config = _read_config(folder / run_folder.CONFIG)
    gates = _read_gates(folder / run_folder.GATES)
    return Run(folder, rows, config, _read_allocation(folder, config, gates), gates)


def _read_config(path: Path) -> Config | None:
    return configuration.load(path) if path.is_file() else None


def _read_gates(path: Path) -> dict[str, Any] | None:
    """Raises InputError if the file has no tables of scores and probabilities."""
    if not path.is_file():
        return None
    try:
        gates = parse_json(path.read_text())
        for name in ("scores", "probability_full"):
            torch.tensor(gates[name], dtype=torch.float64).reshape(len(gates[name]), -1)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"gates {path} cannot be read: {error}") from None
    return gates


def _read_allocation(
    folder: Path, config: Config | None, gates: dict[str, Any] | None
) -> Allocation | None:
    """Returns the allocation of a run, or None if its folder does not say which one it is."""
    if (folder / run_folder.ALLOCATION).is_file():
        return Allocation.load(folder / run_folder.ALLOCATION)
    if config is None:
        return None
    if config.learning:
        if gates is None:
            return None
        scores = torch.tensor(gates["scores"], dtype=torch.float64)
        return Allocation.from_scores(scores, config.constraint(), config.attention.window)
    file = config.allocation.file
    if file is not None and not file.is_file():
        # The run folder was moved away from its table.
        return None
    return planned_allocation(config)


def _unigram_entropy(run: Run) -> float | None:
    """Returns nats per token, from the data's dataset.json if it can still be found."""
    places = [run.folder.parent / "data"]
    if run.config:
        places.insert(0, run.config.data.path)
    for place in places:
        try:
            return float(parse_json((place / "dataset.json").read_text())["unigram_entropy"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _section(run: Run, entropy: float | None) -> Section:
    rows = run.rows
    kind = "learns its allocation" if run.learning else "trains on a fixed allocation"
    figures = [_allocation_maps(run)]
    if run.learning:
        figures += [
            gate_plots.layer_history(rows),
            gate_plots.sparsity(rows),
            gate_plots.evidence(rows),
            _unit_evidence(run),
            gate_plots.decided(rows),
            gate_plots.multipliers(rows),
        ]
    figures += [
        training_plots.loss(rows, entropy),
        training_plots.learning_rate(rows),
        training_plots.gradient_norm(rows),
        training_plots.throughput(rows),
    ]
    drawn: list[tuple[str, Markup]] = []
    for figure in figures:
        if figure is not None:
            width = "narrow" if figure.get_figwidth() == NARROW else "half"
            drawn.append((width, Markup(to_svg(figure))))
    settings = _flatten(run.config.to_dict()) if run.config else []
    return Section(run.folder.resolve().name, kind, _facts(run), drawn, settings)


def _allocation_maps(run: Run) -> Figure | None:
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
    origin = "Allocation" if finished else "Top-k of these gates"
    return gate_plots.allocation_maps(probability, step, full, origin, window)


def _unit_evidence(run: Run) -> Figure | None:
    """Draws each unit's score with its error, if the run's gates have them."""
    if run.gates is None or "standard_error" not in run.gates:
        return None
    full = run.allocation.full if run.allocation else None
    return gate_plots.unit_evidence(run.gates["mean_gradient"], run.gates["standard_error"], full)


def _facts(run: Run) -> list[Fact]:
    """Returns the final figures. What the rows do not have is left out."""
    rows = run.rows
    steps = rows[-1]["step"]
    planned = run.config.training.steps if run.config else None
    note = f"of {planned:,}" if planned and planned != steps else ""
    facts = [Fact("steps", f"{steps:,}", note)]
    tokens = last(rows, "tokens")
    if tokens is not None:
        facts.append(_token_fact(tokens))
    loss = last(rows, "loss")
    if loss is not None:
        facts.append(Fact("training loss", f"{loss:.4f}", "last step"))
    validation = last(rows, "validation_loss")
    if validation is not None:
        lowest = series(rows, "validation_loss")[1].min()
        facts.append(Fact("validation loss", f"{validation:.4f}", f"lowest {lowest:.4f}"))
    if run.learning:
        facts += _learning_facts(rows)
    if run.allocation is not None:
        share = f"{run.allocation.sparsity:.1%}"
        facts.append(Fact("windowed heads", share, f"window {run.allocation.window:,}"))
        facts += _savings(run)
    speed = series(rows, "tokens_per_second")[1]
    if len(speed):
        mfu = series(rows, "mfu")[1]
        note = f"MFU {statistics.median(mfu):.1%}" if len(mfu) else ""
        facts.append(Fact("tokens/s, median", f"{statistics.median(speed):,.0f}", note))
    seconds = series(rows, "step_seconds")[1]
    waiting = series(rows, "data_seconds")[1]
    if len(seconds):
        total = float(seconds.sum())
        note = f"{waiting.sum() / total:.1%} for data" if len(waiting) and total > 0 else ""
        facts.append(Fact("time in steps", _duration(total), note))
    memory = series(rows, "memory_gib")[1]
    if len(memory) and memory.max() > 0:
        facts.append(Fact("memory", f"{memory.max():.1f} GiB", "peak of a rank"))
    return facts


def _learning_facts(rows: Sequence[Row]) -> list[Fact]:
    """Returns the final figures of a run that learns its allocation."""
    facts = []
    expected = last(rows, "expected_sparsity")
    if expected is not None:
        target = last(rows, "target_sparsity")
        note = "" if target is None else f"target {target:.3f}"
        facts.append(Fact("expected sparsity", f"{expected:.3f}", note))
    agreement = last(rows, "split_agreement")
    if agreement is not None:
        facts.append(Fact("split agreement", f"{agreement:.2f}", "rank correlation of two halves"))
    separated = last(rows, "separated_share")
    if separated is not None:
        note = "two standard errors from the cut"
        facts.append(Fact("separated units", f"{separated:.0%}", note))
    decided = last(rows, "decided_share")
    if decided is not None:
        facts.append(Fact("decided units", f"{decided:.1%}", "no evidence by itself"))
    return facts


def _savings(run: Run) -> list[Fact]:
    """Returns what the allocation saves over full attention at the training length."""
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
    return [
        Fact("training FLOPs", f"{flops - 1:+.1%}", note),
        Fact("KV cache", f"{cache - 1:+.1%}", note),
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns dotted names and values, spelled like overrides on the command line."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            text = yaml.safe_dump(value, default_flow_style=True)
            # YAML ends a plain scalar with a document end marker.
            text = text.removesuffix("\n...\n").strip()
            found.append((prefix + key, text))
    return found


def _token_fact(tokens: float) -> Fact:
    for factor, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if tokens >= factor:
            return Fact("tokens", f"{tokens / factor:.4g}", name)
    return Fact("tokens", f"{tokens:,.0f}")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60:02} min"
    return f"{rest // 60} min {rest % 60:02} s"
