"""training.memory_gib: of how many layers what is recomputed, and that nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.config import build
from megaconsa.errors import InputError
from megaconsa.kernels import limits
from megaconsa.model import kernel_use
from megaconsa.parallel import mesh
from megaconsa.parallel.pipeline import BlockLayer, RecomputedBlockLayer
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.planning.plan import make_plan
from megaconsa.reporting.metrics import read_metrics
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer

MakeConfig = Callable[..., dict[str, Any]]
LAYERS = 4


def settings(make_config: MakeConfig, **training: Any) -> dict[str, Any]:
    return make_config(model={"num_hidden_layers": LAYERS}, training=training)


def estimates(values: dict[str, Any]) -> tuple[float, float]:
    """The estimates in GiB with no layer recomputed, and with all of them."""
    kept = make_plan(build(values), 1, "h100", 0.4).memory
    recomputed = kept.total - kept.activations + kept.activations_checkpointed
    return kept.total / 2**30, recomputed / 2**30


def of_heads(values: dict[str, Any]) -> float:
    """GiB of the q and k of a layer."""
    config = build(values)
    shape = config.to_model_config()
    width = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    tokens = config.training.micro_batch * config.training.sequence_length
    return 2 * tokens * width / 2**30


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs blocks and norms as on a GPU."""
    monkeypatch.setattr(kernel_use, "kernels_serve_device", lambda device: True)


@pytest.mark.usefixtures("kernels")
def test_q_and_k_of_as_few_layers_as_possible_are_recomputed(make_config: MakeConfig) -> None:
    values = settings(make_config)
    highest, _ = estimates(values)
    for count in range(LAYERS + 1):
        for spare in (0.0, 0.9):
            budget = highest - (count - spare) * of_heads(values)
            chosen = settings(make_config, memory_gib=budget)
            recomputed = check_inputs(build(chosen)).recomputed
            assert recomputed == Recomputation(heads=tuple(range(count)))
            plan = make_plan(build(chosen), 1, "h100", 0.4)
            assert plan.recomputed == recomputed
            assert plan.memory.total == round((highest - count * of_heads(values)) * 2**30)


@pytest.mark.usefixtures("kernels")
def test_then_as_few_layers_as_possible_are_recomputed_whole(make_config: MakeConfig) -> None:
    values = settings(make_config)
    highest, lowest = estimates(values)
    budget = highest - LAYERS * of_heads(values)
    # The last layer takes no less if it is recomputed whole.
    for count in range(1, LAYERS):
        # A byte less than what the last choice takes.
        chosen = build(settings(make_config, memory_gib=budget - 2**-30))
        recomputed = check_inputs(chosen).recomputed
        assert recomputed.whole == tuple(range(count))
        assert recomputed.heads == tuple(range(count, LAYERS))
        taken = make_plan(chosen, 1, "h100", 0.4).memory.total / 2**30
        assert taken < budget
        budget = taken
    # A layer is recomputed with its q and k while the inputs of all layers are kept.
    shape = build(values).to_model_config()
    inputs = 2 * 2 * 64 * shape.hidden_size / 2**30
    assert budget == pytest.approx(lowest - inputs, abs=2**-30)


@pytest.mark.usefixtures("kernels")
def test_backends_that_copy_q_and_k_recompute_layers_whole(make_config: MakeConfig) -> None:
    values = settings(make_config)
    values["training"]["memory_gib"] = estimates(values)[0] - of_heads(values)
    values["attention"]["backend"] = "sdpa"
    assert check_inputs(build(values)).recomputed == Recomputation(whole=(0,))


def test_plain_blocks_are_recomputed_whole(make_config: MakeConfig) -> None:
    """They run on a machine without a GPU, where nothing can recompute only q and k."""
    highest, lowest = estimates(settings(make_config))
    numbers = []
    for share in (1.0, 0.99, 0.6, 0.3):
        budget = lowest + share * (highest - lowest)
        recomputed = check_inputs(build(settings(make_config, memory_gib=budget))).recomputed
        assert recomputed == Recomputation(whole=tuple(range(len(recomputed.whole))))
        numbers.append(len(recomputed.whole))
    assert numbers[:2] == [0, 1]
    assert numbers == sorted(numbers)
    assert numbers[-1] < LAYERS


def test_a_budget_that_cannot_be_kept_is_refused(make_config: MakeConfig) -> None:
    _, lowest = estimates(settings(make_config))
    with pytest.raises(InputError, match="is too little: pipeline rank 0 takes"):
        check_inputs(build(settings(make_config, memory_gib=0.9 * lowest)))


def test_a_budget_and_recomputing_all_are_two_ways(make_config: MakeConfig) -> None:
    values = settings(make_config, memory_gib=70, activation_checkpointing=True)
    with pytest.raises(InputError, match="leave one of them out"):
        build(values)


def test_some_recomputed_layers_change_nothing(
    make_config: MakeConfig,
    train: Callable[..., Any],
    tmp_path: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = settings(make_config)
    highest, lowest = estimates(values)
    whole = train(values)
    values = settings(make_config, memory_gib=(highest + lowest) / 2)
    values["run"]["dir"] = str(tmp_path / "recomputed")
    with caplog.at_level(logging.INFO, logger="megaconsa"):
        partly = train(values)
    assert "recomputes 2 of 4 layers, to keep training.memory_gib" in caplog.text
    assert [row["loss"] for row in partly] == [row["loss"] for row in whole]
    assert [row["grad_norm"] for row in partly] == [row["grad_norm"] for row in whole]


@pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.usefixtures("kernels")
def test_blocks_recompute_what_is_chosen_for_them(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, **training: Any) -> tuple[list[dict[str, Any]], Any]:
        values = settings(make_config, steps=2, **training)
        values["run"]["dir"] = str(tmp_path / name)
        values["gates"]["warmup_steps"] = 1
        values["validation"]["sequences"] = 2
        trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
        assert trainer.run()
        return read_metrics(tmp_path / name / "metrics.jsonl"), trainer.engine.engine.module

    def blocks_of(pipeline: Any) -> list[BlockLayer]:
        return [module for module in pipeline.modules() if isinstance(module, BlockLayer)]

    values = settings(make_config)
    kept, pipeline = run("kept")
    assert not any(block.recomputes_heads for block in blocks_of(pipeline))
    assert pipeline.activation_checkpoint_interval == 0
    budget = estimates(values)[0] - 4.1 * of_heads(values)
    with caplog.at_level(logging.INFO, logger="megaconsa"):
        recomputed, pipeline = run("recomputed", memory_gib=budget)
    assert "recomputes 1 of 4 layers, and q and k of 3, to keep training.memory_gib" in caplog.text
    blocks = blocks_of(pipeline)
    assert [block.recomputes_heads for block in blocks] == [False, True, True, True]
    whole = [isinstance(block, RecomputedBlockLayer) for block in blocks]
    assert whole == [True, False, False, False]
    assert pipeline.activation_checkpoint_interval == 1
    assert [row["loss"] for row in recomputed] == [row["loss"] for row in kept]
    assert [row["grad_norm"] for row in recomputed] == [row["grad_norm"] for row in kept]


def test_descriptions() -> None:
    assert Recomputation().describe(28) == "0 of 28 layers"
    assert Recomputation(whole=(0, 1)).describe(28) == "2 of 28 layers"
    assert Recomputation(heads=(0, 1, 2)).describe(28) == "q and k of 3 of 28 layers"
