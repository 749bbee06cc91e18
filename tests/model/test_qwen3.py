"""The model, compared with the Qwen3 of transformers.

Also tests what gates and packed documents must not change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.consa.gates import GateBank, GateSettings
from megaconsa.consa.head_selector import HeadSelector
from megaconsa.consa.sampled_gates import SampledGates
from megaconsa.huggingface.parameter_names import parameter_shapes, qwen3_config_fields
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.model.initialize import initial_weight
from megaconsa.model.qwen3 import Qwen3

SHAPE = ModelConfig(61, 24, 40, 3, 6, 2, head_dim=8, rope_theta=10_000.0, rms_norm_eps=1e-5)
WINDOW = 5
DENSE = Allocation(WINDOW, ((True, True),) * 3)
MIXED = Allocation(WINDOW, ((True, False), (False, False), (False, True)))
LAYER_WISE = Allocation(WINDOW, ((False, False), (True, True), (False, False)), "layer", "global")
TOKENS = torch.randint(SHAPE.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))


def weights_of(model_config: ModelConfig) -> dict[str, Tensor]:
    """Weights far from their initial values.

    Attention is so uneven that one key too many or too few shows, and norms scale unevenly.
    """
    generator = torch.Generator().manual_seed(7)
    noise = {
        name: torch.randn(size, generator=generator)
        for name, size in parameter_shapes(model_config).items()
    }
    return {
        name: 1.5 + 0.5 * x if x.dim() == 1 else 2 * x / x.shape[1] ** 0.5
        for name, x in noise.items()
    }


def build(model_config: ModelConfig, heads: HeadSelector, **arguments: Any) -> Qwen3:
    model = Qwen3(model_config, heads, **arguments)
    missing, unexpected = model.load_state_dict(weights_of(model_config), strict=False)
    assert missing == (["lm_head.weight"] if model_config.tie_word_embeddings else [])
    assert not unexpected
    return model


@torch.no_grad()
def transformers_logits(model_config: ModelConfig, tokens: Tensor, **fields: Any) -> Tensor:
    stock = Qwen3ForCausalLM(
        Qwen3Config(**(qwen3_config_fields(model_config) | fields), attn_implementation="eager")
    ).eval()
    stock.load_state_dict(weights_of(model_config), strict=False)
    stock.tie_weights()
    return stock(tokens, use_cache=False).logits


def difference(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, divided by the largest logit."""
    return float((logits.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_dense_logits_equal_transformers(tied: bool, backend: str) -> None:
    shape = replace(SHAPE, tie_word_embeddings=tied)
    expected = transformers_logits(shape, TOKENS)
    assert difference(build(shape, DENSE, backend=backend)(TOKENS), expected) < 1e-5
    assert difference(build(shape, MIXED)(TOKENS), expected) > 1e-2


@pytest.mark.parametrize(
    "model_config",
    [
        replace(SHAPE, num_attention_heads=2, rope_theta=1e6, rms_norm_eps=1e-2),
        replace(SHAPE, num_key_value_heads=1, hidden_size=20, head_dim=2),
    ],
    ids=["as many KV heads as queries", "one KV head"],
)
def test_other_shapes_equal_transformers(model_config: ModelConfig) -> None:
    dense = Allocation(WINDOW, ((True,) * model_config.num_key_value_heads,) * 3)
    assert (
        difference(build(model_config, dense)(TOKENS), transformers_logits(model_config, TOKENS))
        < 1e-5
    )


def test_layer_wise_logits_equal_transformers() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    expected = transformers_logits(
        SHAPE,
        TOKENS,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=types,
        max_window_layers=0,
    )
    assert difference(build(SHAPE, LAYER_WISE)(TOKENS), expected) < 1e-5
    for window in (WINDOW - 1, WINDOW + 1):
        assert difference(build(SHAPE, replace(LAYER_WISE, window=window))(TOKENS), expected) > 1e-2


@pytest.mark.parametrize("preset", PRESETS)
def test_names_shapes_and_order_are_the_canonical_ones(preset: str) -> None:
    shape = PRESETS[preset]
    with torch.device("meta"):
        model = Qwen3(
            shape, Allocation(1, ((True,) * shape.num_key_value_heads,) * shape.num_hidden_layers)
        )
    canonical = parameter_shapes(shape)
    assert [(name, tuple(weight.shape)) for name, weight in model.named_parameters()] == list(
        canonical.items()
    )
    assert model.state_dict().keys() - canonical.keys() == (
        {"lm_head.weight"} if shape.tie_word_embeddings else set()
    )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shape.tie_word_embeddings


def packed(*lengths: int) -> tuple[Tensor, list[slice]]:
    """Packs documents of the given lengths into two equal sequences.

    Returns `documents`, and the slice of each document.
    """
    starts = [sum(lengths[:count]) for count in range(len(lengths))]
    row = [start for start, length in zip(starts, lengths, strict=True) for _ in range(length)]
    parts = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return torch.tensor([row, row], dtype=torch.int32), parts


@pytest.mark.parametrize("heads", [DENSE, MIXED], ids=["dense", "mixed"])
def test_a_packed_document_has_the_logits_it_has_alone(heads: Allocation) -> None:
    documents, parts = packed(9, 1, 14, 8)
    separate = build(SHAPE, heads)
    joined = build(SHAPE, heads, separate=False)
    logits = separate(TOKENS, documents)
    mingled = joined(TOKENS, documents)
    for part in parts:
        alone = separate(TOKENS[:, part])
        assert difference(logits[:, part], alone) < 1e-5
        if part.start > 0:
            assert difference(mingled[:, part], alone) > 1e-2
    assert difference(separate(TOKENS), logits) > 1e-2


def test_positions_restart_without_separation_too() -> None:
    """Documents that see each other still count positions from their own start.

    transformers uses the positions it is given.
    """
    documents, _ = packed(12, 20)
    stock = Qwen3ForCausalLM(
        Qwen3Config(**qwen3_config_fields(SHAPE), attn_implementation="eager")
    ).eval()
    stock.load_state_dict(weights_of(SHAPE), strict=False)
    stock.tie_weights()
    mask = torch.zeros(1, 1, 32, 32).masked_fill(~torch.ones(32, 32).tril().bool(), float("-inf"))
    with torch.no_grad():
        expected = stock(
            TOKENS, position_ids=torch.arange(32) - documents, attention_mask=mask, use_cache=False
        ).logits
    assert difference(build(SHAPE, DENSE, separate=False)(TOKENS, documents), expected) < 1e-5


def test_tokens_of_another_document_change_nothing() -> None:
    """The outputs are bitwise equal."""
    documents, parts = packed(9, 15, 8)
    model = build(SHAPE, MIXED)
    other = TOKENS.clone()
    other[:, parts[0]] = 3
    other[:, parts[2]] = 5
    own = parts[1]
    assert torch.equal(model(TOKENS, documents)[:, own], model(other, documents)[:, own])
    assert not torch.equal(
        model(TOKENS, documents)[:, parts[2]], model(other, documents)[:, parts[2]]
    )


def bank_of(table: Allocation, saturated: float) -> GateBank:
    """A bank whose gates follow the table.

    saturated: with 30, every sample is exactly 0 or 1.
    """
    bank = GateBank(
        GateSettings(
            Constraint(3, 2, table.sparsity, scope="global"), WINDOW, "paper", global_batch=4
        )
    )
    sampler = bank.gates
    assert isinstance(sampler, SampledGates)
    with torch.no_grad():
        sampler.log_alpha.copy_(torch.tensor(table.full) * 2.0 - 1.0).mul_(saturated)
    bank.sample(0)
    return bank


def test_saturated_gates_equal_the_allocated_table() -> None:
    """Invariant 4 for the whole model, with the gradients of all weights."""
    documents, _ = packed(9, 15, 8)
    gated = build(SHAPE, bank_of(MIXED, 30.0))
    allocated = build(SHAPE, MIXED)
    results = []
    for model in (gated, allocated):
        logits = model(TOKENS, documents)
        results.append(
            [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]
        )
    for result, expected in zip(*results, strict=True):
        assert difference(result, expected) < 2e-5


def test_binarized_gates_are_the_allocated_table() -> None:
    bank = bank_of(MIXED, 0.5)
    model = build(SHAPE, bank)
    expected = build(SHAPE, MIXED)(TOKENS)
    with bank.binarized():
        assert torch.equal(model(TOKENS), expected)
    assert difference(model(TOKENS), expected) > 1e-2


def test_gates_follow_their_sequences_not_their_rows() -> None:
    model = build(SHAPE, bank_of(MIXED, 0.5))
    tokens = torch.cat([TOKENS, TOKENS])
    together = model(tokens, sequences=torch.arange(4))
    assert difference(together[2:], together[:2]) > 1e-2
    for rows in ([3], [2, 0]):
        assert difference(model(tokens[rows], sequences=torch.tensor(rows)), together[rows]) < 1e-5


def test_initial_weight_depends_on_name_and_seed_alone() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    size = torch.Size((40, 24))
    first = initial_weight(name, size, SHAPE, 3)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(initial_weight(name, size, SHAPE, 3), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(initial_weight(name, size, SHAPE, 4), first)
    assert not torch.equal(initial_weight(name.replace("1", "2"), size, SHAPE, 3), first)
    wider = initial_weight(name, size, replace(SHAPE, initializer_range=0.04), 3)
    torch.testing.assert_close(wider, 2 * first, rtol=1e-6, atol=0)


def test_initial_weights_have_the_configured_spread_and_norms_are_one() -> None:
    for name, size in parameter_shapes(SHAPE).items():
        weight = initial_weight(name, torch.Size(size), SHAPE, 0)
        assert weight.shape == size
        assert weight.dtype == torch.float32
        if len(size) == 1:
            assert bool((weight == 1).all())
        else:
            count = weight.numel()
            assert abs(float(weight.mean())) < 5 * 0.02 / count**0.5
            assert abs(float(weight.std()) - 0.02) < 5 * 0.02 / (2 * count) ** 0.5
