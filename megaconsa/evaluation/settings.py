"""What is to be measured: a request, settled against the data, the models and what has been measured before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaconsa.errors import InputError
from megaconsa.evaluation.harness import Harness
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.models import Candidate
from megaconsa.evaluation.needle import Needles
from megaconsa.evaluation.record import (
    DataSettings,
    Evaluation,
    NeedleSettings,
    PerplexitySettings,
    Settings,
)

PARTS = ("perplexity", "needle", "harness")


@dataclass(frozen=True)
class Request:
    """What is asked for; None where the data and the models decide."""

    models: Sequence[str]
    data: Path
    out: Path
    length: int | None
    documents: int
    """0 leaves perplexity out."""
    needle_lengths: Sequence[int]
    """Empty: an eighth, a quarter, half and all of the data's sequence length."""
    depths: Sequence[float]
    needles: int
    """0 leaves needles out."""
    seed: int
    tasks: Sequence[str]
    task_folder: Path | None
    device: torch.device
    dtype: str
    batch_tokens: int


def find_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is unknown; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name} is not there: this machine has {torch.cuda.device_count()} CUDA GPUs"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def settle(
    request: Request,
    held_out: HeldOut,
    models: list[Candidate],
    needles: Needles | None,
    harness: Harness | None,
) -> Settings:
    """The request with what data and models decide; InputError where it asks for more than they have."""
    info = held_out.info
    settings = Settings(
        data=DataSettings(
            folder=str(request.data),
            digest=hashlib.sha256(info.model_dump_json().encode()).hexdigest()[:16],
        ),
        dtype=request.dtype,
        perplexity=_perplexity_settings(request, held_out, models) if request.documents else None,
        needle=_needle_settings(request, needles, models) if needles else None,
        harness=harness.settings if harness else None,
    )
    if not any(getattr(settings, part) for part in PARTS):
        raise InputError("--documents 0 and --needles 0 without --task leave nothing to evaluate")
    return settings


def continued(record: Evaluation, settings: Settings, out: Path) -> Evaluation:
    """The record with parts that are new to it; InputError where it was made with other settings."""
    old, new = record.settings.model_dump(), settings.model_dump()
    for section in ("data", *PARTS):
        if old[section] is None or new[section] is None:
            continue
        for name, value in new[section].items():
            if value != old[section][name] and (section, name) != ("data", "folder"):
                raise _other(out, f"{section}.{name}", old[section][name], value)
    if old["dtype"] != new["dtype"]:
        raise _other(out, "dtype", old["dtype"], new["dtype"])
    for part in PARTS:
        if new[part] is not None:
            setattr(record.settings, part, getattr(settings, part))
    return record


def _other(out: Path, name: str, old: Any, new: Any) -> InputError:
    return InputError(
        f"{out} holds an evaluation with {name} {old}, not {new}; choose another --out, or remove it"
    )


def _perplexity_settings(
    request: Request, held_out: HeldOut, models: list[Candidate]
) -> PerplexitySettings:
    longest = int(held_out.lengths.max()) - 1
    length = request.length or min(
        held_out.info.sequence_length, longest, *(model.max_positions for model in models)
    )
    if length > longest:
        raise InputError(
            f"--length {length} is more than the longest held-out document has: {longest} tokens to predict"
        )
    _check_positions("--length", length, models)
    return PerplexitySettings(length=length, documents=request.documents)


def _needle_settings(request: Request, needles: Needles, models: list[Candidate]) -> NeedleSettings:
    limit = min(
        needles.held_out.info.sequence_length,
        needles.held_out.text_tokens,
        *(model.max_positions for model in models),
    )
    lengths = sorted(set(request.needle_lengths)) or needles.default_lengths(limit)
    if not lengths:
        raise InputError(
            f"{limit} tokens are too few for needle, question and as much text ({2 * needles.shortest}); "
            "give --needle-length, or --needles 0 to leave them out"
        )
    needles.check_lengths(lengths)
    _check_positions("--needle-length", lengths[-1], models)
    return NeedleSettings(
        lengths=lengths,
        depths=sorted(set(request.depths)),
        needles=request.needles,
        seed=request.seed,
    )


def _check_positions(option: str, length: int, models: list[Candidate]) -> None:
    for model in models:
        if length > model.max_positions:
            raise InputError(
                f"{option} {length} is more than {model.folder} has positions: max_position_embeddings={model.max_positions}"
            )
