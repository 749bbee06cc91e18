"""The counter-based random generator.

Its words equal the known answers of Random123. Its uniform numbers depend only on their place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaconsa.consa import philox

ALL_ONES = 0xFFFFFFFF


def words(*values: int) -> Any:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The answers are from kat_vectors of Random123, for philox4x32 with ten rounds."""
    assert tuple(int(word) for word in philox.philox(words(*counter), key)) == expected


def test_each_number_is_philox_of_its_place() -> None:
    """Which counter word holds what must never change, because runs resume across versions."""
    seed = (0x01234567 << 32) | 0x89ABCDEF
    step = 1234
    numbers = philox.uniform(seed, step, torch.tensor([7, 3]), 3, 4)
    assert numbers.shape == (2, 3, 4)
    assert numbers.dtype == torch.float32
    for row, sequence in enumerate((7, 3)):
        for layer in range(3):
            for unit in range(4):
                word = int(
                    philox.philox(words(unit, layer, sequence, step), (0x89ABCDEF, 0x01234567))[0]
                )
                assert float(numbers[row, layer, unit]) == ((word >> 9) + 0.5) / 2**23


def test_subsets_and_other_splits_give_the_same_numbers() -> None:
    everything = philox.uniform(5, 17, torch.arange(12), 4, 6)
    assert torch.equal(
        philox.uniform(5, 17, torch.tensor([9, 2, 9, 0]), 4, 6), everything[[9, 2, 9, 0]]
    )
    for size in (1, 3, 5):
        parts = [philox.uniform(5, 17, part, 4, 6) for part in torch.arange(12).split(size)]
        assert torch.equal(torch.cat(parts), everything)
    assert torch.equal(philox.uniform(5, 17, torch.arange(12), 2, 3), everything[:, :2, :3])


def test_seed_step_sequence_layer_and_unit_all_count() -> None:
    """Numbers recur only as often as birthday collisions of 23 bits allow.

    So none of the five inputs is ignored or mixed up with another.
    """
    seeds = (0, 1, 1 << 32, (1 << 32) + 1)
    numbers = torch.stack(
        [philox.uniform(seed, step, torch.arange(8), 8, 8) for seed in seeds for step in range(8)]
    )
    draws = numbers.numel()
    collisions = draws - len(numbers.unique())
    assert collisions <= 5 * draws**2 / 2 / 2**23


@pytest.mark.parametrize(("word", "expected"), [(0, 2.0**-24), (ALL_ONES, 1 - 2.0**-24)])
def test_extreme_words_stay_inside_the_open_interval(
    word: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extreme(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(part, word) for part in torch.broadcast_tensors(*counter))

    monkeypatch.setattr(philox, "philox", extreme)
    numbers = philox.uniform(0, 0, torch.arange(2), 2, 2)
    assert bool((numbers == expected).all())
    assert bool(torch.logit(numbers).isfinite().all())


def test_mean_variance_and_neighbours() -> None:
    """All figures lie within five standard deviations. The draws are the same every time."""
    numbers = philox.uniform(11, 3, torch.arange(512), 28, 16).double()
    count = numbers.numel()
    assert abs(float(numbers.mean()) - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(float(numbers.var()) - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    centred = numbers - 0.5
    others = [centred.roll(1, dims=dim) for dim in range(3)] + [
        philox.uniform(11, 4, torch.arange(512), 28, 16).double() - 0.5
    ]
    for other in others:
        assert abs(float((centred * other).mean()) * 12) < 5 / count**0.5
