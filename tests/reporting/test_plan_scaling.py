"""The command plan for many GPUs, and with gradients divided over data ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaconsa import config
from megaconsa.errors import InputError
from megaconsa.planning.plan import make_plan
from megaconsa.planning.scaling import NETWORK_BYTES, NODE_BYTES, scale, simulate
from megaconsa.planning.table import scaling_table
from megaconsa.tables import text_lines
from tests.support.plans import planned

LARGE = ("model.preset=qwen3-8b", "training.micro_batch=1")


def test_one_gpu_loses_nothing(settings: Path) -> None:
    loaded = config.load(settings, [])
    plan = make_plan(loaded, 1, "h100", 0.4)
    alone = simulate(loaded, plan, 0.4)
    assert alone.efficiency == 1
    assert alone.tokens_per_second == pytest.approx(plan.tokens_per_second)


def test_waits_are_bytes_over_rates(settings: Path) -> None:
    """Tensor ranks of one node, then data ranks of two nodes whose traffic nothing can hide."""
    overrides = ["parallel.tensor=2", "training.micro_batch=16"]
    loaded = config.load(settings, overrides)
    tensor = simulate(loaded, make_plan(loaded, 8, "h100", 0.4), 0.4)
    assert tensor.tensor == pytest.approx(tensor.plan.traffic.tensor / NODE_BYTES)
    assert (tensor.context, tensor.pipeline, tensor.idle) == (0, 0, 0)
    # One micro-batch of one short sequence is over before the gradients have arrived.
    short = ["training.micro_batch=1", "training.global_batch=16", "training.sequence_length=1024"]
    loaded = config.load(settings, short)
    data = simulate(loaded, make_plan(loaded, 16, "h100", 0.4), 0.4)
    sent = data.plan.traffic.data / NETWORK_BYTES
    assert data.data == pytest.approx(sent - data.compute)
    assert data.efficiency == pytest.approx(data.compute / sent)
    pipeline = ["parallel.pipeline=2", "training.micro_batch=8"]
    loaded = config.load(settings, pipeline)
    stages = simulate(loaded, make_plan(loaded, 2, "h100", 0.4), 0.4)
    share = stages.idle / (stages.idle + stages.compute)
    assert share == pytest.approx(1 - stages.plan.efficiency)


def test_more_gpus_need_other_axes(settings: Path) -> None:
    loaded = config.load(settings, [*LARGE, "training.activation_checkpointing=true"])
    plan = make_plan(loaded, 8, "h100")
    found = scale(loaded, plan, [8, 64, 256], None)
    assert [each.plan.gpus for each in found] == [8, 64, 256]
    efficiencies = [each.efficiency for each in found]
    assert efficiencies == sorted(efficiencies, reverse=True)
    few, many = found[0].plan, found[-1].plan
    assert few.data_ranks == 8
    # There are 64 sequences in a step.
    assert many.data_ranks <= 64
    assert many.tensor_ranks * many.context_ranks * many.pipeline_ranks >= 4
    text = "\n".join(line for _, line in text_lines(scaling_table(found), None))
    assert "tokens/s a GPU" in text
    with pytest.raises(InputError, match=r"--scale 7: no topology can divide training.global_bat"):
        scale(loaded, plan, [7], None)


def test_sharded_gradients_take_less_memory_and_more_traffic(settings: Path) -> None:
    whole = planned(settings, *LARGE, gpus=8)
    parts = planned(settings, *LARGE, "parallel.shard=gradients", gpus=8)
    assert whole.memory.gradients == 4 * whole.parameters
    block = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 12288)
    outside = whole.parameters - 36 * block
    assert parts.memory.gradients == 4 * (whole.parameters // 8 + outside + 2 * block)
    saved = whole.memory.gradients - parts.memory.gradients
    assert whole.memory.total - parts.memory.total == saved
    # Each of the 8 micro-batches is summed.
    more = parts.traffic.data - whole.traffic.data
    assert more == pytest.approx(7 * 4 * 36 * block * 7 / 8, rel=1e-6)
    alone = planned(settings, *LARGE, "parallel.shard=gradients")
    assert alone.memory == planned(settings, *LARGE).memory
