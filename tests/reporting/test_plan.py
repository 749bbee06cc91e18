"""The command plan: parameters, memory, FLOPs, budgets and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaconsa import config
from megaconsa.consa import rules
from megaconsa.errors import InputError
from megaconsa.model.flops import training_flops
from megaconsa.planning.plan import make_plan
from megaconsa.tools import plan as plan_tool
from tests.support.plans import SETTINGS, planned, shown


def test_json(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_tool.main(settings, gpus=8, context=131_072, mfu=0.4, as_json=True)
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 596_049_920
    assert plan["tokens"] == 1000 * 64 * 8192
    assert plan["accumulation"] == 2
    memory = plan["memory"]
    parameters = plan["parameters"]
    assert memory["weights"] == 2 * parameters
    assert memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == 12 * parameters // 8
    assert memory["total"] == sum(
        memory[part] for part in ("weights", "gradients", "optimizer", "activations", "logits")
    )
    assert (
        memory["activations"]
        == memory["activations_kept"]
        > 10 * memory["activations_checkpointed"]
    )
    # Learning is estimated as dense. The finished table saves FLOPs and half of the growth of the
    # cache.
    assert plan["seconds"] == pytest.approx(
        plan["tokens"] * plan["dense"]["flops_per_token"] / (8 * 989e12 * 0.4)
    )
    assert plan["allocation"]["flops_per_token"] < plan["dense"]["flops_per_token"]
    assert (
        plan["allocation"]["kv_cache_bytes_per_token"] * 2
        == plan["dense"]["kv_cache_bytes_per_token"]
        == 28 * 8 * 512
    )
    assert plan["allocation"]["kv_cache_bytes"] == 28 * 4 * 512 * (131_072 + 1023)


def test_table(settings: Path) -> None:
    text = shown(planned(settings))
    for words in ("596,049,920", "6.39 GFLOP", "learn, 50% windowed, W=1024", "112.00 KiB"):
        assert words in text


def test_checkpointing_and_precision(settings: Path) -> None:
    kept = planned(settings)
    checkpointed = planned(settings, "training.activation_checkpointing=true")
    assert checkpointed.memory.activations == kept.memory.activations_checkpointed
    exact = planned(settings, "training.precision=fp32")
    assert exact.memory.weights == 2 * kept.memory.weights
    assert exact.memory.activations == 2 * kept.memory.activations


def test_memory_budget(settings: Path) -> None:
    kept = planned(settings)
    assert kept.to_dict()["recomputed"] == {"heads": (), "whole": ()}
    # bf16, 4 x 8192 tokens, 16 query heads and 8 KV heads of dimension 128.
    of_heads = 2 * 4 * 8192 * (16 + 8) * 128
    assert 28 * of_heads == 5.25 * 2**30
    budget = (kept.memory.total - 19.5 * of_heads) / 2**30
    plan = planned(settings, f"training.memory_gib={budget}")
    assert plan.to_dict()["recomputed"] == {"heads": tuple(range(20)), "whole": ()}
    assert plan.memory.activations == kept.memory.activations - 20 * of_heads
    assert plan.memory.activations_kept == kept.memory.activations_kept
    assert "q and k of 20 of 28 layers" in shown(plan)
    assert "recomputed" not in shown(kept)


def test_rule_and_file(settings: Path, tmp_path: Path) -> None:
    rule = planned(settings, "allocation.source=rule", "allocation.rule=interleaved")
    assert rule.sparsity == 0.75
    assert rule.seconds == pytest.approx(
        rule.tokens * rule.allocation.flops_per_token / (989e12 * 0.4)
    )
    table = rules.head_share(28, 8, 512, 0.25)
    table.save(tmp_path / "allocation.json")
    file = planned(
        settings, "allocation.source=file", f"allocation.file={tmp_path / 'allocation.json'}"
    )
    assert (file.window, file.sparsity) == (512, 0.25)
    shape = config.load(settings).to_model_config()
    assert file.allocation.flops_per_token == training_flops(shape, table, 8192, [8192]) / 8192


def test_layer_granularity_learns(settings: Path) -> None:
    plan = planned(
        settings,
        "allocation.granularity=layer",
        "allocation.scope=global",
        "allocation.sparsity=0.25",
    )
    assert plan.sparsity == 0.25


def test_budget(settings: Path) -> None:
    assert planned(settings).budget is None
    settings.write_text(
        SETTINGS.replace(", sparsity: 0.5", ", cache_share: 0.35, context: 131072, scope: global")
    )
    plan = make_plan(config.load(settings), 1, "h100", 0.4, context=131_072)
    assert plan.sparsity == pytest.approx(147 / 224)
    assert plan.allocation.kv_cache_bytes <= 0.35 * plan.dense.kv_cache_bytes
    assert plan.to_dict()["budget"] == {
        "quantity": "cache_share",
        "limit": 0.35,
        "context": 131_072,
    }
    text = " ".join(shown(plan).split())
    assert "target sparsity 0.65625 from allocation.cache_share=0.35 at 131072 tokens" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "--gpu abacus"),
        ({"device": "h1000"}, "did you mean h100?"),
        ({"mfu": 0.0}, "--mfu 0 "),
        ({"mfu": float("nan")}, "--mfu nan"),
        ({"gpus": 3}, "training.global_batch=64.*use 60 or 72"),
        ({"gpus": 5}, "use 60 or 80"),
    ],
)
def test_refusals(settings: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(settings, **arguments)


def test_file_of_another_shape_is_refused(settings: Path, tmp_path: Path) -> None:
    rules.dense(2, 2, 4).save(tmp_path / "allocation.json")
    with pytest.raises(InputError, match="2 layers x 2 KV heads"):
        planned(
            settings, "allocation.source=file", f"allocation.file={tmp_path / 'allocation.json'}"
        )
