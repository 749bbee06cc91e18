"""What tensor ranks exchange, and the sharded vocabulary, compared with the whole computation.

The ranks are three gloo processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from megaconsa.model import loss
from megaconsa.parallel import vocabulary
from megaconsa.parallel.launcher import free_port
from megaconsa.parallel.tensor_parallel import TensorParallel
from megaconsa.parallel.topology import vocabulary_rows

VOCABULARY = 301
HIDDEN = 8
BATCH = 2
LENGTH = 12


def run(check: Callable[[TensorParallel], None], size: int, sequence: bool) -> None:
    """Calls check on every rank of a tensor group. A failure there is a failure here."""
    arguments = (check, size, sequence, free_port())
    multiprocessing.spawn(_rank, arguments, nprocs=size)  # type: ignore[no-untyped-call]


def _rank(
    rank: int, check: Callable[[TensorParallel], None], size: int, sequence: bool, port: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    try:
        check(TensorParallel(rank, size, dist.group.WORLD, sequence))
    finally:
        dist.destroy_process_group()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stretch(x: Tensor, tp: TensorParallel) -> Tensor:
    """Returns the part of the residual stream that this rank holds."""
    return x.chunk(tp.size, dim=1)[tp.rank] if tp.sequence else x


def check_block(tp: TensorParallel) -> None:
    """Checks a hidden layer that is sharded by columns and then by rows.

    The weight of a norm before it gets gradients only from the tokens of this rank.
    """
    x = draw(BATCH, LENGTH, HIDDEN)
    scale = draw(HIDDEN, seed=1).requires_grad_()
    up = draw(HIDDEN, 3 * tp.size, seed=2).requires_grad_()
    down = draw(3 * tp.size, HIDDEN, seed=3).requires_grad_()
    upstream = draw(BATCH, LENGTH, HIDDEN, seed=4)
    whole_x = x.clone().requires_grad_()
    whole = whole_x + torch.tanh((whole_x * scale) @ up) @ down
    truth = torch.autograd.grad((whole * upstream).sum(), (whole_x, scale, up, down))

    own_x = stretch(x, tp).clone().requires_grad_()
    own_scale = scale.detach().clone().requires_grad_()
    own_up = up.detach().chunk(tp.size, 1)[tp.rank].clone().requires_grad_()
    own_down = down.detach().chunk(tp.size, 0)[tp.rank].clone().requires_grad_()
    out = own_x + tp.leave(torch.tanh(tp.enter(own_x * own_scale) @ own_up) @ own_down)
    torch.testing.assert_close(out, stretch(whole, tp))
    d_x, d_scale, d_up, d_down = torch.autograd.grad(
        (out * stretch(upstream, tp)).sum(), (own_x, own_scale, own_up, own_down)
    )
    torch.testing.assert_close(d_x, stretch(truth[0], tp))
    torch.testing.assert_close(tp.all_reduce(d_scale) if tp.sequence else d_scale, truth[1])
    torch.testing.assert_close(d_up, truth[2].chunk(tp.size, 1)[tp.rank])
    torch.testing.assert_close(d_down, truth[3].chunk(tp.size, 0)[tp.rank])


def check_vocabulary(tp: TensorParallel) -> None:
    """Checks embedding and loss.

    301 rows leave two rows of padding. The padding holds values that must not count.
    """
    # A chunk holds five tokens, so the last one is shorter.
    loss.LOGIT_CHUNK_BYTES = 4 * 5 * vocabulary_rows(VOCABULARY, tp.size)
    weight = draw(VOCABULARY, HIDDEN).float().requires_grad_()
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator)
    labels[0, 3:7] = labels[1, -1] = loss.IGNORED
    # Ranks 1 and 2 subtract their first rows, 101 and 202. This gives the values of IGNORED and
    # ELSEWHERE, which these labels must not be mistaken for.
    labels[1, :4] = torch.tensor([1, 102, 100, 201])
    embedded = torch.nn.functional.embedding(tokens, weight)
    whole = loss.summed_cross_entropy(torch.tanh(embedded), weight, labels) * 0.1
    (truth,) = torch.autograd.grad(whole, weight)

    rows = vocabulary_rows(VOCABULARY, tp.size)
    padded = torch.cat((weight.detach(), torch.full((rows * tp.size - VOCABULARY, HIDDEN), 3.0)))
    own = padded[tp.rank * rows : (tp.rank + 1) * rows].clone().requires_grad_()
    hidden = tp.leave(vocabulary.lookup(tokens, own, tp))
    torch.testing.assert_close(hidden, stretch(embedded, tp))
    part = vocabulary.part(own, tp, VOCABULARY)
    total = 0.1 * loss.summed_cross_entropy(tp.enter(torch.tanh(hidden)), own, labels, part)
    torch.testing.assert_close(total, whole)
    (gradient,) = torch.autograd.grad(total, own)
    expected = torch.cat((truth, torch.zeros(rows * tp.size - VOCABULARY, HIDDEN)))
    torch.testing.assert_close(
        gradient, expected[tp.rank * rows : (tp.rank + 1) * rows], rtol=1e-5, atol=1e-6
    )
    with torch.no_grad():
        again = 0.1 * loss.summed_cross_entropy(tp.enter(torch.tanh(hidden)), own, labels, part)
    torch.testing.assert_close(again, whole)


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "whole"])
@pytest.mark.parametrize(
    ("check", "size"), [(check_block, 3), (check_vocabulary, 3)], ids=["block", "vocabulary"]
)
def test_equals_one_process(check: Any, size: int, sequence: bool) -> None:
    run(check, size, sequence)


def test_one_rank_exchanges_nothing() -> None:
    x = draw(BATCH, LENGTH, HIDDEN)
    alone = TensorParallel()
    assert alone.enter(x) is alone.leave(x) is alone.all_reduce(x) is x
