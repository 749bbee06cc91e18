"""megaconsa plan and rule-masks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megaconsa import config
from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.console import console
from megaconsa.errors import InputError
from megaconsa.model.flops import training_flops, visible_pairs
from megaconsa.parallel.stages import cut, layer_costs
from megaconsa.planning.plan import Plan, make_plan
from megaconsa.planning.table import plan_table
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


def planned(
    settings: Path, *overrides: str, gpus: int = 1, device: str = "h100", mfu: float = 0.4
) -> Plan:
    return make_plan(config.load(settings, list(overrides)), gpus, device, mfu)


def test_json(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_tool.main(settings, gpus=8, context=131_072, json=True)
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 596_049_920
    assert plan["tokens"] == 1000 * 64 * 8192
    assert plan["accumulation"] == 2
    memory, parameters = plan["memory"], plan["parameters"]
    assert memory["weights"] == 2 * parameters
    assert memory["gradients"] == 6 * parameters
    assert memory["optimizer"] == 12 * parameters // 8
    assert memory["total"] == sum(
        memory[part] for part in ("weights", "gradients", "optimizer", "activations", "logits")
    )
    assert (
        memory["activations"]
        == memory["activations_kept"]
        > 10 * memory["activations_checkpointed"]
    )
    # Learning is reckoned as dense; the finished table saves FLOPs and half of the cache's growth.
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
    with console.capture() as capture:
        console.print(plan_table(planned(settings)))
    for words in ("596,049,920", "6.39 GFLOP", "learn, 50% windowed, W=1024", "112.00 KiB"):
        assert words in capture.get()


def test_checkpointing_and_precision(settings: Path) -> None:
    kept, checkpointed = (
        planned(settings),
        planned(settings, "training.activation_checkpointing=true"),
    )
    assert checkpointed.memory.activations == kept.memory.activations_checkpointed
    exact = planned(settings, "training.precision=fp32")
    assert exact.memory.weights == 2 * kept.memory.weights
    assert exact.memory.activations == 2 * kept.memory.activations


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
    shape = config.load(settings).shape()
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
    with console.capture() as capture:
        console.print(plan_table(plan))
    text = " ".join(capture.get().split())  # a narrow terminal wraps the cell
    assert "target sparsity 0.65625 from allocation.cache_share=0.35 at 131072 tokens" in text


def on_ranks(settings: Path, gpus: int, *overrides: str) -> Plan:
    """With an allocation whose full heads are all in the first half of each layer."""
    return planned(
        settings, "allocation.source=rule", "allocation.rule=head-share", *overrides, gpus=gpus
    )


def test_one_gpu_waits_for_nobody(settings: Path) -> None:
    plan = planned(settings)
    assert (
        plan.bubble,
        plan.pipeline_imbalance,
        plan.tensor_balance.imbalance,
        plan.efficiency,
    ) == (0, 1, 1, 1)
    assert [(rank.layers, rank.in_flight, rank.cost_share) for rank in plan.pipeline] == [
        ([(0, 31)], [1], 1)
    ]
    assert plan.pipeline[0].memory == plan.memory


def test_tensor_ranks(settings: Path) -> None:
    """Half of each layer's heads are full: a rank that had only these would compute 1.2 times the mean."""
    plan = on_ranks(settings, 8, "parallel.tensor=2")
    assert (plan.tensor_ranks, plan.data_ranks, plan.accumulation) == (2, 4, 4)
    assert plan.tensor_balance.full_heads == [56, 56]
    assert plan.tensor_balance.full_heads_unpermuted == [112, 0]
    assert (plan.tensor_balance.imbalance, plan.efficiency) == (1, 1)
    full, windowed = (visible_pairs(8192, window) for window in (8192, 1024))
    attention = plan.allocation.attention_share
    assert plan.tensor_balance.imbalance_unpermuted == pytest.approx(
        1 - attention + attention * 2 * full / (full + windowed)
    )
    uneven = on_ranks(settings, 8, "parallel.tensor=8", "allocation.sparsity=0.375")
    # 5 full heads a layer on 8 ranks: each layer waits for a rank that has one, and over 28 layers 140 are dealt out in turn.
    assert uneven.tensor_balance.full_heads == [18] * 4 + [17] * 4
    assert uneven.efficiency == pytest.approx(1 / uneven.tensor_balance.imbalance)
    assert uneven.efficiency < 0.9
    assert uneven.tokens_per_second == pytest.approx(
        8 * 989e12 * 0.4 * uneven.efficiency / uneven.allocation.flops_per_token
    )


def test_learning_heads_cost_alike(settings: Path) -> None:
    balance = planned(settings, "parallel.tensor=4", gpus=4).tensor_balance
    assert balance.full_heads == balance.full_heads_unpermuted == [56] * 4
    assert balance.imbalance == balance.imbalance_unpermuted == 1


def test_memory_of_tensor_ranks(settings: Path) -> None:
    """Norms stand whole on each rank; with sequence parallelism it keeps half of the norms' inputs, and their outputs gathered."""
    one, two = planned(settings), planned(settings, "parallel.tensor=2", gpus=2)
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert two.memory.weights == one.memory.weights // 2 + norms
    tokens = 4 * 8192
    whole = planned(settings, "parallel.tensor=2", "parallel.sequence=false", gpus=2)
    assert whole.memory.activations - two.memory.activations == 28 * 2 * tokens * 2 * 512
    assert whole.memory.activations > one.memory.activations // 2
    checkpointed = [each.memory.activations_checkpointed for each in (one, whole, two)]
    inputs = 28 * 2 * tokens * 1024
    assert checkpointed[1] - (whole.memory.activations_kept // 28) == inputs
    assert checkpointed[2] - (two.memory.activations_kept // 28) == inputs // 2
    padded = planned(settings, "parallel.tensor=2", "model.vocab_size=151935", gpus=2)
    assert padded.memory.weights == two.memory.weights


def test_pipeline_ranks(settings: Path) -> None:
    plan = on_ranks(
        settings,
        8,
        "parallel.pipeline=4",
        "training.micro_batch=1",
        "model.tie_word_embeddings=false",
    )
    assert (plan.pipeline_ranks, plan.data_ranks, plan.accumulation) == (4, 2, 32)
    shape = config.load(settings).shape()
    costs = layer_costs(shape, rules.head_share(28, 8, 1024, 0.5), 8192)
    bounds = cut(costs, 4)
    assert [rank.layers for rank in plan.pipeline] == [[each] for each in pairwise(bounds)]
    assert [rank.in_flight for rank in plan.pipeline] == [[4], [3], [2], [1]]
    assert sum(rank.cost_share for rank in plan.pipeline) == pytest.approx(1)
    assert plan.pipeline_imbalance == pytest.approx(
        4 * max(rank.cost_share for rank in plan.pipeline)
    )
    assert plan.bubble == pytest.approx(3 / 35)
    assert plan.efficiency == pytest.approx((1 - plan.bubble) / plan.pipeline_imbalance)
    assert plan.seconds == pytest.approx(
        plan.tokens * plan.allocation.flops_per_token / (8 * 989e12 * 0.4 * plan.efficiency)
    )
    # All weights once, in bf16; activations of each rank's layers for its micro-batches in flight; logits at the end alone.
    assert sum(rank.memory.weights for rank in plan.pipeline) == 2 * plan.parameters
    layer = (
        planned(
            settings, "training.micro_batch=1", "allocation.source=rule"
        ).memory.activations_kept
        // 28
    )
    blocks = [
        len([each for each in range(1, 29) if start <= each < stop])
        for start, stop in pairwise(bounds)
    ]
    assert [rank.memory.activations_kept for rank in plan.pipeline] == [
        count * flight * layer for count, flight in zip(blocks, (4, 3, 2, 1), strict=True)
    ]
    assert [rank.memory.logits > 0 for rank in plan.pipeline] == [False, False, False, True]
    assert plan.memory == max(
        (rank.memory for rank in plan.pipeline), key=lambda memory: memory.total
    )
    for rank in plan.pipeline:
        assert rank.memory.gradients == 3 * rank.memory.weights
        assert rank.memory.optimizer == 6 * rank.memory.weights // 2


def test_where_a_tied_embedding_stands(settings: Path) -> None:
    """On the first and the last stage, which DualPipeV puts on one rank."""
    embedding = 2 * 151_936 * 1024
    overrides = ["parallel.pipeline=2", "training.micro_batch=1"]
    for schedule, copies in (("1f1b", 2), ("dualpipev", 1)):
        plan = on_ranks(settings, 2, *overrides, f"parallel.schedule={schedule}")
        assert (
            sum(rank.memory.weights for rank in plan.pipeline)
            == 2 * plan.parameters + (copies - 1) * embedding
        )


def test_dualpipev(settings: Path) -> None:
    plan = on_ranks(
        settings, 2, "parallel.pipeline=2", "training.micro_batch=1", "parallel.schedule=dualpipev"
    )
    first, second = plan.pipeline
    assert first.layers[0][0] == 0
    assert first.layers[1][1] == 31
    assert second.layers == [
        (first.layers[0][1], second.layers[0][1]),
        (second.layers[0][1], first.layers[1][0]),
    ]
    assert (first.in_flight, second.in_flight) == ([4, 1], [3, 2])
    assert first.memory.logits > second.memory.logits == 0
    assert plan.bubble == pytest.approx(4 / (6 * 64 + 4))


def test_table_of_ranks(settings: Path) -> None:
    def shown(*overrides: str) -> str:
        plan = on_ranks(settings, 8, "training.micro_batch=1", "parallel.tensor=2", *overrides)
        with console.capture() as capture:
            console.print(plan_table(plan), width=200)
        return capture.get()

    table = shown("parallel.pipeline=2")
    for words in (
        "Memory of the fullest GPU",
        "Pipeline, 1f1b",
        "embedding, layers 0-",
        "-27, head; ",
        "in flight 2",
        "bubble",
        "56 56",
    ):
        assert words in table
    assert "in the model's order 112 0" in table
    assert "GPUs busy" in table
    assert "Pipeline" not in shown()
    assert " and layers " in shown("parallel.pipeline=2", "parallel.schedule=dualpipev")


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


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (
            6,
            ("parallel.tensor=4",),
            "6 processes are not a multiple of parallel.tensor=4 x parallel.pipeline=1",
        ),
        (
            32,
            ("parallel.pipeline=2",),
            "fewer than the 2 stages of parallel.pipeline=2: stages would idle",
        ),
        (
            16,
            ("parallel.pipeline=2", "parallel.schedule=dualpipev"),
            "parallel.schedule=dualpipev cannot run",
        ),
        (
            8,
            ("parallel.tensor=3",),
            "parallel.tensor=3 does not divide model.num_key_value_heads=8",
        ),
        (64, ("parallel.pipeline=32",), "28 layers and the output head make at most 29"),
    ],
)
def test_topologies_that_cannot_work_are_refused(
    settings: Path, gpus: int, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        planned(settings, *overrides, gpus=gpus)


def test_file_of_another_shape_is_refused(settings: Path, tmp_path: Path) -> None:
    rules.dense(2, 2, 4).save(tmp_path / "allocation.json")
    with pytest.raises(InputError, match="2 layers x 2 KV heads"):
        planned(
            settings, "allocation.source=file", f"allocation.file={tmp_path / 'allocation.json'}"
        )


@pytest.mark.parametrize("rule", rules.RULES)
def test_rule_masks(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "allocation.json"
    rule_masks.main(rule, window=64, out=out, layers=8, kv_heads=4, sparsity=0.25, ratio=1, seed=0)
    allocation = Allocation.load(out)
    assert (allocation.num_layers, allocation.num_kv_heads, allocation.window) == (8, 4, 64)
    without_target = {"dense": 0.0, "all-swa": 1.0, "interleaved": 0.5}
    assert allocation.sparsity == without_target.get(rule, 0.25)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("layer 7")
    assert printed[7].startswith("layer 0")
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
            {"rule": "random", "preset": "tiny", "seed": 0, "granularity": "layer"},
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
