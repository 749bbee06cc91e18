"""The command plan before stage 1, its verdict, what it proposes, and what it assumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaconsa import config
from megaconsa.consa import rules
from megaconsa.errors import InputError
from megaconsa.planning.cards import find_card
from megaconsa.planning.changes import smallest_change, topologies
from megaconsa.planning.memory import received_tokens
from megaconsa.planning.plan import make_plan
from megaconsa.planning.speed import CONTEXT, DATA, DENSE, LEARNING, TENSOR
from megaconsa.planning.table import topology_table, verdict
from megaconsa.tables import records
from tests.support.plans import SETTINGS, planned, shown

FILE = ("allocation.source=file", "allocation.file=missing.json")
HEADS = ("allocation.source=rule", "allocation.rule=head-share")


def test_before_stage_one(settings: Path, tmp_path: Path) -> None:
    """The target is assumed: of the run that stage 2 starts from, or allocation.sparsity."""
    plan = planned(settings, *FILE, "allocation.sparsity=0.75")
    assert plan.sparsity == 0.75
    assert "missing.json does not exist yet: sparsity 0.75 is assumed" in shown(plan)
    # Evenly spread heads are the rule head-share.
    rule = planned(settings, *HEADS, "allocation.sparsity=0.75")
    assert (plan.allocation, plan.seconds) == (rule.allocation, rule.seconds)
    first = tmp_path / "learn"
    first.mkdir()
    (first / "config.yaml").write_text(SETTINGS.replace("sparsity: 0.5", "sparsity: 0.25"))
    later = planned(settings, *FILE, f"model.init_from={first}")
    assert later.sparsity == 0.25
    assert later.assumed is not None
    assert f"the target of {first}" in later.assumed
    rules.dense(28, 8, 1024).save(tmp_path / "made.json")
    made = planned(settings, FILE[0], f"allocation.file={tmp_path / 'made.json'}")
    assert (made.sparsity, made.assumed) == (0, None)


def test_verdict(settings: Path) -> None:
    fits = planned(settings, gpus=8)
    assert fits.fits
    assert verdict(fits, None)[0].startswith("fits in 80 GB (h100): ")
    overrides = ("model.preset=qwen3-1.7b", "training.micro_batch=8")
    loaded = config.load(settings, list(overrides))
    plan = make_plan(loaded, 1, "h100")
    assert not plan.fits
    change = smallest_change(loaded, plan, None)
    assert change is not None
    assert change.plan.fits
    # One field is enough. A budget would recompute, and smaller micro-batches gain nothing.
    assert change.fields == {"training.micro_batch": 2}
    proposed = planned(settings, *overrides, *str(change).split(), mfu=None)
    assert (proposed.memory, proposed.seconds) == (change.plan.memory, change.plan.seconds)
    first, second = verdict(plan, change)
    assert first.startswith("does not fit in 80 GB (h100): ")
    assert f"the smallest change that fits: {change}  (" in second
    assert make_plan(loaded, 1, "h200").fits


def test_more_gpus_are_the_last_resort(settings: Path) -> None:
    overrides = ["model.preset=qwen3-8b", "training.micro_batch=1"]
    loaded = config.load(settings, overrides)
    plan = make_plan(loaded, 1, "h100")
    change = smallest_change(loaded, plan, None)
    assert change is not None
    assert change.plan.gpus > 1
    assert f"--gpus {change.plan.gpus}" in verdict(plan, change)[1]


def test_cards() -> None:
    assert find_card("a100").gigabytes == 80
    assert find_card("a100-40gb").gigabytes == 40
    assert find_card("NVIDIA H200").gigabytes == 141


def test_topologies(settings: Path) -> None:
    loaded = config.load(settings, ["training.micro_batch=1"])
    plan = make_plan(loaded, 4, "h100")
    found = topologies(loaded, plan, None)
    ranks = [
        (each.tensor_ranks, each.context_ranks, each.pipeline_ranks, each.data_ranks)
        for each in found
    ]
    assert len(set(ranks)) == len(ranks) == 10
    assert ranks[0] == (1, 1, 1, 4)
    speeds = [each.tokens_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True)
    rows = records(topology_table(found))
    assert rows[0]["tokens/s"] == found[0].tokens_per_second
    assert rows[0]["fits"] is True


def test_assumed_mfu(settings: Path) -> None:
    """It depends on the topology, on learning and on recomputation, and the table says so."""
    one = planned(settings, mfu=None)
    assert one.mfu == LEARNING
    dense = planned(settings, "allocation.source=rule", mfu=None)
    assert dense.mfu == DENSE
    tensor = planned(settings, "allocation.source=rule", "parallel.tensor=2", gpus=2, mfu=None)
    assert tensor.mfu == pytest.approx(DENSE * TENSOR[2])
    assert "tensor ranks" in shown(tensor)
    context = planned(settings, "parallel.context=2", gpus=2, mfu=None)
    assert context.mfu == pytest.approx(LEARNING * DATA * CONTEXT)
    assert "not measured" in shown(context)
    again = planned(settings, "training.activation_checkpointing=true", mfu=None)
    assert again.mfu == pytest.approx(LEARNING * 3 / 4)
    assert "as given by --mfu" in shown(planned(settings))
    assert one.gpu_hours == pytest.approx(one.seconds / 3600)
    assert one.checkpoint_bytes == 12 * one.parameters


def test_json_lists_layers_of_the_model(settings: Path) -> None:
    plan = planned(settings, "model.preset=qwen3-4b")
    (rank,) = plan.to_dict()["pipeline"]
    assert rank["stages"] == [{"layers": [0, 36], "embedding": True, "head": True}]
    two = planned(settings, "model.preset=qwen3-4b", "parallel.pipeline=2", gpus=2)
    content = json.loads(json.dumps(two.to_dict()))
    first, last = content["pipeline"]
    assert first["stages"][0]["layers"][1] == last["stages"][0]["layers"][0]
    assert last["stages"][0]["layers"][1] == 36
    # Only the last rank has the head.
    assert first["memory"]["logits"] is None
    assert last["memory"]["logits"] > 0
    assert "0.00 B" not in shown(two)


@pytest.mark.parametrize(
    ("context", "window", "tokens"),
    [(1, None, 0), (4, None, 49_152), (4, 1024, 2046), (4, 9000, 49_152)],
)
def test_received_tokens(context: int, window: int | None, tokens: int) -> None:
    """The example of docs/parallelism.md: 65,536 tokens on four ranks."""
    assert received_tokens(65_536, context, window) == tokens


def test_context_ranks(settings: Path) -> None:
    """They divide activations and logits per token, and the optimizer, but not full heads' keys."""
    one = planned(settings, *HEADS)
    four = planned(settings, *HEADS, "parallel.context=4", gpus=4)
    assert (four.context_ranks, four.data_ranks) == (4, 1)
    assert four.memory.weights == one.memory.weights
    assert four.memory.optimizer == one.memory.optimizer // 4
    # bf16, 28 layers, 4 sequences, 4 of 8 heads of dimension 128 of each kind.
    of_token = 28 * 2 * 4 * 4 * 2 * 128
    full = of_token * 8192 * 3 // 4
    windowed = of_token * 2 * 1023
    assert four.memory.keys == full + windowed
    assert four.memory.activations == one.memory.activations // 4 + full + windowed
    assert four.memory.logits < one.memory.logits
    # Forward and backward, for each of 16 micro-batches.
    assert four.accumulation == 16
    assert four.traffic.context_gather == 16 * 2 * full
    assert four.traffic.context_halo == 16 * 2 * windowed
    assert planned(settings, "parallel.context=4", gpus=4).traffic.context_halo == 0
    recomputed = "training.activation_checkpointing=true"
    again = planned(settings, *HEADS, "parallel.context=4", recomputed, gpus=4)
    assert again.traffic.context_gather == 16 * 3 * full
    assert again.memory.activations == again.memory.activations_checkpointed


def test_tensor_and_context_ranks(settings: Path) -> None:
    plan = planned(settings, *HEADS, "parallel.context=2", "parallel.tensor=4", gpus=8)
    context = planned(settings, *HEADS, "parallel.context=2", gpus=2)
    assert plan.memory.keys == context.memory.keys // 4
    assert plan.traffic.tensor > 0 == context.traffic.tensor
    assert context.traffic.data == 6 * context.parameters // 2


def test_memory_budget_that_is_too_small_names_the_least(settings: Path) -> None:
    with pytest.raises(InputError, match=r"or raise it to 1[0-9]$") as refused:
        planned(settings, "training.memory_gib=5")
    least = str(refused.value).rsplit(" ", 1)[1]
    planned(settings, f"training.memory_gib={least}")
