"""Methods that score units on frozen weights. Scores are means per token over a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.consa.scores import Estimate, estimate, mass_outside_window
from megaconsa.console import progress
from megaconsa.errors import InputError
from megaconsa.evaluation.native_model import NativeModel, Sample, predicted_tokens


def leave_one_out(model: NativeModel, sample: Sample) -> Estimate:
    """Measures how much the loss rises when one unit alone is windowed in the dense model.

    Scores are in nats per token.
    """
    return _change_each(model, sample, model.table(True), "leave-one-out")


def leave_one_in(model: NativeModel, sample: Sample) -> Estimate:
    """Measures how much the loss falls when one unit alone is full in an all-windowed model.

    Scores are in nats per token.
    """
    rise = _change_each(model, sample, model.table(False), "leave-one-in")
    return Estimate(-rise.scores, rise.standard_errors)


@torch.no_grad()
def _change_each(model: NativeModel, sample: Sample, base: Tensor, name: str) -> Estimate:
    """Measures how much the loss rises when one unit alone differs from the table `base`.

    base: (layers, units) booleans. name: for the progress bar.

    Layers below the changed one are not run again, since their output is that of the base table.
    Losses are compared sequence by sequence, so that what sequences have in common cancels out.
    """
    rises = []
    tokens = []
    with progress(name, sample.batches * base.numel(), "evaluations") as task:
        for batch in sample:
            size = (len(batch.tokens), model.layers, model.units)
            losses = torch.zeros(size, dtype=torch.float64, device=model.device)
            x = model.embed(batch)
            for layer in range(model.layers):
                for unit in range(model.units):
                    changed = base.clone()
                    changed[layer, unit] = ~base[layer, unit]
                    model.use(changed)
                    losses[:, layer, unit] = model.sequence_losses(x, batch, layer)
                    task.advance()
                model.use(base)
                x = model.block(layer, x, batch)
            base_losses = model.sequence_losses(x, batch, model.layers)
            rises.append(losses - base_losses[:, None, None])
            tokens.append(predicted_tokens(batch))
    return _estimate(rises, tokens)


def gate_gradient(model: NativeModel, sample: Sample, z: float) -> Estimate:
    """Computes minus the gradient of the loss with respect to each gate, with all gates at `z`.

    This is the fall of the loss per unit of z, in nats per token. Each sequence has its own gates,
    so one backward pass gives the gradient of each sequence.
    """
    falls = []
    tokens = []
    with progress("gradient", sample.sequences, "sequences") as task:
        for batch in sample:
            size = (len(batch.tokens), model.layers, model.units)
            gates = torch.full(size, z, device=model.device, requires_grad=True)
            model.use(gates)
            (gradient,) = torch.autograd.grad(model.mean_loss(batch), gates)
            predicted = predicted_tokens(batch)
            # The loss is a mean over the batch's tokens. The estimate needs each sequence's sum.
            falls.append(-gradient.double() * predicted.sum())
            tokens.append(predicted)
            task.advance(len(batch.tokens))
    return _estimate(falls, tokens)


@torch.no_grad()
def attention_mass(model: NativeModel, sample: Sample) -> Estimate:
    """Measures the attention probability of the dense model on keys outside the window.

    It is the mean over a unit's query heads and over the queries that have such keys. Raises
    InputError if no document of the sample is longer than the window.
    """
    window = model.selector.window
    model.use(model.table(True))
    masses = []
    queries = []
    with progress("attention-mass", sample.sequences, "sequences") as task:
        for batch in sample:
            x = model.embed(batch)
            layers = []
            for layer in range(model.layers):
                q, k = model.queries_and_keys(layer, x, batch)
                sums, counts = mass_outside_window(q, k, batch.documents, window)
                layers.append(sums.unflatten(1, (model.units, -1)).mean(dim=2))
                x = model.block(layer, x, batch)
            masses.append(torch.stack(layers, dim=1))
            queries.append(counts)
            task.advance(len(batch.tokens))
    if not any(bool(counts.any()) for counts in queries):
        raise InputError(
            f"no document of the {sample.sequences} sequences is longer than --window {window}: "
            "nothing is outside the window; use longer documents or a smaller window"
        )
    return _estimate(masses, queries)


def _estimate(sums: list[Tensor], counts: list[Tensor]) -> Estimate:
    """Estimates means from the batches.

    sums: (B, layers, units) of each batch. counts: (B,) of each batch.
    """
    return estimate(torch.cat(sums).cpu(), torch.cat(counts).cpu())
