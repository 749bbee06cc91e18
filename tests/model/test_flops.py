"""FLOPs, parameters and KV cache.

They are compared with brute force, with the figures of facts/gpu.md, and with published sizes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.rules import all_swa, dense, head_share
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.model.flops import (
    attention_pairs,
    forward_flops,
    kv_cache_bytes,
    kv_head_flops,
    parameter_count,
    peak_flops,
    training_flops,
    visible_pairs,
)
from megaconsa.model.qwen3 import Qwen3

LARGE = PRESETS["qwen3-0.6b"]
SMALL = ModelConfig(50, 16, 24, 3, 4, 2, head_dim=8)


def mask(length: int, window: int) -> np.ndarray:
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    return (distance >= 0) & (distance < window)


@pytest.mark.parametrize("window", [1, 2, 7, 12, 13, 14, 1000])
@pytest.mark.parametrize("length", [0, 1, 2, 13])
def test_visible_pairs_count_the_mask(length: int, window: int) -> None:
    assert visible_pairs(length, window) == mask(length, window).sum()


def test_attention_pairs_sum_over_documents() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, 200).astype(np.int32)
    expected = sum(visible_pairs(int(length), 300) for length in lengths)
    assert attention_pairs(lengths, 300) == attention_pairs(iter(lengths.tolist()), 300) == expected
    assert attention_pairs([], 4) == 0
    # The result exceeds 32 bits, although the lengths are 32-bit integers.
    assert attention_pairs(np.array([131_072], np.int32), 2**31 - 1) == 131_072 * 131_073 // 2


def test_training_flops_count_every_product() -> None:
    """Counts the products one by one.

    Each multiplication costs 2 FLOPs in the forward pass and 4 in the backward pass.
    """
    allocation = Allocation(4, ((True, False), (False, False), (True, True)))
    lengths = [5, 1, 10]
    weights = sum(
        weight.numel()
        for name, weight in Qwen3(SMALL, allocation).named_parameters()
        if weight.dim() == 2
    )
    multiplications = weights * sum(lengths)  # the tied embedding counts as the head here
    for layer in range(3):
        for query_head in range(4):
            window = allocation.windows(layer)[query_head // 2]
            multiplications += sum(2 * int(mask(length, window).sum()) * 8 for length in lengths)
    assert training_flops(SMALL, allocation, sum(lengths), lengths) == 6 * multiplications


def test_forward_flops_of_each_layer() -> None:
    """Blocks come one by one, then the head. The weights are those of the model itself."""
    allocation = Allocation(4, ((True, False), (False, False), (True, True)))
    lengths = [5, 1, 10]
    block = sum(
        weight.numel()
        for weight in Qwen3(SMALL, allocation).model.layers[0].parameters()
        if weight.dim() == 2
    )
    expected = [2 * sum(lengths) * block] * 3
    for layer in range(3):
        for window in allocation.windows(layer):
            pairs = sum(int(mask(length, window).sum()) for length in lengths)
            assert kv_head_flops(SMALL, window, lengths) == 2 * 2 * 2 * 8 * pairs
            expected[layer] += 2 * 2 * 2 * 8 * pairs
    assert forward_flops(SMALL, allocation, sum(lengths), iter(lengths)) == [
        *expected,
        2 * sum(lengths) * 50 * 16,
    ]


def test_dense_table_equals_none_and_a_long_window_is_full() -> None:
    lengths = np.array([100, 30])
    full = training_flops(SMALL, None, 130, lengths)
    assert training_flops(SMALL, dense(3, 2, 10), 130, lengths) == full
    assert training_flops(SMALL, all_swa(3, 2, 100), 130, lengths) == full
    assert training_flops(SMALL, all_swa(3, 2, 99), 130, lengths) < full


@pytest.mark.parametrize(("preset", "total"), [("qwen3-0.6b", 6.40e9), ("qwen3-1.7b", 13.1e9)])
def test_flops_per_token_are_those_of_the_facts(preset: str, total: float) -> None:
    """facts/gpu.md counts the weights of the norms in its 6.40 G. They are 0.01 % of the total."""
    model = PRESETS[preset]
    per_token = training_flops(model, None, 8192, [8192]) / 8192
    assert per_token == pytest.approx(total, rel=4e-3)
    assert per_token - 6 * parameter_count(model).matmul == pytest.approx(2.8e9, rel=0.02)


def test_saving_of_half_the_heads() -> None:
    """Attention takes 0.441 of the FLOPs, and half of it is windowed.

    A window of 1024 sees 0.234 of the pairs at 8192 tokens.
    """
    windowed = training_flops(LARGE, head_share(28, 8, 1024, 0.5), 8192, [8192])
    saved = 1 - windowed / training_flops(LARGE, None, 8192, [8192])
    assert saved == pytest.approx(0.4408 * 0.5 * (1 - 0.2343), rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "total"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_parameters_of_the_presets(preset: str, total: int) -> None:
    """The totals are those of the published checkpoints."""
    assert parameter_count(PRESETS[preset]).total == total


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    shape = replace(SMALL, tie_word_embeddings=tied)
    count = parameter_count(shape)
    with torch.device("meta"):
        model = Qwen3(shape, dense(3, 2, 4))
    assert count.total == sum(weight.numel() for weight in model.parameters())
    assert count.embedding == 50 * 16
    linear = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    assert count.matmul == linear


def test_kv_cache() -> None:
    half = head_share(28, 8, 1024, 0.5)
    a_head = 2 * 128 * 2  # key and value, bf16
    assert kv_cache_bytes(LARGE, None, 8192) == 28 * 8 * 8192 * a_head
    assert kv_cache_bytes(LARGE, half, 8192) == 28 * 4 * (8192 + 1023) * a_head
    assert kv_cache_bytes(LARGE, half, 1023) == kv_cache_bytes(LARGE, None, 1023)
    assert kv_cache_bytes(LARGE, half, 8192, bytes_per_value=4) == 2 * kv_cache_bytes(
        LARGE, half, 8192
    )
    assert kv_cache_bytes(LARGE, all_swa(28, 8, 1), 8192) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("h100", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_flops(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
