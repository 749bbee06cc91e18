"""Runs an evaluation: all models through all parts.

All inputs are checked first. Then the models are measured one by one, and each part is saved when
it ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaconsa.console import console, progress
from megaconsa.data.mixture_file import read_info, tokenizer_folder
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError, RunError
from megaconsa.evaluation import needle, perplexity
from megaconsa.evaluation.harness import Harness
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.models import Candidate, open_models
from megaconsa.evaluation.needle import Needles
from megaconsa.evaluation.record import FILE, Evaluation, ModelRecord
from megaconsa.evaluation.settings import PARTS, Request, continued, settle
from megaconsa.huggingface.decoding import use_kernels


def evaluate(request: Request) -> Evaluation:
    """Measures whatever `out`/evaluation.json does not hold yet.

    Returns the complete content of the file. Raises InputError, with nothing written, if the
    request cannot work or if `out` holds an evaluation with other settings. Raises RunError if a
    model or a task fails. Earlier results are kept then.
    """
    info = read_info(request.data)
    models = open_models(request.models, request.data, info)
    record = _existing(request.out)
    harness = Harness(request.tasks, request.task_folder) if request.tasks else None
    for model in models:
        if harness and not model.source.has_tokenizer:
            raise InputError(
                f"--task needs a tokenizer, and {model.folder} was exported without one; "
                "export it with --tokenizer"
            )
    held_out = HeldOut(request.data)
    needles = None
    if request.needles:
        tokenizer = Tokenizer.load(tokenizer_folder(request.data))
        needles = Needles(tokenizer, held_out, request.seed)
    settings = settle(request, held_out, models, needles, harness)
    if record is None:
        record = Evaluation(settings=settings)
    else:
        record = continued(record, settings, request.out)
    if request.device.type == "cuda":
        torch.cuda.set_device(request.device)  # Triton launches its kernels on the current device
    for model in models:
        try:
            _measure(model, request, record, held_out, needles, harness)
        except torch.OutOfMemoryError:
            raise RunError(
                f"{model.label}: out of GPU memory; "
                "the same command continues with a smaller --batch-tokens"
            ) from None
    return record


def _existing(out: Path) -> Evaluation | None:
    """Reads the evaluation in `out`, if there is one.

    Raises InputError if `out` holds anything else.
    """
    if (out / FILE).is_file():
        return Evaluation.load(out / FILE)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"out={out} exists and is not an evaluation's folder; choose another or remove it"
        )
    return None


def _measure(
    model: Candidate,
    request: Request,
    record: Evaluation,
    held_out: HeldOut,
    needles: Needles | None,
    harness: Harness | None,
) -> None:
    """Measures the parts that the record lacks, and saves the record after each of them."""
    held = _known(model, request.device, record)
    settings = record.settings

    def finish(part: str, result: Any) -> None:
        setattr(held, part, result)
        record.models[model.label] = held
        _compare(record)
        record.save(request.out / FILE)

    wanted = {
        "perplexity": bool(request.documents),
        "needle": needles is not None,
        "harness": harness is not None,
    }
    missing = [part for part in PARTS if wanted[part] and getattr(held, part) is None]
    for part in PARTS:
        if wanted[part] and part not in missing:
            console.print(f"{model.label}: {part} is there already", markup=False)
    if not missing:
        return
    loaded, tokenizer = model.load(request.device, getattr(torch, request.dtype))
    # The harness comes before use_kernels, because it generates with transformers' own cache.
    if "harness" in missing:
        assert harness is not None
        console.print(f"{model.label}: {', '.join(harness.settings.tasks)}", markup=False)
        finish("harness", harness.measure(loaded, tokenizer, request.batch_tokens))
    if request.device.type == "cuda":
        # transformers' masks of windowed heads would grow with the square of the length.
        use_kernels(loaded)
    if "perplexity" in missing:
        assert settings.perplexity is not None
        length = settings.perplexity.length
        chosen = perplexity.choose_documents(held_out, length, settings.perplexity.documents)
        total = int(np.minimum(held_out.lengths[chosen] - 1, length).sum())
        with progress(f"{model.label}: perplexity", total, "tokens") as task:
            losses = perplexity.measure(
                loaded, held_out, chosen, length, request.batch_tokens, task.advance
            )
            finish("perplexity", losses)
    if "needle" in missing:
        assert settings.needle is not None
        assert needles is not None
        total = len(settings.needle.lengths) * len(settings.needle.depths) * settings.needle.needles
        with progress(f"{model.label}: needles", total, "examples") as task:
            found = needle.measure(
                loaded, needles, settings.needle, request.batch_tokens, task.advance
            )
            finish("needle", found)


def _known(model: Candidate, device: torch.device, record: Evaluation) -> ModelRecord:
    """Returns the record of the model.

    It is a new one, without results, if the record has none or holds another model of that label.
    """
    known = record.models.get(model.label)
    if known is not None and known.digest == model.digest:
        return known
    if known is not None:
        console.print(
            f"{model.label}: not the model that was evaluated before; it is measured again",
            markup=False,
        )
    return ModelRecord(
        folder=str(model.folder),
        digest=model.digest,
        sparsity=model.sparsity,
        window=model.window,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )


def _compare(record: Evaluation) -> None:
    """Compares the loss of each model with that of the first one."""
    first, *others = record.models.items()
    base = first[1].perplexity
    record.differences = {}
    if base is None:
        return
    for label, model in others:
        if model.perplexity is not None:
            record.differences[label] = perplexity.difference(base, model.perplexity)
