"""The samples of a run, as the report shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megaconsa import run_folder
from megaconsa.errors import InputError
from megaconsa.reporting.metrics import read_metrics


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation at a step."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Samples:
    """What the report shows of a run: the newest samples, and those of all steps before."""

    newest: list[Sample]
    earlier: list[Sample]


def read_samples(run: Path) -> Samples:
    """Reads samples.jsonl, newest step first. Without that file, there are none.

    Raises InputError if the file cannot be read.
    """
    file = run / run_folder.SAMPLES
    rows = read_metrics(file) if file.is_file() else []
    found: list[Sample] = []
    try:
        for row in reversed(rows):
            for sample in row["samples"]:
                found.append(Sample(row["step"], sample["prompt"], sample["text"]))
    except (KeyError, TypeError):
        raise InputError(f"samples {file} cannot be read: a row lacks a prompt or text") from None
    last = found[0].step if found else None
    newest = [sample for sample in found if sample.step == last]
    return Samples(newest, found[len(newest) :])
