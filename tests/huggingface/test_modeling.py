"""What the exported models compute, compared with stock Qwen3 with explicit masks.

All exports are loaded from their folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from megaconsa.consa.allocation import Allocation
from megaconsa.huggingface.load import compare_logits, generate_line, load_exported
from tests.support.transformers_reference import (
    DENSE,
    HEAD_WISE,
    LAYER_WISE,
    MODEL,
    WINDOW,
    masked_logits,
    stock,
)

TOLERANCE = 1e-5  # relative to the largest logit
Export = Callable[[Allocation], Path]


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(
        0, MODEL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length)
    )


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


@pytest.mark.parametrize(
    "allocation", [HEAD_WISE, LAYER_WISE, DENSE], ids=["head-wise", "layer-wise", "dense"]
)
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_logits_equal_stock_qwen3_with_explicit_masks(
    exported: Export, weights: dict[str, Tensor], allocation: Allocation, length: int
) -> None:
    tokens = some_tokens(2, length)
    assert (
        compare_logits(
            exported(allocation), tokens, masked_logits(weights, MODEL, allocation, tokens)
        )
        <= TOLERANCE
    )


def test_the_comparison_would_see_one_key_more_or_less(
    exported: Export, weights: dict[str, Tensor]
) -> None:
    tokens = some_tokens(1, 3 * WINDOW)
    for window in (WINDOW - 1, WINDOW + 1):
        wrong = Allocation(window=window, full=HEAD_WISE.full)
        assert (
            compare_logits(
                exported(HEAD_WISE), tokens, masked_logits(weights, MODEL, wrong, tokens)
            )
            > 1000 * TOLERANCE
        )


def test_layer_wise_is_stock_qwen3_with_layer_types(
    exported: Export, weights: dict[str, Tensor]
) -> None:
    model, _ = load_exported(exported(LAYER_WISE))
    types = ["sliding_attention", "full_attention"] * 2
    theirs = stock(
        weights, MODEL, layer_types=types, sliding_window=WINDOW, use_sliding_window=True
    )
    assert type(model) is type(theirs)
    assert model.config.layer_types == types
    tokens = some_tokens(1, 3 * WINDOW)
    with torch.no_grad():
        assert close(model(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("allocation", [HEAD_WISE, LAYER_WISE], ids=["head-wise", "layer-wise"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prompt", [3, WINDOW, 2 * WINDOW])
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_generation_equals_no_cache_at_every_token(
    exported: Export, allocation: Allocation, attention: str, prompt: int, cache: str | None
) -> None:
    model, _ = load_exported(exported(allocation))
    model.set_attn_implementation(attention)
    steps = 3 * WINDOW
    out = model.generate(
        some_tokens(2, prompt),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False).logits[:, prompt - 1 : -1]
    assert close(torch.stack(out.logits, dim=1), whole)


@pytest.mark.parametrize("allocation", [HEAD_WISE, LAYER_WISE], ids=["head-wise", "layer-wise"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=["beams", "sampling"]
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_search_and_sampling_equal_no_cache(
    exported: Export, allocation: Allocation, settings: dict[str, Any], cache: str | None
) -> None:
    model, _ = load_exported(exported(allocation))
    tokens = some_tokens(2, WINDOW - 2)
    settings = settings | {"max_new_tokens": 3 * WINDOW, "min_new_tokens": 3 * WINDOW}
    outcomes = []
    for use_cache, implementation in ((False, None), (True, cache)):
        torch.manual_seed(0)
        outcomes.append(
            model.generate(
                tokens, use_cache=use_cache, cache_implementation=implementation, **settings
            )
        )
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_continued_conversation_equals_one_pass(exported: Export, cache: str) -> None:
    """Text and generation take turns, and the cache is passed from call to call."""
    model, _ = load_exported(exported(HEAD_WISE))
    held = (
        DynamicCache()
        if cache == "dynamic"
        else StaticCache(model.config, max_cache_len=8 * WINDOW)
    )
    settings = {"max_new_tokens": WINDOW + 1, "min_new_tokens": WINDOW + 1, "do_sample": False}
    heard = fresh = some_tokens(1, 5)
    for turn in range(3):
        heard = model.generate(heard, past_key_values=held, **settings)
        fresh = model.generate(fresh, use_cache=False, **settings)
        assert torch.equal(heard, fresh)
        said = some_tokens(1, 3 + turn)
        heard = torch.cat([heard, said], dim=1)
        fresh = torch.cat([fresh, said], dim=1)


def test_compiled_equals_eager(exported: Export) -> None:
    """Compiling may not change what is computed.

    The compiled graphs may break (generate does not compile the model by itself).
    """
    model, _ = load_exported(exported(HEAD_WISE))
    tokens = some_tokens(2, 3 * WINDOW)
    with torch.no_grad():
        eager = model(tokens).logits
        assert close(torch.compile(model, backend="aot_eager")(tokens).logits, eager)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_changes_nothing(exported: Export, attention: str) -> None:
    model, _ = load_exported(exported(HEAD_WISE))
    model.set_attn_implementation(attention)
    short = some_tokens(1, 5)
    long = some_tokens(1, 2 * WINDOW + 1)
    padding = long.shape[1] - short.shape[1]
    batch = torch.cat([torch.nn.functional.pad(short, (padding, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    settings = {"max_new_tokens": 2 * WINDOW, "min_new_tokens": 2 * WINDOW, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **settings)
    assert together[0, padding:].tolist() == model.generate(short, **settings)[0].tolist()
    assert together[1].tolist() == model.generate(long, **settings)[0].tolist()


def test_chunked_prefill_equals_one_pass(exported: Export) -> None:
    model, _ = load_exported(exported(HEAD_WISE))
    tokens = some_tokens(2, 3 * WINDOW)
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        parts = [
            model(part, past_key_values=cache).logits
            for part in tokens.split([5, WINDOW, 2, 1, WINDOW], dim=1)
        ]
    assert close(torch.cat(parts, dim=1), whole)


def test_sliding_heads_cache_only_the_window(exported: Export) -> None:
    model, _ = load_exported(exported(HEAD_WISE))
    length = 5 * WINDOW
    out = model.generate(
        some_tokens(1, 4),
        max_new_tokens=length - 4,
        min_new_tokens=length - 4,
        return_dict_in_generate=True,
    )
    held = iter(out.past_key_values.layers)
    for row in HEAD_WISE.full:
        for heads, tokens in ((sum(row), length - 1), (len(row) - sum(row), WINDOW - 1)):
            if heads:
                layer = next(held)
                assert layer.keys.shape == layer.values.shape == (1, heads, tokens, MODEL.head_dim)
                # The tensor may be a view. Its storage must not be longer than the window and the
                # newest token.
                held_bytes = layer.keys.untyped_storage().nbytes()
                assert held_bytes <= heads * (tokens + 1) * MODEL.head_dim * 4
    assert next(held, None) is None


def test_gradient_checkpointing_changes_nothing(exported: Export) -> None:
    tokens = some_tokens(1, 2 * WINDOW)
    gradients = []
    for checkpointing in (False, True):
        model, _ = load_exported(exported(HEAD_WISE))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert close(gradients[1], gradients[0])


def test_unsupported_requests_are_refused(exported: Export) -> None:
    model, _ = load_exported(exported(HEAD_WISE))
    tokens = some_tokens(1, 4)
    with pytest.raises(ValueError, match="OtherCache is not supported, nor is offloading"):
        model(tokens, past_key_values=type("OtherCache", (DynamicCache,), {})())
    filled = DynamicCache()
    filled.update(torch.zeros(1, 4, 3, MODEL.head_dim), torch.zeros(1, 4, 3, MODEL.head_dim), 0)
    with pytest.raises(ValueError, match="filled by another model"):
        model(tokens, past_key_values=filled)
    with pytest.raises(ValueError, match="would undo the sliding window"):
        model(tokens, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="flex_attention"):
        model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="a paged cache"):
        model.generate_batch(tokens.tolist())


@pytest.mark.parametrize(
    "fields", [{"num_full_kv_heads": [1]}, {"num_full_kv_heads": [5] * 4}, {"sliding_window": 1}]
)
def test_inconsistent_configurations_are_refused(
    exported: Export, fields: dict[str, object]
) -> None:
    model, _ = load_exported(exported(HEAD_WISE))
    with pytest.raises(ValueError, match="|".join(fields)):
        type(model.config)(**(model.config.to_dict() | fields))


def test_generate_line_continues_the_prompt(exported: Export) -> None:
    folder = exported(HEAD_WISE)
    model, tokenizer = load_exported(folder)
    inputs = tokenizer("abc", return_tensors="pt")
    ids = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=12, do_sample=False
    )
    assert generate_line(folder, "abc", 12) == tokenizer.decode(
        ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
