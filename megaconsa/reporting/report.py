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
from megaconsa.planning.plan import planned_allocation
from megaconsa.reporting import plots
from megaconsa.reporting.metrics import Row, last, read_metrics, series


@dataclass(frozen=True)
class Run:
    """What a run folder holds for the report; a file that is not there is None."""

    folder: Path
    rows: list[Row]
    config: Config | None
    allocation: Allocation | None
    """The finished table, or the one that the present gates would give."""
    gates: dict[str, Any] | None

    @property
    def learning(self) -> bool:
        return self.config.learning if self.config else "expected_sparsity" in self.rows[-1]


@dataclass(frozen=True)
class Fact:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    kind: str
    facts: list[Fact]
    figures: list[tuple[str, Markup]]
    """CSS class (half or narrow, the figure's width) and SVG."""
    settings: list[tuple[str, str]]


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the page about a run or a folder that holds runs, and returns its path; out: None is `folder`/report.html."""
    runs = find_runs(folder)
    out = folder / "report.html" if out is None else out
    check_out(out)
    replace_text(out, render(folder.resolve().name, runs))
    return out


def find_runs(folder: Path) -> list[Run]:
    """The run in `folder`, or the runs in its subfolders, those that learn first and then by name."""
    if not folder.is_dir():
        raise InputError(f"run {folder} does not exist")
    folders = (
        [folder]
        if _is_run(folder)
        else sorted(child for child in folder.iterdir() if _is_run(child))
    )
    if not folders:
        raise InputError(
            f"{folder} is not a run folder: neither it nor a folder in it holds metrics.jsonl"
        )
    runs = [run for run in map(_read_run, folders) if run.rows]
    if not runs:
        raise InputError(f"{folder} has nothing to report yet: no step has ended")
    return sorted(runs, key=lambda run: not run.learning)


def render(title: str, runs: Sequence[Run]) -> str:
    """The page as text."""
    entropy = next((value for value in map(_unigram_entropy, runs) if value is not None), None)
    with plots.style():
        together = None
        if len(runs) > 1:
            named = [(run.folder.name, run.rows) for run in runs]
            together = Markup(plots.to_svg(plots.losses_together(named, entropy)))
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
    if (folder / run_folder.ALLOCATION).is_file():
        return Allocation.load(folder / run_folder.ALLOCATION)
    if config is None:
        return None
    wanted = config.allocation
    if config.learning:
        if gates is None:
            return None
        scores = torch.tensor(gates["scores"], dtype=torch.float64)
        return Allocation.from_scores(scores, config.constraint(), config.attention.window)
    if (
        wanted.file is not None and not wanted.file.is_file()
    ):  # a run folder that was moved away from its table
        return None
    return planned_allocation(config)


def _unigram_entropy(run: Run) -> float | None:
    """Nats a token, from the data's dataset.json where it can still be found."""
    places = [run.folder.parent / "data", *([run.config.data.path] if run.config else [])]
    for place in reversed(places):
        try:
            return float(parse_json((place / "dataset.json").read_text())["unigram_entropy"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _section(run: Run, entropy: float | None) -> Section:
    rows = run.rows
    kind = "learns its allocation" if run.learning else "trains on a fixed allocation"
    figures: list[Figure | None] = []
    probability = run.gates["probability_full"] if run.gates else None
    if probability is not None or run.allocation is not None:
        full = run.allocation.full if run.allocation else None
        window = (
            run.allocation.window
            if run.allocation
            else run.config.attention.window
            if run.config
            else None
        )
        step = run.gates.get("step") if run.gates else None
        finished = not run.learning or (run.folder / run_folder.ALLOCATION).is_file()
        origin = "Allocation" if finished else "Top-k of these gates"
        figures.append(plots.allocation_maps(probability, step, full, origin, window))
    if run.learning:
        figures += [plots.layer_history(rows), plots.sparsity(rows)]
        figures += [
            plots.evidence(rows),
            _unit_evidence(run),
            plots.decided(rows),
            plots.multipliers(rows),
        ]
    figures += [
        plots.loss(rows, entropy),
        plots.learning_rate(rows),
        plots.gradient_norm(rows),
        plots.throughput(rows),
    ]
    drawn = [
        (
            "narrow" if figure.get_figwidth() == plots.NARROW else "half",
            Markup(plots.to_svg(figure)),
        )
        for figure in figures
        if figure is not None
    ]
    settings = _flatten(run.config.to_dict()) if run.config else []
    return Section(run.folder.resolve().name, kind, _facts(run), drawn, settings)


def _unit_evidence(run: Run) -> Figure | None:
    """Each unit's score with its error, where the run's gates hold them."""
    if run.gates is None or "standard_error" not in run.gates:
        return None
    full = run.allocation.full if run.allocation else None
    return plots.unit_evidence(run.gates["mean_gradient"], run.gates["standard_error"], full)


def _facts(run: Run) -> list[Fact]:
    """End figures; what the rows do not hold is left out."""
    rows = run.rows
    steps = rows[-1]["step"]
    planned = run.config.training.steps if run.config else None
    facts = [Fact("steps", f"{steps:,}", f"of {planned:,}" if planned and planned != steps else "")]
    if (tokens := last(rows, "tokens")) is not None:
        facts.append(_token_fact(tokens))
    if (loss := last(rows, "loss")) is not None:
        facts.append(Fact("training loss", f"{loss:.4f}", "last step"))
    if (validation := last(rows, "validation_loss")) is not None:
        facts.append(
            Fact(
                "validation loss",
                f"{validation:.4f}",
                f"lowest {series(rows, 'validation_loss')[1].min():.4f}",
            )
        )
    if run.learning:
        facts += _learning_facts(rows)
    if run.allocation is not None:
        facts.append(
            Fact(
                "windowed heads",
                f"{run.allocation.sparsity:.1%}",
                f"window {run.allocation.window:,}",
            )
        )
        facts += _savings(run)
    speed = series(rows, "tokens_per_second")[1]
    if len(speed):
        mfu = series(rows, "mfu")[1]
        note = f"MFU {statistics.median(mfu):.1%}" if len(mfu) else ""
        facts.append(Fact("tokens/s, median", f"{statistics.median(speed):,.0f}", note))
    seconds, waiting = series(rows, "step_seconds")[1], series(rows, "data_seconds")[1]
    if len(seconds):
        share = (
            f"{waiting.sum() / seconds.sum():.1%} for data"
            if len(waiting) and seconds.sum() > 0
            else ""
        )
        facts.append(Fact("time in steps", _duration(float(seconds.sum())), share))
    memory = series(rows, "memory_gib")[1]
    if len(memory) and memory.max() > 0:
        facts.append(Fact("memory", f"{memory.max():.1f} GiB", "peak of a rank"))
    return facts


def _learning_facts(rows: Sequence[Row]) -> list[Fact]:
    facts = []
    if (expected := last(rows, "expected_sparsity")) is not None:
        target = last(rows, "target_sparsity")
        facts.append(
            Fact(
                "expected sparsity",
                f"{expected:.3f}",
                "" if target is None else f"target {target:.3f}",
            )
        )
    if (agreement := last(rows, "split_agreement")) is not None:
        facts.append(Fact("split agreement", f"{agreement:.2f}", "rank correlation of two halves"))
    if (share := last(rows, "separated_share")) is not None:
        facts.append(Fact("separated units", f"{share:.0%}", "two standard errors from the cut"))
    if (share := last(rows, "decided_share")) is not None:
        facts.append(Fact("decided units", f"{share:.1%}", "no evidence by itself"))
    return facts


def _savings(run: Run) -> list[Fact]:
    """What the allocation saves against full attention at the training length."""
    if run.config is None or run.allocation is None:
        return []
    model, length = run.config.shape(), run.config.training.sequence_length
    flops = training_flops(model, run.allocation, length, [length]) / training_flops(
        model, None, length, [length]
    )
    cache = kv_cache_bytes(model, run.allocation, length) / kv_cache_bytes(model, None, length)
    note = f"at {length:,} tokens"
    return [
        Fact("training FLOPs", f"{flops - 1:+.1%}", note),
        Fact("KV cache", f"{cache - 1:+.1%}", note),
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values, as overrides on the command line spell them."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            found.append(
                (
                    prefix + key,
                    yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip(),
                )
            )
    return found


def _token_fact(tokens: float) -> Fact:
    for factor, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if tokens >= factor:
            return Fact("tokens", f"{tokens / factor:.4g}", name)
    return Fact("tokens", f"{tokens:,.0f}")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"
