"""Attention of a divided sequence, compared with that of the whole one.

The ranks are gloo processes. Their tensors are fp64, where a key too many shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from megaconsa.consa.allocation import FULL_WINDOW
from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.parallel.context_parallel import ContextParallel
from megaconsa.parallel.launcher import free_port

BATCH = 2
GROUP = 2
DIM = 4
CHUNK = 6
GATE = torch.tensor([[0.3, 0.0, 1.0, 0.7], [0.9, 0.0, 0.4, 0.0]], dtype=torch.float64)
CLOSED = (False, True, False, False)
PATTERNS = {
    "full": HeadPattern((FULL_WINDOW,) * 4),
    "windowed": HeadPattern((5,) * 4),
    "sorted": HeadPattern((FULL_WINDOW, FULL_WINDOW, 5, 5)),
    "alternating": HeadPattern((5, FULL_WINDOW, 5, FULL_WINDOW)),
    "one key": HeadPattern((1, 1, FULL_WINDOW, 1)),
    "a chunk and a key": HeadPattern((CHUNK + 1,) * 4),
    "longer than a chunk": HeadPattern((CHUNK + 2, 3, CHUNK + 1, 5)),
    "gated": HeadPattern((5,) * 4, GATE),
    "gated, one known to be closed": HeadPattern((5,) * 4, GATE, CLOSED),
    "closed": HeadPattern((5,) * 4, torch.zeros_like(GATE), (True,) * 4),
}


def run(check: Callable[[ContextParallel], None], size: int) -> None:
    """Calls check on every rank of a context group. A failure there is a failure here."""
    arguments = (check, size, free_port())
    multiprocessing.spawn(_rank, arguments, nprocs=size)  # type: ignore[no-untyped-call]


def _rank(rank: int, check: Callable[[ContextParallel], None], size: int, port: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    try:
        check(ContextParallel(rank, size, dist.group.WORLD))
    finally:
        dist.destroy_process_group()


def draw(length: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, heads, DIM, generator=generator, dtype=torch.float64)


def documents_of(length: int) -> Tensor:
    """Documents that end inside chunks, at their ends, and after one token."""
    documents = torch.zeros(BATCH, length, dtype=torch.int32)
    for begin in (1, CHUNK, CHUNK + 4, length - 3):
        documents[0, begin:] = begin
    documents[1, length // 2 + 1 :] = length // 2 + 1
    return documents


def check_equals_the_whole(cp: ContextParallel) -> None:
    documents = documents_of(2 * cp.size * CHUNK)
    for name, pattern in PATTERNS.items():
        check_pattern(cp, name, pattern, None)
        check_pattern(cp, f"{name}, packed", pattern, documents)


def check_pattern(
    cp: ContextParallel, name: str, pattern: HeadPattern, documents: Tensor | None
) -> None:
    length = 2 * cp.size * CHUNK
    upstream = draw(length, 4 * GROUP, 3)
    whole = [draw(length, heads, seed) for seed, heads in enumerate((4 * GROUP, 4, 4))]
    own = [cp.own_part(x).requires_grad_() for x in whole]
    whole = [x.requires_grad_() for x in whole]
    gate = None
    own_gate = None
    if pattern.gate is not None:
        gate = pattern.gate.clone().requires_grad_()
        own_gate = pattern.gate.clone().requires_grad_()
        whole.append(gate)
        own.append(own_gate)
    truth = hybrid_attention(
        *whole[:3], window=pattern.windows, gate=gate, documents=documents, backend="reference"
    )
    truths = torch.autograd.grad(truth, whole, upstream)
    own_pattern = HeadPattern(pattern.windows, own_gate, pattern.closed)
    out = cp.attend(*own[:3], own_pattern, documents, "reference")
    gradients = torch.autograd.grad(out, own, cp.own_part(upstream), allow_unused=True)

    def check_close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            found, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}"
        )

    check_close(out, cp.own_part(truth))
    for found, expected in zip(gradients[:3], truths[:3], strict=True):
        check_close(found, cp.own_part(expected))
    if gate is not None:
        # Each rank has the part of its own queries. Heads that are known to be closed have none.
        total = torch.zeros_like(gate) if gradients[3] is None else gradients[3]
        dist.all_reduce(total)
        check_close(total, truths[3])


def test_a_divided_sequence_attends_as_the_whole() -> None:
    run(check_equals_the_whole, 3)


@contextmanager
def counted_traffic() -> Iterator[dict[str, int]]:
    """Yields how many elements this rank sends to neighbours, and how many it gathers."""
    counted = {"sent": 0, "gathered": 0}
    send = dist.batch_isend_irecv
    gather = dist.all_gather_into_tensor

    def counting_send(operations: list[dist.P2POp]) -> object:
        for operation in operations:
            if operation.op is dist.isend:
                counted["sent"] += operation.tensor.numel()
        return send(operations)

    def counting_gather(out: Tensor, own: Tensor, **arguments: object) -> object:
        counted["gathered"] += out.numel()
        return gather(out, own, **arguments)

    with (
        patch.object(dist, "batch_isend_irecv", counting_send),
        patch.object(dist, "all_gather_into_tensor", counting_gather),
    ):
        yield counted


def check_traffic(cp: ContextParallel) -> None:
    length = 2 * cp.size * CHUNK
    q, k, v = (cp.own_part(draw(length, heads, 0)) for heads in (4 * GROUP, 4, 4))
    key_and_value = 2 * BATCH * DIM
    neighbours = (cp.rank > 0) + (cp.rank < cp.size - 1)
    with counted_traffic() as counted:
        cp.attend(q, k, v, PATTERNS["windowed"], None, "reference")
    assert counted == {"sent": neighbours * 4 * 4 * key_and_value, "gathered": 0}
    with counted_traffic() as counted:
        cp.attend(q, k, v, PATTERNS["one key"], None, "reference")
    assert counted == {"sent": 0, "gathered": length * key_and_value}
    with counted_traffic() as counted:
        cp.attend(q, k, v, PATTERNS["gated, one known to be closed"], None, "reference")
    assert counted == {
        "sent": neighbours * 4 * key_and_value,
        "gathered": 3 * length * key_and_value,
    }


def test_windowed_heads_get_no_more_than_their_windows() -> None:
    """Each neighbour gets the W - 1 last keys of one chunk. Only full heads gather."""
    run(check_traffic, 3)


def test_chunks_cost_the_same_and_cover_the_sequence() -> None:
    size = 4
    chunks = [ContextParallel(rank, size).chunks for rank in range(size)]
    assert sorted(chunk for own in chunks for chunk in own) == list(range(2 * size))
    assert {sum(own) for own in chunks} == {2 * size - 1}
