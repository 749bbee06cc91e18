"""Measures the checkpoint of a trained model: losses on held-out data, and needle retrieval."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.constraint import Constraint
from megaconsa.data.dataset_info import VALIDATION
from megaconsa.data.stream import Batch, BatchStream
from megaconsa.errors import InputError
from megaconsa.evaluation.native_model import NativeModel
from megaconsa.evaluation.record import NeedleCell
from megaconsa.files import parse_json, replace_text
from megaconsa.kernels.cross_entropy.cross_entropy import cross_entropy_
from megaconsa.model.flops import LOGIT_CHUNK_BYTES
from megaconsa.model.loss import IGNORED
from megaconsa.study import fields
from megaconsa.study.native_needles import ScoredModel, needle_cells

FAR_WINDOWS = 2
"""A token is far into its document if there are this many windows before it."""


@dataclass(frozen=True)
class SequenceLosses:
    """Sums over the tokens of each held-out sequence.

    Sequences are in stored order, so that two models can be compared in pairs.
    """

    sums: list[float]
    """Nats of each sequence."""
    tokens: list[int]
    """Tokens of each sequence."""

    @property
    def mean(self) -> float | None:
        """Nats per token, or None if there are no tokens."""
        count = sum(self.tokens)
        return sum(self.sums) / count if count else None


@dataclass(frozen=True)
class Measures:
    """The figures of one trained model."""

    losses: SequenceLosses
    """Losses of all labelled tokens."""
    far_losses: SequenceLosses
    """Losses of the tokens that are FAR_WINDOWS windows or more into their document."""
    needle_accuracy: float | None
    """Share of examples in which greedy decoding gives the number. None if needles are off."""
    needle_margin: float | None
    """Nats by which the number is more likely than if the needle states another number."""
    full: list[list[bool]]
    """The table, (layers, KV heads)."""
    granularity: str
    step: int

    @property
    def sparsity(self) -> float:
        """Share of windowed KV heads."""
        heads = len(self.full) * len(self.full[0])
        return 1 - sum(map(sum, self.full)) / heads

    def save(self, path: Path) -> None:
        replace_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Measures:
        """Reads a file that `save` wrote. Raises InputError for any other file."""
        try:
            content = parse_json(path.read_text())
            content["losses"] = SequenceLosses(**content["losses"])
            content["far_losses"] = SequenceLosses(**content["far_losses"])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"measures {path} cannot be read: {error}; remove the file to measure again",
            ) from None


def measure_checkpoint(
    checkpoint: Checkpoint,
    needles: fields.Needles,
    device: torch.device,
) -> Measures:
    """Measures a training run's checkpoint with its own table, in bf16 on a GPU or fp32 on a CPU.

    Losses are over the whole validation split. Raises InputError if a needle example does not fit.
    """
    config = checkpoint.state["config"]
    allocation = checkpoint.allocation
    assert allocation is not None
    model_config = checkpoint.model_config
    units = Constraint(
        model_config.num_hidden_layers, model_config.num_key_value_heads, 0.0, "kv_head", "global"
    )
    separate = config["attention"]["separate_documents"]
    with checkpoint.in_use():
        model = NativeModel(checkpoint, units, allocation.window, separate, device)
    model.use(torch.tensor(allocation.full))
    losses, far_losses = held_out_losses(
        model,
        open_validation(config),
        FAR_WINDOWS * allocation.window,
    )
    cells: list[NeedleCell] = []
    if needles.count:
        name = str(checkpoint.path)
        batch_tokens = config["training"]["micro_batch"] * config["training"]["sequence_length"]
        cells = needle_cells(
            ScoredModel(model, model_config.vocab_size, name),
            Path(config["data"]["path"]),
            needles,
            batch_tokens,
        )
    return Measures(
        losses=losses,
        far_losses=far_losses,
        needle_accuracy=statistics.mean(cell.exact_match for cell in cells) if cells else None,
        needle_margin=statistics.mean(cell.margin for cell in cells) if cells else None,
        full=[list(row) for row in allocation.full],
        granularity=allocation.granularity,
        step=checkpoint.step,
    )


def open_validation(config: dict[str, Any]) -> BatchStream:
    """Returns the held-out sequences of a run's data, in micro-batches of the run or smaller.

    config: the run's configuration as a dictionary.
    """
    data = Path(config["data"]["path"])
    separate = config["attention"]["separate_documents"]
    single = BatchStream(
        data,
        VALIDATION,
        seed=0,
        global_batch=1,
        micro_batch=1,
        separate_documents=separate,
    )
    batch = min(config["training"]["micro_batch"], len(single.shards))
    return BatchStream(
        data,
        VALIDATION,
        seed=0,
        global_batch=batch,
        micro_batch=batch,
        separate_documents=separate,
    )


@torch.no_grad()
def held_out_losses(
    model: NativeModel,
    stream: BatchStream,
    far: int,
) -> tuple[SequenceLosses, SequenceLosses]:
    """Returns the losses of all labelled tokens, and those of the far tokens.

    far: position in the document from which a prediction counts as far.

    If packing cut a document in two, positions start again at 0 in the second sequence, as they do
    for attention.
    """
    count = len(stream.shards)
    sums: list[Tensor] = []
    tokens: list[Tensor] = []
    for batch in stream.fixed_batches(count):
        on_device = _to(batch, model.device)
        hidden = model.final(model.embed(on_device), on_device)
        losses = token_losses(hidden, model.model.lm_head.weight, on_device.labels).double()
        positions = torch.arange(losses.shape[1], device=model.device) - on_device.documents
        labelled = on_device.labels != IGNORED
        kinds = torch.stack([labelled, labelled & (positions >= far)])  # (2, B, S)
        sums.append((losses * kinds).sum(dim=2).cpu())
        tokens.append(kinds.sum(dim=2).cpu())
    # The last batch may be padded with repeated sequences.
    all_sums = torch.cat(sums, dim=1)[:, :count]
    all_tokens = torch.cat(tokens, dim=1)[:, :count]
    every = SequenceLosses(all_sums[0].tolist(), all_tokens[0].tolist())
    far_ones = SequenceLosses(all_sums[1].tolist(), all_tokens[1].tolist())
    return every, far_ones


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Returns -log p(label) in nats, fp32 (B, S), and 0 where nothing is predicted.

    Logits exist for one chunk of tokens at a time.

    hidden: (B, S, hidden) after the final norm.
    weight: (vocab, hidden).
    labels: (B, S).
    """
    rows = max(1, LOGIT_CHUNK_BYTES // (weight.itemsize * weight.shape[0]))
    hidden_parts = hidden.flatten(0, 1).split(rows)
    label_parts = labels.flatten().split(rows)
    found = []
    for part, label in zip(hidden_parts, label_parts, strict=True):
        found.append(cross_entropy_(part @ weight.T, label, IGNORED, gradient=False))
    return torch.cat(found).view(labels.shape)


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.tokens.to(device),
        batch.labels.to(device),
        batch.documents.to(device),
        batch.sequences.to(device),
    )
