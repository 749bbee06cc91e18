"""What to measure: a request, and its settings after a look at the data, the models and earlier
results.
"""

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
    """What the user asks for. The data and the models decide about fields that are None."""

    models: Sequence[str]
    data: Path
    out: Path
    length: int | None
    """Predicted tokens per document, for perplexity."""
    documents: int
    """0 skips perplexity."""
    needle_lengths: Sequence[int]
    """In tokens. If empty: an eighth, a quarter, a half and all of the data's sequence length."""
    depths: Sequence[float]
    needles: int
    """Examples per length and depth. 0 skips needles."""
    seed: int
    tasks: Sequence[str]
    task_folder: Path | None
    device: torch.device
    dtype: str
    batch_tokens: int


def find_device(name: str) -> torch.device:
    """Returns the device called `name`. `auto` is the GPU if there is one.

    Raises InputError for an unknown or missing device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is unknown; choose auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise InputError(
            f"--device {name} is not there: this machine has {torch.cuda.device_count()} CUDA GPUs"
        )
    return torch.device("cuda", index)


def settle(
    request: Request,
    held_out: HeldOut,
    models: list[Candidate],
    needles: Needles | None,
    harness: Harness | None,
) -> Settings:
    """Completes the request with what the data and the models decide.

    Raises InputError if the request asks for more than they have.
    """
    digest = hashlib.sha256(held_out.info.model_dump_json().encode()).hexdigest()[:16]
    settings = Settings(
        data=DataSettings(folder=str(request.data), digest=digest),
        dtype=request.dtype,
        perplexity=_perplexity_settings(request, held_out, models) if request.documents else None,
        needle=_needle_settings(request, needles, models) if needles else None,
        harness=harness.settings if harness else None,
    )
    if not any(getattr(settings, part) for part in PARTS):
        raise InputError("--documents 0 and --needles 0 without --task leave nothing to evaluate")
    return settings


def continued(record: Evaluation, settings: Settings, out: Path) -> Evaluation:
    """Adds the settings of new parts to an existing record, and returns the record.

    Raises InputError if the record was made with other settings.
    """
    old = record.settings.model_dump()
    new = settings.model_dump()
    for section in ("data", *PARTS):
        if old[section] is None or new[section] is None:
            continue
        for name, value in new[section].items():
            # The data folder may move: its digest identifies the data.
            if (section, name) == ("data", "folder"):
                continue
            if value != old[section][name]:
                raise _other(out, f"{section}.{name}", old[section][name], value)
    if old["dtype"] != new["dtype"]:
        raise _other(out, "dtype", old["dtype"], new["dtype"])
    for part in PARTS:
        if new[part] is not None:
            setattr(record.settings, part, getattr(settings, part))
    return record


def _other(out: Path, name: str, old: Any, new: Any) -> InputError:
    return InputError(
        f"{out} holds an evaluation with {name} {old}, not {new}; "
        "choose another --out, or remove it"
    )


def _perplexity_settings(
    request: Request, held_out: HeldOut, models: list[Candidate]
) -> PerplexitySettings:
    longest = int(held_out.lengths.max()) - 1
    positions = [model.max_positions for model in models]
    length = request.length or min(held_out.info.sequence_length, longest, *positions)
    if length > longest:
        raise InputError(
            f"--length {length} is more than the longest held-out document has: "
            f"{longest} tokens to predict"
        )
    _check_positions("--length", length, models)
    return PerplexitySettings(length=length, documents=request.documents)


def _needle_settings(request: Request, needles: Needles, models: list[Candidate]) -> NeedleSettings:
    held_out = needles.held_out
    positions = [model.max_positions for model in models]
    limit = min(held_out.info.sequence_length, held_out.text_tokens, *positions)
    lengths = sorted(set(request.needle_lengths)) or needles.default_lengths(limit)
    if not lengths:
        raise InputError(
            f"{limit} tokens are too few for needle, question and as much text "
            f"({2 * needles.shortest}); "
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
    """Raises InputError if a model has fewer positions than `length`."""
    for model in models:
        if length > model.max_positions:
            raise InputError(
                f"{option} {length} is more than {model.folder} has positions: "
                f"max_position_embeddings={model.max_positions}"
            )
