"""What a model costs: parameters, training FLOPs, KV cache. Arithmetic on shapes alone; docs/flops.md says what is counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaconsa.consa.allocation import FULL_WINDOW, Allocation
from megaconsa.model.config import ModelConfig

Lengths = Iterable[int] | NDArray[np.integer]
"""Token counts of the documents whose tokens see each other: whole sequences where documents are not separated."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights; gates (one per unit) are left out."""

    total: int
    """Every weight, a tied embedding once."""
    embedding: int
    """The token embedding alone, which is also the output head where the two are tied."""
    matmul: int
    """Weights that multiply each token: the linear layers and the output head, tied or not, but neither lookups nor norms."""


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Counts the weights of a Qwen3 model: q, k, v, o, gate, up, down, two norms and the norms of q and k in each layer."""
    linear, norms = block_parameters(model)
    embedding = model.vocab_size * model.hidden_size
    return ParameterCount(
        total=model.num_hidden_layers * (linear + norms)
        + model.hidden_size
        + embedding * (1 if model.tie_word_embeddings else 2),
        embedding=embedding,
        matmul=model.num_hidden_layers * linear + embedding,
    )


def block_parameters(model: ModelConfig) -> tuple[int, int]:
    """Numbers of weights in one layer: of its matrices, and of its norms."""
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    return (
        2 * hidden * queries + 2 * hidden * keys + 3 * hidden * model.intermediate_size,
        2 * hidden + 2 * model.head_dim,
    )


def visible_pairs(length: int, window: int) -> int:
    """(query, key) pairs of one causal head in one document of `length` tokens; a window of `length` or more is full."""
    window = min(window, length)
    return window * length - window * (window - 1) // 2


def attention_pairs(lengths: Lengths, window: int) -> int:
    """Sum of `visible_pairs` over documents of these lengths."""
    tokens = np.asarray(
        lengths if isinstance(lengths, np.ndarray) else list(lengths), dtype=np.int64
    )
    seen = np.minimum(tokens, window)
    return int((seen * tokens - seen * (seen - 1) // 2).sum())


def training_flops(
    model: ModelConfig, allocation: Allocation | None, token_count: int, lengths: Lengths
) -> int:
    """FLOPs of one forward and backward pass over `token_count` tokens in documents of `lengths`.

    The backward pass costs twice the forward one (`forward_flops`). Recomputation is not counted: it is the implementation's cost,
    not the model's. allocation: None counts every head as full, which is also how a learning step is counted.
    """
    return 3 * sum(forward_flops(model, allocation, token_count, lengths))


def forward_flops(
    model: ModelConfig, allocation: Allocation | None, token_count: int, lengths: Lengths
) -> list[int]:
    """FLOPs of one forward pass through each block, and last through the output head; arguments as of `training_flops`.

    Each weight of a matrix product costs 2 per token.
    """
    tokens = lengths if isinstance(lengths, np.ndarray) else np.array(list(lengths), dtype=np.int64)
    full = kv_head_flops(model, FULL_WINDOW, tokens)
    windowed = kv_head_flops(model, allocation.window, tokens) if allocation else 0
    linear, _ = block_parameters(model)
    full_heads = (
        [sum(row) for row in allocation.full]
        if allocation
        else [model.num_key_value_heads] * model.num_hidden_layers
    )
    blocks = [
        2 * linear * token_count + count * full + (model.num_key_value_heads - count) * windowed
        for count in full_heads
    ]
    return [*blocks, 2 * model.vocab_size * model.hidden_size * token_count]


def kv_head_flops(model: ModelConfig, window: int, lengths: Lengths) -> int:
    """FLOPs of one KV head's attention forward: each (query, key) pair costs a query head 2 * head_dim for Q K^T, as much for P V."""
    return 4 * model.head_dim * model.queries_per_kv_head * attention_pairs(lengths, window)


def _head_counts(model: ModelConfig, allocation: Allocation | None) -> tuple[int, int]:
    """Numbers of full and of windowed KV heads in the whole model."""
    heads = model.num_hidden_layers * model.num_key_value_heads
    full = sum(map(sum, allocation.full)) if allocation else heads
    return full, heads - full


def kv_cache_bytes(
    model: ModelConfig, allocation: Allocation | None, context: int, bytes_per_value: int = 2
) -> int:
    """Bytes of keys and values that one sequence holds after `context` tokens; allocation: None is full attention everywhere.

    A windowed head holds at most W - 1 tokens: the next token brings its own key, which is the window's W-th. transformers'
    sliding-window cache keeps the same number.
    """
    full, windowed = _head_counts(model, allocation)
    tokens = full * context + (windowed * min(context, allocation.window - 1) if allocation else 0)
    return 2 * model.head_dim * bytes_per_value * tokens


# Dense (not sparse) bf16 FLOP/s from NVIDIA's and AMD's datasheets, by a word of the device's name.
_PEAKS = {
    "a100": 312e12,
    "a800": 312e12,
    "a40": 149.7e12,
    "a6000": 154.8e12,
    "l4": 121e12,
    "l40": 181e12,
    "l40s": 362e12,
    "h20": 148e12,
    "h100": 989e12,
    "h800": 989e12,
    "gh200": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
    "b300": 2250e12,
    "gb200": 2500e12,
    "gb300": 2500e12,
    "mi300x": 1307e12,
    "mi325x": 1307e12,
}
# Cards of the same chip with less power; the plain name means the SXM module.
_SLOWER_CARDS = {
    ("h100", "pcie"): 756e12,
    ("h800", "pcie"): 756e12,
    ("h100", "nvl"): 835e12,
    ("h200", "nvl"): 835e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of one device, by its name ("NVIDIA H100 80GB HBM3", "h100"); None where it is not known."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if "mig" in words:  # a slice of a GPU has a fraction of the peak that its name does not tell
        return None
    chip = next((word for word in words if word in _PEAKS), None)
    if chip is None:
        return None
    return next(
        (peak for (name, card), peak in _SLOWER_CARDS.items() if name == chip and card in words),
        _PEAKS[chip],
    )
