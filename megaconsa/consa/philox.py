"""Random numbers as a pure function of a counter: Philox4x32-10.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

A gate's sample must be the same on every rank, in every topology and in each recomputation of a
layer. A stateful generator cannot guarantee that. A counter-based generator can, because it has no
state. It uses integer arithmetic only, so CPU and GPU agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the ten rounds of Philox.

    counter: four 32-bit words in int64 tensors, which are broadcast against each other.
    key: two 32-bit words.

    Returns four 32-bit random words in int64 tensors of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # The products wrap as signed 64-bit integers.
        # Masking after the shift recovers the unsigned halves.
        first = c0 * _MULTIPLIERS[0]
        second = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, step: int, sequences: Tensor, num_layers: int, num_units: int) -> Tensor:
    """Uniform numbers in (0, 1) for every (sequence, layer, unit) of one optimizer step.

    sequences: (N,) int64, the sequences' indices within the global batch.

    Returns fp32 (N, num_layers, num_units).
    """
    device = sequences.device
    # The counter is (unit, layer, sequence, step), and the key is the seed.
    counter = (
        torch.arange(num_units, device=device),
        torch.arange(num_layers, device=device)[:, None],
        sequences[:, None, None],
        torch.tensor(step, device=device),
    )
    key = (seed & _MASK, (seed >> 32) & _MASK)
    words = philox(counter, key)
    # 23 random bits plus a half: exact in fp32 and never 0 or 1.
    return ((words[0] >> 9).float() + 0.5) * 2.0**-23
