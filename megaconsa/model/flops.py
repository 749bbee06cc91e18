"""The cost of a model: parameters, training FLOPs and KV cache.

This is arithmetic on shapes alone. docs/flops.md says what is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaconsa.consa.allocation import FULL_WINDOW, Allocation
from megaconsa.model.config import ModelConfig

LOGIT_CHUNK_BYTES = 2**29
"""Bytes of logits in memory at a time. Large enough for efficient matrix products."""

Lengths = Iterable[int] | NDArray[np.integer]
"""Token counts of the documents. Tokens see each other within a document only.

Where documents are not separated, these are the lengths of whole sequences.
"""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights. Gates (one per unit) are not counted."""

    total: int
    """Every weight. A tied embedding counts once."""
    embedding: int
    """The token embedding alone. It is also the output head where the two are tied."""
    matmul: int
    """Weights that multiply each token: the linear layers and the output head, tied or not.

    Lookups and norms are not counted.
    """


def parameter_count(model_config: ModelConfig) -> ParameterCount:
    """Counts the weights of a Qwen3 model.

    Each layer has q, k, v, o, gate, up, down, two norms, and the norms of q and k.
    """
    linear, norms = block_parameters(model_config)
    blocks = model_config.num_hidden_layers * (linear + norms)
    final_norm = model_config.hidden_size
    embedding = model_config.vocab_size * model_config.hidden_size
    embeddings = embedding if model_config.tie_word_embeddings else 2 * embedding
    return ParameterCount(
        total=blocks + final_norm + embeddings,
        embedding=embedding,
        # The output head has the same size as the embedding.
        matmul=model_config.num_hidden_layers * linear + embedding,
    )


def block_parameters(model_config: ModelConfig) -> tuple[int, int]:
    """Numbers of weights in the matrices and in the norms of one layer."""
    hidden = model_config.hidden_size
    queries = model_config.num_attention_heads * model_config.head_dim
    keys = model_config.num_key_value_heads * model_config.head_dim
    # q and o, k and v, then gate, up and down.
    linear = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * model_config.intermediate_size
    # The two norms of the layer, then those of q and k.
    norms = 2 * hidden + 2 * model_config.head_dim
    return linear, norms


def visible_pairs(length: int, window: int) -> int:
    """(query, key) pairs that one causal head sees in one document.

    length: tokens of the document.
    window: keys that a query sees, its own included. A window of `length` or more is full.
    """
    window = min(window, length)
    # Query i sees min(i, window) keys, counted from 1.
    return window * length - window * (window - 1) // 2


def attention_pairs(lengths: Lengths, window: int) -> int:
    """Sum of `visible_pairs` over documents of these lengths."""
    tokens = _token_counts(lengths)
    seen = np.minimum(tokens, window)
    return int((seen * tokens - seen * (seen - 1) // 2).sum())


def _token_counts(lengths: Lengths) -> NDArray[np.int64]:
    if isinstance(lengths, np.ndarray):
        return np.asarray(lengths, dtype=np.int64)
    return np.array(list(lengths), dtype=np.int64)


def training_flops(
    model_config: ModelConfig, allocation: Allocation | None, token_count: int, lengths: Lengths
) -> int:
    """FLOPs of one forward and backward pass.

    allocation: None counts every head as full. Learning steps are counted this way too.
    token_count: tokens that the pass runs over.
    lengths: token counts of the documents that these tokens form.

    The backward pass costs twice the forward pass (`forward_flops`). Recomputation is not counted,
    because it is a cost of the implementation and not of the model.
    """
    return 3 * sum(forward_flops(model_config, allocation, token_count, lengths))


def forward_flops(
    model_config: ModelConfig, allocation: Allocation | None, token_count: int, lengths: Lengths
) -> list[int]:
    """FLOPs of one forward pass through each block. The last entry is the output head.

    The arguments are those of `training_flops`. Each weight of a matrix product costs 2 FLOPs per
    token.
    """
    # An iterator can be read only once, but the lengths are needed twice.
    tokens = _token_counts(lengths)
    full = kv_head_flops(model_config, FULL_WINDOW, tokens)
    if allocation:
        windowed = kv_head_flops(model_config, allocation.window, tokens)
        full_heads = [sum(row) for row in allocation.full]
    else:
        windowed = 0
        full_heads = [model_config.num_key_value_heads] * model_config.num_hidden_layers
    linear, _ = block_parameters(model_config)
    flops = []
    for count in full_heads:
        attention = count * full + (model_config.num_key_value_heads - count) * windowed
        flops.append(2 * linear * token_count + attention)
    output_head = 2 * model_config.vocab_size * model_config.hidden_size * token_count
    return [*flops, output_head]


def kv_head_flops(model_config: ModelConfig, window: int, lengths: Lengths) -> int:
    """FLOPs of one KV head's attention in a forward pass.

    Each (query, key) pair costs a query head 2 * head_dim for Q K^T, and the same for P V.
    """
    return (
        4
        * model_config.head_dim
        * model_config.queries_per_kv_head
        * attention_pairs(lengths, window)
    )


def _head_counts(model_config: ModelConfig, allocation: Allocation | None) -> tuple[int, int]:
    """Numbers of full and of windowed KV heads in the whole model."""
    heads = model_config.num_hidden_layers * model_config.num_key_value_heads
    full = sum(map(sum, allocation.full)) if allocation else heads
    return full, heads - full


def kv_cache_bytes(
    model_config: ModelConfig, allocation: Allocation | None, context: int, bytes_per_value: int = 2
) -> int:
    """Bytes of keys and values that one sequence holds after `context` tokens.

    allocation: None is full attention everywhere.

    A windowed head holds at most W - 1 tokens, because the next token brings its own key as the
    W-th. transformers' sliding-window cache keeps the same number.
    """
    full, windowed = _head_counts(model_config, allocation)
    tokens = full * context
    if allocation:
        tokens += windowed * min(context, allocation.window - 1)
    return 2 * model_config.head_dim * bytes_per_value * tokens


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
# Cards of the same chip with less power. The plain name means the SXM module.
_SLOWER_CARDS = {
    ("h100", "pcie"): 756e12,
    ("h800", "pcie"): 756e12,
    ("h100", "nvl"): 835e12,
    ("h200", "nvl"): 835e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s.

    device_name: for example "NVIDIA H100 80GB HBM3" or "h100".

    Returns None where the peak is not known.
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if "mig" in words:
        # A slice of a GPU has a fraction of the peak. The name does not tell which fraction.
        return None
    chip = next((word for word in words if word in _PEAKS), None)
    if chip is None:
        return None
    for (name, card), peak in _SLOWER_CARDS.items():
        if name == chip and card in words:
            return peak
    return _PEAKS[chip]
