"""megaconsa plan and rule-masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaconsa import config
from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.console import console
from megaconsa.errors import InputError
from megaconsa.model.flops import training_flops
from megaconsa.reporting.plan import Plan, make_plan, plan_table
from megaconsa.tools import plan as plan_tool
from megaconsa.tools import rule_masks

SETTINGS = """
run: {dir: run}
model: {preset: qwen3-0.6b}
attention: {window: 1024}
allocation: {source: learn, sparsity: 0.5}
training: {steps: 1000, micro_batch: 4, global_batch: 64, sequence_length: 8192, learning_rate: 1.0e-3}
data: {path: data}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(SETTINGS)
    return path


def planned(settings: Path, *overrides: str, gpus: int = 1, device: str = "h100", mfu: float = 0.4) -> Plan:
    return make_plan(config.load(settings, list(overrides)), gpus, device, mfu)


def test_json(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_tool.main(settings, gpus=8, context=131_072, json=True)
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 596_049_920
    assert plan["tokens"] == 1000 * 64 * 8192
    assert plan["accumulation"] == 2
    memory, parameters = plan["memory"], plan["parameters"]
    assert memory["weights"] == 2 * parameters
    assert memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == 12 * parameters // 8
    assert memory["total"] == sum(memory[part] for part in ("weights", "gradients", "optimizer", "activations", "logits"))
    assert memory["activations"] == memory["activations_kept"] > 10 * memory["activations_checkpointed"]
    # Learning is reckoned as dense; the finished table saves FLOPs and half of the cache's growth.
    assert plan["seconds"] == pytest.approx(plan["tokens"] * plan["dense"]["flops_per_token"] / (8 * 989e12 * 0.4))
    assert plan["allocation"]["flops_per_token"] < plan["dense"]["flops_per_token"]
    assert plan["allocation"]["kv_cache_bytes_per_token"] * 2 == plan["dense"]["kv_cache_bytes_per_token"] == 28 * 8 * 512
    assert plan["allocation"]["kv_cache_bytes"] == 28 * 4 * 512 * (131_072 + 1023)


def test_table(settings: Path) -> None:
    with console.capture() as capture:
        console.print(plan_table(planned(settings)))
    for words in ("596,049,920", "6.39 GFLOP", "learn, 50% windowed, W=1024", "112.00 KiB"):
        assert words in capture.get()


def test_checkpointing_and_precision(settings: Path) -> None:
    kept, checkpointed = planned(settings), planned(settings, "training.activation_checkpointing=true")
    assert checkpointed.memory.activations == kept.memory.activations_checkpointed
    exact = planned(settings, "training.precision=fp32")
    assert exact.memory.weights == 2 * kept.memory.weights
    assert exact.memory.activations == 2 * kept.memory.activations


def test_rule_and_file(settings: Path, tmp_path: Path) -> None:
    rule = planned(settings, "allocation.source=rule", "allocation.rule=interleaved")
    assert rule.sparsity == 0.75
    assert rule.seconds == pytest.approx(rule.tokens * rule.allocation.flops_per_token / (989e12 * 0.4))
    table = rules.head_share(28, 8, 512, 0.25)
    table.save(tmp_path / "allocation.json")
    file = planned(settings, "allocation.source=file", f"allocation.file={tmp_path / 'allocation.json'}")
    assert (file.window, file.sparsity) == (512, 0.25)
    shape = config.load(settings).shape()
    assert file.allocation.flops_per_token == training_flops(shape, table, 8192, [8192]) / 8192


def test_layer_granularity_learns(settings: Path) -> None:
    plan = planned(settings, "allocation.granularity=layer", "allocation.scope=global", "allocation.sparsity=0.25")
    assert plan.sparsity == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "--device abacus"),
        ({"mfu": 0.0}, "--mfu 0 "),
        ({"mfu": float("nan")}, "--mfu nan"),
        ({"gpus": 3}, "training.global_batch=64"),
    ],
)
def test_refusals(settings: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(settings, **arguments)


def test_file_of_another_shape_is_refused(settings: Path, tmp_path: Path) -> None:
    rules.dense(2, 2, 4).save(tmp_path / "allocation.json")
    with pytest.raises(InputError, match="2 layers x 2 KV heads"):
        planned(settings, "allocation.source=file", f"allocation.file={tmp_path / 'allocation.json'}")


@pytest.mark.parametrize("rule", rules.RULES)
def test_rule_masks(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "allocation.json"
    rule_masks.main(rule, window=64, out=out, layers=8, kv_heads=4, sparsity=0.25, ratio=1)
    allocation = Allocation.load(out)
    assert (allocation.num_layers, allocation.num_kv_heads, allocation.window) == (8, 4, 64)
    expected = {"dense": 0.0, "all-swa": 1.0, "interleaved": 0.5, "head-share": 0.25, "bottom-swa": 0.25}[rule]
    assert allocation.sparsity == expected
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("layer 7")
    assert printed[7].startswith("layer 0")
    assert sum(line.count("██") for line in printed) == sum(map(sum, allocation.full))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "random", "preset": "tiny"}, "rule 'random' is unknown"),
        ({"rule": "dense", "preset": "qwen9"}, "--preset qwen9"),
        ({"rule": "dense"}, "either --preset or both"),
        ({"rule": "dense", "layers": 4}, "either --preset or both"),
        ({"rule": "dense", "preset": "tiny", "layers": 4, "kv_heads": 2}, "either --preset or both"),
        ({"rule": "head-share", "preset": "tiny", "sparsity": 0.3}, "cannot be met"),
    ],
)
def test_rule_masks_refuses(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        rule_masks.main(window=64, out=tmp_path / "allocation.json", **arguments)
    assert not list(tmp_path.iterdir())
