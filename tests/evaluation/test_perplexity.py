"""Losses by position, compared with a slow reference.

The reference is one forward pass for every single token, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from megaconsa.evaluation import scoring
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.perplexity import (
    bucket_edges,
    choose_documents,
    difference,
    measure,
    ratio,
)
from megaconsa.evaluation.scoring import score
from megaconsa.huggingface.decoding import use_kernels
from tests.support.exports import ALLOCATIONS, WINDOW

LENGTH = 24


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_equals_a_pass_for_every_token(
    name: str, loaded: Callable[[str], Any], held_out: HeldOut
) -> None:
    model = loaded(name)
    # The longest document, one that is just long enough, and the two shortest. Batches of them need
    # padding.
    chosen = choose_documents(held_out, LENGTH, 10**6)
    chosen = [chosen[0], chosen[1], *chosen[-2:]]
    found = measure(model, held_out, chosen, LENGTH, batch_tokens=3 * LENGTH)
    truth = deepcopy(model).double()
    assert found.edges == [0, 3, 6, 12, 24]
    for index, sums in zip(chosen, found.document_losses, strict=True):
        tokens = torch.from_numpy(held_out.document(index, LENGTH + 1))
        expected = [0.0] * 4
        with torch.no_grad():
            for position in range(len(tokens) - 1):
                logits = truth(tokens[None, : position + 1], use_cache=False).logits[0, -1]
                bucket = int(np.searchsorted(found.edges, position, side="right")) - 1
                expected[bucket] -= float(logits.log_softmax(dim=0)[tokens[position + 1]])
        assert sums == pytest.approx(expected, rel=2e-5, abs=1e-4)


def test_every_token_is_in_one_bucket(loaded: Callable[[str], Any], held_out: HeldOut) -> None:
    chosen = choose_documents(held_out, 100, 10**6)
    told: list[int] = []
    found = measure(loaded("heads"), held_out, chosen, 100, batch_tokens=1000, advance=told.append)
    expected = sum(min(int(length) - 1, 100) for length in held_out.lengths)
    assert sum(found.tokens) == sum(found.document_tokens) == sum(told) == expected
    assert found.documents[0] == len(chosen) == int((held_out.lengths > 1).sum())
    total = sum(loss * tokens for loss, tokens in zip(found.loss, found.tokens, strict=True))
    assert total == pytest.approx(sum(map(sum, found.document_losses)))
    assert found.overall.tokens == expected
    assert found.overall.loss == pytest.approx(total / expected)
    assert found.perplexity == [math.exp(loss) for loss in found.loss]


def test_windows_cost_nothing_within_the_window(
    loaded: Callable[[str], Any], held_out: HeldOut
) -> None:
    """A windowed head sees W tokens. These are all the tokens there are at positions 0 to W - 1."""
    length = 8 * WINDOW
    chosen = choose_documents(held_out, length, 4)
    dense, heads = (
        measure(loaded(name), held_out, chosen, length, batch_tokens=64)
        for name in ("dense", "heads")
    )
    assert dense.edges == [0, 8, 16, 32, 64]
    more = difference(dense, heads)
    assert more.loss[0] == pytest.approx(0, abs=1e-6)
    assert all(abs(loss) > 1e-3 for loss in more.loss[1:])


def test_batches_and_chunks_change_nothing(
    loaded: Callable[[str], Any], held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose_documents(held_out, LENGTH, 6)
    whole = measure(loaded("layers"), held_out, chosen, LENGTH, batch_tokens=10**6)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 512 * 7)
    single = measure(loaded("layers"), held_out, chosen, LENGTH, batch_tokens=1)
    assert np.array(single.document_losses) == pytest.approx(
        np.array(whole.document_losses), rel=1e-5
    )


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_megaconsas_kernels_give_the_same(
    name: str, loaded: Callable[[str], Any], held_out: HeldOut
) -> None:
    """These are the kernels that a GPU runs."""
    tokens = torch.from_numpy(
        np.stack([held_out.document(i, 65) for i in choose_documents(held_out, 64, 3)])
    )
    plain, _ = score(loaded(name), tokens)
    fast, _ = score(use_kernels(deepcopy(loaded(name))), tokens)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_score_from_a_position_on(loaded: Callable[[str], Any], held_out: HeldOut) -> None:
    tokens = torch.from_numpy(held_out.document(choose_documents(held_out, 30, 1)[0], 31))[None]
    logits = loaded("heads")(tokens[:, :-1], use_cache=False).logits
    likelihoods, likeliest = score(loaded("heads"), tokens, first=10)
    expected = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, 10:, 0]
    torch.testing.assert_close(likelihoods, expected)
    assert torch.equal(likeliest, logits.argmax(-1)[:, 10:] == tokens[:, 11:])


def test_buckets() -> None:
    assert bucket_edges(8192) == [0, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert bucket_edges(1500) == [0, 128, 256, 512, 1024, 1500]
    assert bucket_edges(512) == [0, 64, 128, 256, 512]
    assert bucket_edges(3) == [0, 1, 2, 3]
    assert bucket_edges(1) == [0, 1]


def test_long_documents_come_first_in_stored_order(held_out: HeldOut) -> None:
    chosen = choose_documents(held_out, 64, 10**6)
    predicted = np.minimum(held_out.lengths[chosen] - 1, 64)
    assert (np.diff(predicted) <= 0).all()
    assert (predicted > 0).all()
    full = [index for index, tokens in zip(chosen, predicted, strict=True) if tokens == 64]
    assert full == sorted(full)
    assert choose_documents(held_out, 64, 3) == chosen[:3]


def test_standard_error_of_documents() -> None:
    """Compares the standard error with simpler estimates.

    It equals that of the means for documents of equal length. It is close to the jackknife's for
    unequal lengths. Empty documents do not count.
    """
    random = np.random.default_rng(0)
    sums = random.normal(30, 4, 50)
    mean, error = ratio(np.append(sums, 0), np.append(np.full(50, 10), 0))
    assert mean == pytest.approx(sums.mean() / 10)
    assert error == pytest.approx((sums / 10).std(ddof=1) / 50**0.5)
    tokens = random.integers(5, 60, 200)
    sums = tokens * random.normal(3, 0.5, 200)
    mean, error = ratio(sums, tokens)
    left_out = (sums.sum() - sums) / (tokens.sum() - tokens)
    assert error == pytest.approx((199 / 200 * ((left_out - mean) ** 2).sum()) ** 0.5, rel=0.05)
    assert ratio(np.array([6.0]), np.array([2])) == (3.0, None)


def test_difference_is_paired(loaded: Callable[[str], Any], held_out: HeldOut) -> None:
    chosen = choose_documents(held_out, LENGTH, 8)
    dense, heads = (
        measure(loaded(name), held_out, chosen, LENGTH, batch_tokens=400)
        for name in ("dense", "heads")
    )
    more = difference(dense, heads)
    assert more.loss == pytest.approx(
        [b - a for a, b in zip(dense.loss, heads.loss, strict=True)], abs=1e-9
    )
    assert more.standard_error[0] is not None
    assert dense.standard_error[0] is not None
    assert more.standard_error[0] < 1e-3 < dense.standard_error[0]
    same = difference(heads, heads)
    assert (same.loss, same.standard_error) == ([0.0] * 4, [0.0] * 4)
