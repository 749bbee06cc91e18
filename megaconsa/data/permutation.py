"""A shuffle of any size that needs no memory: a keyed permutation of 0 .. N - 1.

It is a Feistel network (Luby and Rackoff 1988) over pairs (l, r) of digits 0 .. a - 1, where
a = ceil(sqrt(N)). The pair stands for the number l * a + r. Each round maps (l, r) to
(r, l + f(r) mod a), which is a bijection for any function f. Numbers from N to a * a - 1 are mapped
again until they fall below N (cycle walking), which keeps it a bijection.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 8


class Permutation:
    """A permutation of 0 .. size - 1 that depends on its key alone."""

    def __init__(self, size: int, *key: int) -> None:
        """Makes the permutation.

        size: N, at least 1.
        key: numbers of at least 0, such as a seed and an epoch.
        """
        self.size = size
        self._base = np.uint64(max(1, math.isqrt(size - 1) + 1))
        # NumPy promises that SeedSequence gives the same numbers in every release.
        self._keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The numbers at some places.

        places: integers in 0 .. size - 1, of any shape.

        Returns int64 of the same shape.
        """
        numbers = self._mapped(places.astype(np.uint64))
        while (outside := numbers >= np.uint64(self.size)).any():
            numbers[outside] = self._mapped(numbers[outside])
        return numbers.astype(np.int64)

    def _mapped(self, numbers: np.ndarray) -> np.ndarray:
        """One pass through the network."""
        left, right = np.divmod(numbers, self._base)
        for key in self._keys:
            left, right = right, (left + _mixed(right + key) % self._base) % self._base
        return left * self._base + right


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hashes of 64-bit numbers: the last step of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
