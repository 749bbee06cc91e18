"""From the data's batches to what the engine takes, and what a step of them holds."""

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
    """Tokens that count in the loss, over all data ranks; known on every rank."""
    own = sum(int((batch.labels != IGNORED).sum()) for batch in batches) if mesh.counts_data else 0
    return int(mesh.sum(torch.tensor(own, device=mesh.device)))


def carries(batches: Sequence[Batch], labelled: int, mesh: Mesh) -> list[Carry]:
    """This rank's micro-batches as the pipeline's first stage takes them."""
    count = normalizer(labelled, len(batches) * mesh.data_ranks)
    return [
        (batch.tokens, batch.labels, batch.documents, batch.sequences, count) for batch in batches
    ]


def document_lengths(batches: Sequence[Batch]) -> NDArray[np.int64]:
    """Lengths of all documents of the micro-batches; a sequence that is not separated is one document."""
    documents = torch.cat([batch.documents for batch in batches]).numpy()
    starts = np.ones(documents.shape, dtype=bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return np.diff(np.append(np.flatnonzero(starts), documents.size))
