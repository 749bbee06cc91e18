"""Loss by position in the document. It shows what windows cost, and at which positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from megaconsa.errors import InputError, RunError
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.record import Difference, Overall, Perplexity
from megaconsa.evaluation.scoring import score

FIRST_BUCKET = 128
"""Positions in the first bucket, or an eighth of the length if that is less."""


def bucket_edges(length: int) -> list[int]:
    """Returns 0, 128, 256, 512 ... up to `length`.

    Each bucket after the first is as long as all before it together, except for the last.
    """
    edge = min(FIRST_BUCKET, max(1, length // 8))
    edges = [0]
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def choose_documents(held_out: HeldOut, length: int, count: int) -> list[int]:
    """Returns the indices of the `count` longest documents, longest first.

    Only long documents have far positions. Documents of more than `length` tokens count as equally
    long and keep their stored order. Raises InputError if no document has two tokens.
    """
    predicted = np.minimum(held_out.lengths - 1, length)
    order = np.argsort(-predicted, kind="stable")[:count]
    chosen = [int(index) for index in order if predicted[index] > 0]
    if not chosen:
        raise InputError(
            "the validation split has no document of two tokens, "
            "prepare the data with a larger --validation-share"
        )
    return chosen


def measure(
    model: Any,
    held_out: HeldOut,
    documents: Sequence[int],
    length: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Evaluates each document by itself, from its beginning.

    The position of a prediction is the index of the token it is made from. Position p sees p + 1
    tokens, or the last W of them in a windowed head.

    documents: indices, longest document first (`choose_documents`).
    length: most predicted tokens of a document. At least one document has that many.
    batch_tokens: tokens of a batch, which holds at least one document.
    advance: is called with the number of predicted tokens.

    Raises RunError if the model's losses are not finite.
    """
    edges = bucket_edges(length)
    tokens = []
    sums = []
    for batch in _batches(held_out, documents, length, batch_tokens):
        rows = pad_sequence([torch.from_numpy(document) for document in batch], batch_first=True)
        likelihoods, _ = score(model, rows)
        for document, row in zip(batch, -likelihoods.double().numpy(), strict=True):
            count = len(document) - 1
            tokens.append(count)
            # Positions from `count` on are padding.
            buckets = [row[begin : min(end, count)] for begin, end in pairwise(edges)]
            sums.append([float(bucket.sum()) for bucket in buckets])
        advance(sum(map(len, batch)) - len(batch))
    if not np.isfinite(sums).all():
        raise RunError(
            f"{model.name_or_path}: losses are not finite; "
            "export an earlier checkpoint, or evaluate with --dtype float32"
        )
    return summarise(edges, tokens, sums)


def _batches(
    held_out: HeldOut, documents: Sequence[int], length: int, batch_tokens: int
) -> Iterator[list[NDArray[np.int64]]]:
    """Groups documents into batches, padding included in their size."""
    batch: list[NDArray[np.int64]] = []
    for index in documents:
        document = held_out.document(index, length + 1)
        if batch and (len(batch) + 1) * (len(batch[0]) - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(document)
    yield batch


def summarise(
    edges: list[int], document_tokens: list[int], document_losses: list[list[float]]
) -> Perplexity:
    """Computes the figures of each bucket.

    document_tokens: predicted tokens of each document. Every bucket must hold a token.
    document_losses: (documents, buckets) sums of losses, in nats.
    """
    losses = np.array(document_losses)
    tokens = _bucket_tokens(edges, document_tokens)
    loss, error = zip(*map(ratio, losses.T, tokens.T), strict=True)
    whole, whole_error = ratio(losses.sum(axis=1), tokens.sum(axis=1))
    return Perplexity(
        edges=edges,
        tokens=tokens.sum(axis=0).tolist(),
        documents=(tokens > 0).sum(axis=0).tolist(),
        loss=list(loss),
        standard_error=list(error),
        perplexity=[math.exp(value) for value in loss],
        overall=Overall(
            tokens=int(tokens.sum()),
            loss=whole,
            standard_error=whole_error,
            perplexity=math.exp(whole),
        ),
        document_tokens=document_tokens,
        document_losses=document_losses,
    )


def difference(base: Perplexity, other: Perplexity) -> Difference:
    """Subtracts the loss of `base` from that of `other`, on the same documents and buckets."""
    tokens = _bucket_tokens(base.edges, base.document_tokens)
    losses = np.array(other.document_losses) - np.array(base.document_losses)
    loss, error = zip(*map(ratio, losses.T, tokens.T), strict=True)
    whole, whole_error = ratio(losses.sum(axis=1), tokens.sum(axis=1))
    return Difference(
        loss=list(loss),
        standard_error=list(error),
        overall_loss=whole,
        overall_standard_error=whole_error,
    )


def ratio(sums: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[float, float | None]:
    """Returns the mean per token and its standard error, which is None for a single document.

    sums: (D,), the sum over the tokens of each document.
    tokens: (D,), the number of tokens of each document.

    Documents are drawn independently. Tokens of a document depend on one another, so documents are
    the sample. The ratio estimator of cluster sampling, m = sum(s) / sum(n), has the variance
    D / (D - 1) * sum((s - m n)^2) / sum(n)^2 (Cochran, Sampling Techniques, 1977, chapter 6).
    """
    measured = tokens > 0
    sums = sums[measured]
    tokens = tokens[measured]
    count = len(tokens)
    total = int(tokens.sum())
    mean = float(sums.sum() / total)
    if count < 2:
        return mean, None
    squares = float(((sums - mean * tokens) ** 2).sum())
    return mean, math.sqrt(count / (count - 1) * squares) / total


def _bucket_tokens(edges: list[int], document_tokens: list[int]) -> NDArray[np.int64]:
    """Returns the predicted tokens by document and bucket, (documents, buckets)."""
    begins = np.array(edges[:-1])
    ends = np.array(edges[1:])
    return np.clip(np.array(document_tokens)[:, None] - begins, 0, ends - begins)
