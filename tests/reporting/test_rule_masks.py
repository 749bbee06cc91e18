"""The command rule-masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.tools import rule_masks


@pytest.mark.parametrize("rule", rules.RULES)
def test_rule_masks(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "allocation.json"
    rule_masks.main(rule, window=64, out=out, layers=8, kv_heads=4, sparsity=0.25, ratio=1, seed=0)
    allocation = Allocation.load(out)
    assert (allocation.num_layers, allocation.num_kv_heads, allocation.window) == (8, 4, 64)
    without_target = {"dense": 0.0, "all-swa": 1.0, "interleaved": 0.5}
    assert allocation.sparsity == without_target.get(rule, 0.25)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("layer 0")
    assert printed[7].startswith("layer 7")
    assert sum(line.count("██") for line in printed) == sum(map(sum, allocation.full))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best", "preset": "tiny"}, "rule 'best' is unknown"),
        (
            {"rule": "random", "preset": "tiny"},
            "rule random needs a seed; give one, for example --seed 0",
        ),
        (
            {
                "rule": "random",
                "preset": "tiny",
                "seed": 0,
                "granularity": "layer",
                "scope": "per_layer",
            },
            "allocation.scope=per_layer cannot hold with allocation.granularity=layer",
        ),
        ({"rule": "dense", "preset": "qwen9"}, "--preset qwen9"),
        ({"rule": "dense"}, "either --preset or both"),
        ({"rule": "dense", "layers": 4}, "either --preset or both"),
        (
            {"rule": "dense", "preset": "tiny", "layers": 4, "kv_heads": 2},
            "either --preset or both",
        ),
        ({"rule": "head-share", "preset": "tiny", "sparsity": 0.3}, "cannot be met"),
    ],
)
def test_rule_masks_refuses(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        rule_masks.main(window=64, out=tmp_path / "allocation.json", **arguments)
    assert not list(tmp_path.iterdir())
