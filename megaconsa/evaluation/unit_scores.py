"""Scores a checkpoint's units by one of several methods. A learned table has to beat them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.constraint import Constraint, Granularity
from megaconsa.consa.scores import Estimate
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.mixture_file import read_info
from megaconsa.data.stream import BatchStream
from megaconsa.errors import InputError, RunError
from megaconsa.evaluation.frozen_scores import (
    attention_mass,
    gate_gradient,
    leave_one_in,
    leave_one_out,
)
from megaconsa.evaluation.native_model import NativeModel, Sample
from megaconsa.evaluation.score_file import read_scores
from megaconsa.evaluation.trained_gates import GateTraining, train_gates

Method = Literal[
    "leave-one-out",
    "leave-one-in",
    "gradient",
    "attention-mass",
    "calibrate",
    "scalar-gates",
    "file",
]
TRAINED = ("calibrate", "scalar-gates")
"""Methods that take optimizer steps, with a batch each. The others measure given sequences."""


@dataclass(frozen=True)
class ScoreRequest:
    """What the user asks for. The run decides about fields that are None.

    Methods ignore fields that they do not use.
    """

    method: Method
    device: torch.device
    """A GPU needs its index. megaconsa.evaluation.settings.find_device returns such a device."""
    granularity: Granularity = "kv_head"
    window: int | None = None
    data: Path | None = None
    sequences: int = 64
    """How many training sequences units are measured on."""
    batch: int | None = None
    """Sequences per forward pass. None is the run's micro-batch, or 1 for an import."""
    seed: int = 0
    """Determines the order of the training sequences."""
    z: float = 0.5
    """Value of all gates for `gradient`, and the initial value of trained gates."""
    steps: int = 100
    """Optimizer steps of trained gates, with a batch each."""
    learning_rate: float = 0.05
    """Adam's learning rate for the logits of trained gates."""
    weight_learning_rate: float | None = None
    """AdamW's learning rate for the weights that `scalar-gates` trains. None is the run's."""
    scores: Path | None = None
    """The file that the method `file` reads."""


@dataclass(frozen=True)
class UnitScores:
    """Scores (layers, units) fp64 on the CPU, larger for units that should stay full."""

    scores: Tensor
    standard_errors: Tensor | None
    """The same shape as the scores. None if the method has no standard errors."""
    window: int
    granularity: Granularity
    origin: dict[str, Any]
    """Method, checkpoint and sample, for the origin of an allocation."""

    def to_json(self) -> dict[str, Any]:
        """Returns the scores and their origin as plain values for JSON."""
        errors = None
        if self.standard_errors is not None:
            errors = self.standard_errors.tolist()
        return {
            **self.origin,
            "window": self.window,
            "granularity": self.granularity,
            "scores": self.scores.tolist(),
            "standard_errors": errors,
        }


def score_units(checkpoint: Checkpoint, request: ScoreRequest) -> UnitScores:
    """Scores every unit of the checkpoint's model. The checkpoint itself is not changed.

    Only training data is read, so that an allocation made from the scores has not seen validation
    data. Raises InputError if the request cannot work, and RunError if the GPU runs out of memory
    or if scores are not finite.
    """
    model_config = checkpoint.model_config
    # The constraint only says which units exist. It sets no target here.
    units = Constraint(
        num_layers=model_config.num_hidden_layers,
        num_kv_heads=model_config.num_key_value_heads,
        sparsity=0.0,
        granularity=request.granularity,
        scope="global",
    )
    window = request.window or checkpoint.window
    if window is None:
        raise InputError(f"{checkpoint.path} was imported and has no window; give --window")
    origin = {"method": request.method, **checkpoint.origin}
    if request.method == "file":
        if request.scores is None:
            raise InputError("--method file needs --scores FILE")
        origin["scores"] = str(request.scores)
        table = read_scores(request.scores, units)
        return UnitScores(table, None, window, request.granularity, origin)
    _check_z(request)
    sample = _open_sample(checkpoint, request, window)
    training = _gate_training(checkpoint, request)
    if request.device.type == "cuda":
        torch.cuda.set_device(request.device)  # Triton launches its kernels on the current device
    errors = None
    separate_documents = sample.stream.separate_documents
    try:
        with checkpoint.in_use():
            model = NativeModel(checkpoint, units, window, separate_documents, request.device)
        if request.method in TRAINED:
            scores = train_gates(model, sample, training)
        else:
            measured = _measure(model, sample, request)
            scores = measured.scores
            errors = measured.standard_errors
    except torch.OutOfMemoryError:
        batch = sample.stream.micro_batch
        message = f"out of GPU memory with --batch {batch}; choose a smaller one, or a larger GPU"
        raise RunError(f"{checkpoint.path}: {message}") from None
    if not bool(scores.isfinite().all()):
        raise RunError(f"{checkpoint.path}: scores are not finite; score an earlier checkpoint")
    origin["sequences"] = sample.sequences
    origin["seed"] = request.seed
    return UnitScores(scores, errors, window, request.granularity, origin)


def _measure(model: NativeModel, sample: Sample, request: ScoreRequest) -> Estimate:
    """Runs a method that leaves the weights frozen."""
    if request.method == "gradient":
        return gate_gradient(model, sample, request.z)
    if request.method == "leave-one-out":
        return leave_one_out(model, sample)
    if request.method == "leave-one-in":
        return leave_one_in(model, sample)
    return attention_mass(model, sample)


def _check_z(request: ScoreRequest) -> None:
    if not 0 < request.z < 1:
        reason = "a gate at 0 or 1 has no gradient"
        raise InputError(f"--z {request.z:g} must lie between 0 and 1, both excluded: {reason}")


def _open_sample(checkpoint: Checkpoint, request: ScoreRequest, window: int) -> Sample:
    """Opens the training sequences and checks them against the model and the request."""
    data = request.data
    batch = request.batch or 1
    separate_documents = True
    if not checkpoint.imported:
        config = checkpoint.state["config"]
        data = data or Path(config["data"]["path"])
        batch = request.batch or config["training"]["micro_batch"]
        separate_documents = config["attention"]["separate_documents"]
    if data is None:
        raise InputError(f"{checkpoint.path} was imported and has no data; give --data FOLDER")
    _check_data(checkpoint, data, window)
    stream = BatchStream(
        data,
        seed=request.seed,
        global_batch=batch,
        micro_batch=batch,
        separate_documents=separate_documents,
    )
    if request.method in TRAINED:
        return Sample(stream, request.steps, request.device)
    check_sequences(request.sequences, batch, len(stream.shards), data)
    return Sample(stream, request.sequences // batch, request.device)


def _check_data(checkpoint: Checkpoint, data: Path, window: int) -> None:
    """Raises InputError if the model cannot read the data, or if the window hides nothing in it."""
    info = read_info(data)
    model_config = checkpoint.model_config
    length = info.sequence_length
    if info.vocab_size > model_config.vocab_size:
        counts = f"{info.vocab_size} token ids, but the model {model_config.vocab_size}"
        raise InputError(f"data {data} has {counts}; give the data it was trained on")
    fingerprint = checkpoint.state["data"]["tokenizer_fingerprint"]
    # An import without a tokenizer has no fingerprint, so nothing can be compared.
    if fingerprint is not None and not same_tokenizer(fingerprint, info.tokenizer_fingerprint):
        raise InputError(
            f"data {data} has tokenizer fingerprint {info.tokenizer_fingerprint}, but "
            f"{checkpoint.path} was trained with {fingerprint}; give the data it was trained on"
        )
    if length > model_config.max_position_embeddings:
        limit = f"the model has {model_config.max_position_embeddings} positions"
        raise InputError(f"data {data} has sequences of {length} tokens, but {limit}")
    if window >= length:
        where = f"sequences of {length} tokens (data {data})"
        raise InputError(f"--window {window} hides nothing in {where}; choose a smaller one")


def check_sequences(sequences: int, batch: int, available: int, data: Path) -> None:
    """Raises InputError if units cannot be measured on this number of sequences.

    batch: sequences per forward pass.
    available: sequences in the training split of `data`.
    """
    if sequences < 2 * batch:
        least = f"two batches of {batch} are the least"
        raise InputError(f"--sequences {sequences}: too few sequences for evidence; {least}")
    if sequences % batch:
        raise InputError(f"--sequences {sequences} is not a multiple of the batch of {batch}")
    if sequences > available:
        # A second epoch would count the same evidence twice.
        raise InputError(f"--sequences {sequences}: {data} has only {available} for training")


def _gate_training(checkpoint: Checkpoint, request: ScoreRequest) -> GateTraining:
    """Settles how gates are trained. Raises InputError if a learning rate is missing."""
    rate = None
    if request.method == "scalar-gates":
        rate = request.weight_learning_rate
        if rate is None and checkpoint.imported:
            problem = "was imported and has no learning rate"
            raise InputError(f"{checkpoint.path} {problem}; give --weight-learning-rate")
        if rate is None:
            rate = checkpoint.state["config"]["training"]["learning_rate"]
    return GateTraining(request.z, request.learning_rate, rate)
