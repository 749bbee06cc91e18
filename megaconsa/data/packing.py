"""Documents into sequences of equal length, and where the documents lie in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that is not predicted (cross_entropy's ignore_index)."""


def pack(
    documents: Iterable[Sequence[int]], sequence_length: int, end_of_text: int
) -> Iterator[np.ndarray]:
    """Joins the documents, each followed by `end_of_text`, and cuts the stream into (S + 1,) int64 arrays.

    Sample k is stream[k*S : k*S + S + 1]: neighbours share one token, so that each token but the stream's first is predicted
    exactly once. The incomplete tail is dropped.
    """
    parts: list[np.ndarray] = []
    held = 0
    for document in documents:
        parts.append(np.append(np.asarray(document, dtype=np.int64), end_of_text))
        held += len(parts[-1])
        if held <= sequence_length:
            continue
        stream = np.concatenate(parts)
        start = 0
        while held - start > sequence_length:
            yield stream[start : start + sequence_length + 1]
            start += sequence_length
        parts, held = [stream[start:]], held - start


def document_starts(tokens: Tensor, end_of_text: int) -> Tensor:
    """(B, S) int32: for each position of `tokens` (B, S) the index in its sequence at which its document begins.

    A document begins at 0 and after each end_of_text token, which itself belongs to the document it ends. The values do not
    decrease along a sequence, so they serve as document ids; positions within the document are arange(S) - starts.
    """
    positions = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == end_of_text
    return torch.where(begins, positions, 0).cummax(dim=1).values.to(torch.int32)


def mask_labels(tokens: Tensor, end_of_text: int, separate_documents: bool) -> Tensor:
    """(B, S) int64 labels of `tokens` (B, S + 1): the next token.

    Where documents are separate, an end_of_text input predicts nothing (-100): what follows is another document's first token.
    """
    labels = tokens[:, 1:].to(torch.int64, copy=True)
    if separate_documents:
        labels[tokens[:, :-1] == end_of_text] = IGNORED
    return labels
