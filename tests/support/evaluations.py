"""What the tests of `megaconsa evaluate` share."""

from __future__ import annotations

from collections.abc import Callable

Done = Callable[..., str]
Refused = Callable[..., str]
SMALL = (
    "--documents",
    3,
    "--length",
    32,
    "--needle-length",
    80,
    "--needle-length",
    100,
    "--depth",
    0,
    "--depth",
    1,
    "--needles",
    2,
)
