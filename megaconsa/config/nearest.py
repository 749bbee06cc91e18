"""The nearest values that work, for refusals."""

from __future__ import annotations

from math import gcd


def nearest_multiples(value: int, of: int) -> str:
    """Returns the positive multiples next to `value`, for example `96 or 128`."""
    below = value // of * of
    if below == value:
        return str(value)
    if below == 0:
        return str(of)
    return f"{below} or {below + of}"


def nearest_divisors(value: int, *numbers: int) -> str:
    """Returns the common divisors of the numbers next to `value`, for example `2 or 4`."""
    common = gcd(*numbers)
    divisors = [each for each in range(1, common + 1) if common % each == 0]
    below = [each for each in divisors if each <= value][-1:]
    above = [each for each in divisors if each > value][:1]
    return " or ".join(str(each) for each in below + above)
