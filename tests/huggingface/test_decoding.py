"""megaconsa's kernels under the generate method of transformers.

They are compared with the same export without a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from megaconsa.consa.allocation import Allocation
from megaconsa.huggingface.decoding import KernelCache, use_kernels
from megaconsa.huggingface.load import load_exported
from tests.support.transformers_reference import (
    DENSE,
    HEAD_WISE,
    LAYER_WISE,
    MODEL,
    WINDOW,
    masked_logits,
)

Export = Callable[[Allocation], Path]
KINDS = pytest.mark.parametrize(
    "allocation", [HEAD_WISE, LAYER_WISE, DENSE], ids=["head-wise", "layer-wise", "dense"]
)
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])
STEPS = 3 * WINDOW
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(
        0, MODEL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length)
    )


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.fixture
def fast(exported: Export) -> Callable[..., Any]:
    return lambda allocation=HEAD_WISE, device="cpu": use_kernels(
        load_exported(exported(allocation))[0].to(device)
    )


@DEVICES
@KINDS
@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, 2 * WINDOW + 1])
def test_generation_equals_the_truth_at_every_token(
    fast: Callable[..., Any],
    weights: dict[str, Tensor],
    allocation: Allocation,
    prompt: int,
    device: str,
) -> None:
    """Compares the logits of every step, over three windows.

    The reference is the stock Qwen3 without a cache, with a mask for each head.
    """
    model = fast(allocation, device)
    cache = KernelCache(model, prompt + STEPS)
    settings = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(some_tokens(2, prompt).to(device), past_key_values=cache, **settings)
    sequences = out.sequences.cpu()
    whole = masked_logits(weights, MODEL, allocation, sequences)[:, prompt - 1 : -1]
    assert close(torch.stack(out.logits, dim=1).cpu(), whole)
    # Keys and values of 2 sequences, 32 numbers each, in fp32. Full heads hold all tokens and the
    # others hold one window.
    full = sum(map(sum, allocation.full))
    assert cache.nbytes == 2 * 2 * 32 * 4 * (full * (prompt + STEPS) + (16 - full) * WINDOW)


@DEVICES
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=["beams", "sampling"]
)
def test_search_and_sampling(
    fast: Callable[..., Any], exported: Export, settings: dict[str, Any], device: str
) -> None:
    model = fast(device=device)
    plain = load_exported(exported(HEAD_WISE))[0].to(device)
    tokens = some_tokens(2, WINDOW - 2).to(device)
    settings = settings | {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    outcomes = []
    for each, cache in (
        (plain, {"use_cache": False}),
        (model, {"past_key_values": KernelCache(model, 50)}),
    ):
        torch.manual_seed(0)
        outcomes.append(each.generate(tokens, **cache, **settings))
    assert torch.equal(*outcomes)


@DEVICES
def test_left_padding(fast: Callable[..., Any], device: str) -> None:
    model = fast(device=device)
    short = some_tokens(1, 5).to(device)
    long = some_tokens(1, 2 * WINDOW + 1).to(device)
    padding = long.shape[1] - short.shape[1]
    batch = torch.cat([torch.nn.functional.pad(short, (padding, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    together = model.generate(
        batch, attention_mask=mask, past_key_values=KernelCache(model, 50), **GREEDY
    )
    for row, alone in ((together[0, padding:], short), (together[1], long)):
        expected = model.generate(alone, past_key_values=KernelCache(model, 50), **GREEDY)
        assert torch.equal(row[None], expected)


@DEVICES
def test_a_conversation_and_the_same_cache_again(
    fast: Callable[..., Any], exported: Export, device: str
) -> None:
    """Text and answers take turns.

    Then the cache is emptied, and another conversation uses it.
    """
    model = fast(device=device)
    plain = load_exported(exported(HEAD_WISE))[0].to(device)
    cache = KernelCache(model, 12 * WINDOW)
    for seed in (5, 6):
        heard = fresh = some_tokens(1, seed).to(device)
        for said in (1, 3, WINDOW + 2):
            heard = model.generate(heard, past_key_values=cache, **GREEDY)
            fresh = plain.generate(fresh, use_cache=False, **GREEDY)
            assert torch.equal(heard, fresh)
            more = some_tokens(1, said).to(device)
            heard = torch.cat([heard, more], dim=1)
            fresh = torch.cat([fresh, more], dim=1)
        cache.reset()


@DEVICES
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_pieces(fast: Callable[..., Any], device: str, padded: bool) -> None:
    model = fast(device=device)
    tokens = some_tokens(2, 3 * WINDOW).to(device)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :3] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = KernelCache(model, 50)
    seen = 0
    parts = []
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for part in (5, WINDOW, 2, 1, 1, WINDOW - 1):
            here = slice(seen, seen := seen + part)
            known = {"attention_mask": mask[:, :seen], "position_ids": positions[:, here]}
            parts.append(model(tokens[:, here], past_key_values=cache, **known).logits)
    real = mask.bool()
    assert close(torch.cat(parts, dim=1)[real], whole[real])


@DEVICES
@pytest.mark.parametrize("pieces", [(5, 7, 12), (1, 23), (1, 1, 1, 21)])
def test_padding_beyond_the_first_piece(
    fast: Callable[..., Any], device: str, pieces: tuple[int, ...]
) -> None:
    model = fast(device=device)
    tokens = some_tokens(2, 3 * WINDOW).to(device)
    mask = torch.ones_like(tokens)
    mask[0, :10] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = KernelCache(model, 50)
    seen = 0
    parts = []
    whole = model(
        tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits.detach()
    for part in pieces:
        here = slice(seen, seen := seen + part)
        with torch.enable_grad(), torch.inference_mode():
            known = {"attention_mask": mask[:, :seen], "position_ids": positions[:, here]}
            parts.append(model(tokens[:, here], past_key_values=cache, **known).logits)
    last = torch.cat(parts, dim=1)
    assert close(last[mask.bool()], whole[mask.bool()])
    cache.reset()  # works outside inference mode too


def test_a_copy_is_a_model_of_its_own(fast: Callable[..., Any]) -> None:
    model = fast()
    tokens = some_tokens(1, 6)
    assert use_kernels(model) is model
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(tokens, use_cache=False).logits.any()
        assert model(tokens, use_cache=False).logits.any()


def test_the_prompt_alone_equals_the_library(fast: Callable[..., Any], exported: Export) -> None:
    """Evaluation runs the model like this: without a cache, with padding."""
    model = fast()
    plain, _ = load_exported(exported(HEAD_WISE))
    tokens = some_tokens(2, 3 * WINDOW)
    mask = torch.ones_like(tokens)
    mask[1, : WINDOW + 2] = 0
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask, use_cache=False).logits
        theirs = plain(tokens, attention_mask=mask, use_cache=False).logits
    assert close(ours[mask.bool()], theirs[mask.bool()])


@DEVICES
def test_compiling_changes_nothing(fast: Callable[..., Any], device: str) -> None:
    tokens = some_tokens(2, 4).to(device)
    model = fast(device=device)
    expected = model.generate(tokens, past_key_values=KernelCache(model, 60), **GREEDY)
    model.forward = torch.compile(model.forward)
    assert torch.equal(
        model.generate(tokens, past_key_values=KernelCache(model, 60), **GREEDY), expected
    )


def test_what_cannot_work_is_refused(fast: Callable[..., Any], exported: Export) -> None:
    model = fast()
    tokens = some_tokens(2, 6)
    with pytest.raises(
        ValueError, match="6 more tokens do not fit: the cache holds 0 of capacity=5"
    ):
        model(tokens, past_key_values=KernelCache(model, 5))
    with pytest.raises(
        ValueError, match="1 more tokens do not fit: the cache holds 8 of capacity=8"
    ):
        model.generate(tokens, past_key_values=KernelCache(model, 8), **GREEDY)
    with pytest.raises(ValueError, match="pass past_key_values=KernelCache"):
        model.generate(tokens, **GREEDY)
    with pytest.raises(ValueError, match="pass past_key_values=KernelCache"):
        model.generate(tokens, past_key_values=DynamicCache(), **GREEDY)
    mask = torch.ones_like(tokens)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="padding on the left only"):
        model(tokens, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="cannot be shortened"):
        KernelCache(model, 8).crop(-1)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="takes no packed sequences"):
        model(tokens[:1], position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="a model with other windows"):
        model(tokens, past_key_values=KernelCache(fast(DENSE), 8))
    plain, _ = load_exported(exported(HEAD_WISE))
    with pytest.raises(ValueError, match="the model has sdpa: call use_kernels"):
        plain(tokens, past_key_values=KernelCache(plain, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_decoding_steps_are_replayed(fast: Callable[..., Any]) -> None:
    """The first step runs and the second one is captured.

    After that, Python no longer runs the layers.
    """
    model = fast(device="cuda")
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(some_tokens(2, 4).cuda(), past_key_values=KernelCache(model, 50), **GREEDY)
    assert len(calls) == 3  # the prompt, the first step, the capture
