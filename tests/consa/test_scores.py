"""Parts of the baselines' scores, each compared with a slower reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaconsa.consa import scores
from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.consa.scores import UnitSelector, estimate, mass_outside_window
from megaconsa.kernels.attention.head_pattern import HeadPattern

WINDOW = 3
KV_HEADS = 2
SEQUENCES = torch.arange(2)


def test_select_a_table() -> None:
    selector = UnitSelector(torch.tensor([[True, False], [False, False]]), WINDOW, KV_HEADS)
    assert selector.select(0, SEQUENCES) == HeadPattern((FULL_WINDOW, WINDOW))
    assert selector.select(1, SEQUENCES) == HeadPattern((WINDOW, WINDOW))


def test_select_layers_as_units() -> None:
    selector = UnitSelector(torch.tensor([[True], [False]]), WINDOW, KV_HEADS)
    assert selector.select(0, SEQUENCES) == HeadPattern((FULL_WINDOW, FULL_WINDOW))
    selector.units = torch.tensor([[0.25], [0.75]])
    windows, gate, _ = selector.select(1, SEQUENCES)
    assert windows == (WINDOW,) * KV_HEADS
    assert gate is not None
    assert gate.tolist() == [0.75, 0.75]


def test_select_gates_of_each_sequence() -> None:
    gates = torch.rand(2, 4, KV_HEADS)
    windows, gate, _ = UnitSelector(gates, WINDOW, KV_HEADS).select(3, SEQUENCES)
    assert windows == (WINDOW,) * KV_HEADS
    assert gate is not None
    assert torch.equal(gate, gates[:, 3])


def dense_mass(q: Tensor, k: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Computes the same figures for one query and one query head at a time."""
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    sums = torch.zeros(batch, k.shape[2], dtype=torch.float64)
    counts = torch.zeros(batch, dtype=torch.int64)
    for b in range(batch):
        for i in range(length):
            start = int(starts[b, i])
            hidden = i - window + 1 - start
            if hidden <= 0:
                continue
            counts[b] += 1
            for head in range(heads):
                seen = k[b, start : i + 1, head // group].double()
                softmax = (seen @ q[b, i, head].double() / dim**0.5).softmax(dim=0)
                sums[b, head // group] += softmax[:hidden].sum() / group
    return sums, counts


def random_case() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and document starts.

    The first row has documents of 7 and 4 tokens. The second row has one of 11.
    """
    generator = torch.Generator().manual_seed(3)
    q = 2 * torch.randn(2, 11, 4, 8, generator=generator)
    k = 2 * torch.randn(2, 11, KV_HEADS, 8, generator=generator)
    starts = torch.tensor([[0] * 7 + [7] * 4, [0] * 11], dtype=torch.int32)
    return q, k, starts


@pytest.mark.parametrize("window", [1, 3, 4, 10, 11])
def test_mass_outside_the_window(window: int) -> None:
    q, k, starts = random_case()
    sums, counts = mass_outside_window(q, k, starts, window)
    expected_sums, expected_counts = dense_mass(q, k, starts, window)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-6)


def test_queries_beyond_the_window() -> None:
    q, k, starts = random_case()
    _, counts = mass_outside_window(q, k, starts, WINDOW)
    # A document of n tokens has n - W queries with a key outside the window: 4 and 1 in the first
    # row, 8 in the second.
    assert counts.tolist() == [5, 8]


def test_mass_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, starts = random_case()
    whole, _ = mass_outside_window(q, k, starts, WINDOW)
    # Memory for two queries, then for less than one.
    for room in (2 * 4 * 2 * 4 * 11, 1):
        monkeypatch.setattr(scores, "CHUNK_BYTES", room)
        chunked, _ = mass_outside_window(q, k, starts, WINDOW)
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)


def test_estimate_of_equal_sequences() -> None:
    """Sequences of equal length are an ordinary sample."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
    estimated = estimate(means * 10, torch.full((6,), 10))
    torch.testing.assert_close(estimated.scores, means.mean(dim=0))
    torch.testing.assert_close(estimated.standard_errors, means.std(dim=0) / 6**0.5)


def test_standard_errors_are_the_spread_of_estimates() -> None:
    """The scores of 2000 samples spread as much as their standard errors say.

    The sequences of a sample have unequal lengths.
    """
    generator = torch.Generator().manual_seed(0)
    samples = 2000
    counts = torch.randint(50, 100, (40,), generator=generator)
    noise = torch.randn(40, samples, 1, generator=generator, dtype=torch.float64)
    sums = counts[:, None, None] * (0.5 + noise)
    estimated = estimate(sums, counts)
    spread = float(estimated.scores.std())
    assert float(estimated.standard_errors.mean()) == pytest.approx(spread, rel=0.05)


def test_sequences_without_tokens_do_not_count() -> None:
    sums = torch.tensor([[[1.0]], [[0.0]], [[5.0]]])
    estimated = estimate(sums, torch.tensor([2, 0, 2]))
    expected = estimate(sums[::2], torch.tensor([2, 2]))
    assert estimated.scores.item() == 1.5
    assert estimated.standard_errors.item() == expected.standard_errors.item() > 0


def test_one_sequence_has_no_standard_error() -> None:
    estimated = estimate(torch.ones(1, 2, 2), torch.tensor([4]))
    assert estimated.scores.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert bool(estimated.standard_errors.isnan().all())
