"""The command plan with tensor and pipeline ranks: shares, memory, imbalance and bubble."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from megaconsa import config
from megaconsa.consa import rules
from megaconsa.errors import InputError
from megaconsa.model.flops import visible_pairs
from megaconsa.parallel.stages import cut, layer_costs
from megaconsa.planning.plan import Plan
from tests.support.plans import planned, shown


def on_ranks(settings: Path, gpus: int, *overrides: str) -> Plan:
    """Plans with an allocation whose full heads are all in the first half of each layer."""
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
    """Half of the heads of each layer are full.

    A rank with only full heads would compute 1.2 times the mean.
    """
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
    # Each layer has 5 full heads on 8 ranks and waits for a rank that has one. Over 28 layers, the
    # 140 full heads are dealt out in turn.
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
    """Each rank holds whole norms.

    With sequence parallelism, it keeps half of the inputs of the norms, and their gathered outputs.
    """
    one = planned(settings)
    two = planned(settings, "parallel.tensor=2", gpus=2)
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
    shape = config.load(settings).to_model_config()
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
    # All weights appear once, in bf16. Activations are those of the layers of each rank, for its
    # micro-batches in flight. Only the last rank has logits.
    assert sum(rank.memory.weights for rank in plan.pipeline) == 2 * plan.parameters
    unsplit = planned(settings, "training.micro_batch=1", "allocation.source=rule")
    layer = unsplit.memory.activations_kept // 28
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
        assert rank.memory.gradients == 2 * rank.memory.weights
        assert rank.memory.optimizer == 6 * rank.memory.weights // 2


def test_memory_budget_of_each_rank(settings: Path) -> None:
    """Two micro-batches are in flight on the first rank, and one on the second.

    Tensor ranks divide q and k.
    """
    overrides = ("parallel.pipeline=2", "parallel.tensor=2")
    kept = on_ranks(settings, 4, *overrides)
    of_heads = 2 * 4 * 8192 * (16 + 8) * 128 // 2
    split = kept.pipeline[0].layers[0][1] - 1
    for rank, flight, layers in ((0, 2, (0, 1)), (1, 1, (split, split + 1))):
        budget = kept.pipeline[rank].memory.total - 2 * flight * of_heads
        plan = on_ranks(settings, 4, *overrides, f"training.memory_gib={budget / 2**30}")
        own = tuple(layer for layer in plan.recomputed.heads if (layer >= split) == rank)
        assert own == layers
        assert plan.pipeline[rank].memory.total == budget
        assert plan.memory.total <= budget


def test_where_a_tied_embedding_stands(settings: Path) -> None:
    """It is on the first and the last stage, which DualPipeV puts on one rank."""
    embedding = 2 * 151_936 * 1024
    overrides = ["parallel.pipeline=2", "training.micro_batch=1"]
    for schedule, copies in (("1f1b", 2), ("dualpipev", 1)):
        plan = on_ranks(settings, 2, *overrides, f"parallel.schedule={schedule}")
        weights = sum(rank.memory.weights for rank in plan.pipeline)
        assert weights == 2 * plan.parameters + (copies - 1) * embedding


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
    def table_of(*overrides: str) -> str:
        ranks = ("training.micro_batch=1", "parallel.tensor=2")
        return shown(on_ranks(settings, 8, *ranks, *overrides))

    table = table_of("parallel.pipeline=2")
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
    assert "Pipeline" not in table_of()
    assert " and layers " in table_of("parallel.pipeline=2", "parallel.schedule=dualpipev")


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
