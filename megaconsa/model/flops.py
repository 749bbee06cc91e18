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
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    linear = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * model.intermediate_size
    norms = 2 * hidden + 2 * model.head_dim
    embedding = model.vocab_size * hidden
    return ParameterCount(
        total=model.num_hidden_layers * (linear + norms) + hidden + embedding * (1 if model.tie_word_embeddings else 2),
        embedding=embedding,
        matmul=model.num_hidden_layers * linear + embedding,
    )


def visible_pairs(length: int, window: int) -> int:
    """(query, key) pairs of one causal head in one document of `length` tokens; a window of `length` or more is full."""
    window = min(window, length)
    return window * length - window * (window - 1) // 2


def attention_pairs(lengths: Lengths, window: int) -> int:
    """Sum of `visible_pairs` over documents of these lengths."""
    tokens = np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths), dtype=np.int64)
    seen = np.minimum(tokens, window)
    return int((seen * tokens - seen * (seen - 1) // 2).sum())


def training_flops(model: ModelConfig, allocation: Allocation | None, token_count: int, lengths: Lengths) -> int:
    """FLOPs of one forward and backward pass over `token_count` tokens in documents of `lengths`.

    Each weight of a matrix product costs 2 forward and 4 backward per token. A (query, key) pair costs a query head 2 * head_dim
    for Q K^T and as much for P V, and twice that backward. Recomputation is not counted: it is the implementation's cost, not the
    model's. allocation: None counts every head as full, which is also how a learning step is counted.
    """
    per_pair = 12 * model.head_dim * model.queries_per_kv_head
    return 6 * parameter_count(model).matmul * token_count + per_pair * _pairs_of_kv_heads(model, allocation, lengths)


def _pairs_of_kv_heads(model: ModelConfig, allocation: Allocation | None, lengths: Lengths) -> int:
    """Visible pairs summed over all KV heads of all layers."""
    tokens = lengths if isinstance(lengths, np.ndarray) else np.array(list(lengths), dtype=np.int64)
    full, windowed = _head_counts(model, allocation)
    pairs = full * attention_pairs(tokens, FULL_WINDOW)
    return pairs + windowed * attention_pairs(tokens, allocation.window) if allocation and windowed else pairs


def _head_counts(model: ModelConfig, allocation: Allocation | None) -> tuple[int, int]:
    """Numbers of full and of windowed KV heads in the whole model."""
    heads = model.num_hidden_layers * model.num_key_value_heads
    full = sum(map(sum, allocation.full)) if allocation else heads
    return full, heads - full


def kv_cache_bytes(model: ModelConfig, allocation: Allocation | None, context: int, bytes_per_value: int = 2) -> int:
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
_SLOWER_CARDS = {("h100", "pcie"): 756e12, ("h800", "pcie"): 756e12, ("h100", "nvl"): 835e12, ("h200", "nvl"): 835e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of one device, by its name ("NVIDIA H100 80GB HBM3", "h100"); None where it is not known."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if "mig" in words:  # a slice of a GPU has a fraction of the peak that its name does not tell
        return None
    chip = next((word for word in words if word in _PEAKS), None)
    if chip is None:
        return None
    return next((peak for (name, card), peak in _SLOWER_CARDS.items() if name == chip and card in words), _PEAKS[chip])
