"""Batches of data as the engine takes them, and statistics of a step's batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megaconsa.data.stream import Batch
from megaconsa.model.loss import IGNORED
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.pipeline import Carry, normalizer


def labelled_tokens(batches: Sequence[Batch], mesh: Mesh) -> int:
    """The number of tokens that count in the loss, summed over all data ranks.

    Every rank gets the number. This is an all-reduce, so all ranks must call it.
    """
    own = 0
    if mesh.counts_data:
        own = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    return mesh.all_reduce_sum(own)


def carries(batches: Sequence[Batch], labelled: int, mesh: Mesh) -> list[Carry]:
    """This rank's micro-batches as the first pipeline stage takes them.

    labelled: labelled tokens of the global batch.
    """
    # A context rank's part of a micro-batch counts as one, because DeepSpeed's mean over data ranks
    # includes context ranks.
    count = normalizer(labelled, len(batches) * mesh.dp_cp_size)
    found = []
    for batch in batches:
        tokens = mesh.cp.own_part(batch.tokens)
        labels = mesh.cp.own_part(batch.labels)
        found.append((tokens, labels, batch.documents, batch.sequences, count))
    return found


def document_lengths(batches: Sequence[Batch]) -> NDArray[np.int64]:
    """Lengths in tokens of all documents in the micro-batches, shape (documents,).

    A sequence whose documents are not separated counts as one document.
    """
    documents = torch.cat([batch.documents for batch in batches]).numpy()
    starts = np.ones(documents.shape, dtype=bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return np.diff(np.append(np.flatnonzero(starts), documents.size))
