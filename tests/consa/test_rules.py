"""Which units the rules keep full; names and shares are tested with the command rule-masks."""

from __future__ import annotations

import pytest

from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError


def drawn(allocation: Allocation) -> list[str]:
    """One string a layer, from the bottom; F is full."""
    return ["".join("F" if full else "." for full in row) for row in allocation.full]


def test_interleaved_puts_the_full_layer_last() -> None:
    assert drawn(rules.interleaved(7, 2, 16, 2)) == ["..", "..", "FF", "..", "..", "FF", ".."]
    assert rules.interleaved(7, 2, 16, 2).target_sparsity == pytest.approx(5 / 7)


def test_bottom_swa_puts_the_windows_below() -> None:
    assert drawn(rules.bottom_swa(4, 2, 16, 0.75)) == ["..", "..", "..", "FF"]


def test_head_share_keeps_the_first_heads() -> None:
    assert drawn(rules.head_share(2, 4, 16, 0.75)) == ["F...", "F..."]


def test_what_a_rule_cannot_make_is_refused() -> None:
    with pytest.raises(InputError, match="ratio=0 of the interleaved rule must be at least 1"):
        rules.interleaved(4, 2, 16, 0)
    with pytest.raises(InputError, match="cannot be met by 4 layers"):
        rules.bottom_swa(4, 2, 16, 0.3)
