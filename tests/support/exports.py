"""Tiny exports with the tokenizer of `small_data`.

All have the same random weights, under different allocations.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.huggingface.export import export
from megaconsa.model.config import ModelConfig
from tests.support.transformers_reference import HEAD_WISE, LAYER_WISE, MODEL, random_weights

VOCABULARY = 512  # that of small_data
POSITIONS = 160  # the smallest number that all tests need
WINDOW = 8  # of every windowed head
SHAPE = replace(MODEL, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
ALLOCATIONS = {
    "dense": replace(HEAD_WISE, full=((True,) * 4,) * 4),
    "layers": LAYER_WISE,
    "heads": HEAD_WISE,
}


def make_export(
    out: Path,
    allocation: Allocation,
    tokenizer: Path | None,
    model_config: ModelConfig = SHAPE,
    dtype: torch.dtype = torch.float32,
) -> Path:
    export(
        random_weights(model_config),
        model_config,
        allocation,
        out,
        tokenizer=tokenizer,
        dtype=dtype,
        origin=None,
    )
    return out


def one_layer(full: bool, window: int = WINDOW) -> tuple[Allocation, ModelConfig]:
    """A model with one layer whose heads are all full or all windowed.

    If they are windowed, tokens further back than the window cannot influence the output in any
    way.
    """
    return Allocation(window, ((full,) * 4,)), replace(SHAPE, num_hidden_layers=1)
