"""Documents of realistic lengths for the packed cases of `bench-attention`."""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor

SIGMA = 1.0
"""Standard deviation of the logarithm of a document's length.

A mean document is 1.65 times as long as a median one.
"""

SHORTEST = 16
"""Fewest tokens of a document, before sequences cut it."""


def document_lengths(batch: int, length: int, median: int) -> list[list[int]]:
    """Draws the tokens of the documents in each sequence. Equal arguments give equal documents.

    median: of the log-normal distribution of lengths, before they are clipped to
        [`SHORTEST`, `length`].

    Where a sequence ends, the rest of a document is a new document of the next sequence.
    """
    random = Random(0)
    sequences: list[list[int]] = []
    rest = 0
    for _ in range(batch):
        documents: list[int] = []
        room = length
        while room > 0:
            if rest == 0:
                drawn = round(random.lognormvariate(math.log(median), SIGMA))
                rest = min(max(drawn, SHORTEST), length)
            taken = min(rest, room)
            documents.append(taken)
            rest -= taken
            room -= taken
        sequences.append(documents)
    return sequences


def document_starts(lengths: list[list[int]]) -> Tensor:
    """Returns the index in its sequence at which each position's document starts.

    lengths: tokens of the documents in each sequence.

    Returns int32 (B, S), non-decreasing in each sequence.
    """
    sequences: list[list[int]] = []
    for documents in lengths:
        starts: list[int] = []
        for length in documents:
            starts += [len(starts)] * length
        sequences.append(starts)
    return torch.tensor(sequences, dtype=torch.int32)


def document_bounds(starts: Tensor) -> Tensor:
    """Returns the first token of each document of the batch, then the number of all tokens.

    starts: int32 (B, S), as `document_starts` returns them.

    Returns int32 (documents + 1,). Sequences follow each other without gaps.
    """
    index = torch.arange(starts.shape[1], device=starts.device)
    first_tokens = (starts == index).flatten().nonzero().flatten()
    return torch.cat((first_tokens, first_tokens.new_tensor([starts.numel()]))).int()
