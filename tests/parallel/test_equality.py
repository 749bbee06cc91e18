"""Every topology trains as one process does.

A topology is launched once, in fresh processes. It trains all of `CASES` there, a few steps each.
One process has trained them before, once for all topologies.
Compared are every row of metrics, and every tensor of the checkpoints after the first and the last
step: losses, gradient norm, weights, moments, gates, multipliers. Each must agree to ||a - b|| /
||b|| <= 1e-5.
After one step, Adam's first moment is (1 - beta1) times the gradient that Adam was given. So this
also compares the gradients after clipping, tensor by tensor. Weights cannot show this, because
Adam's step hardly depends on the size of a gradient.

`pytest tests/parallel -m nightly` also runs topologies that only combine the others.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from megaconsa.checkpoint.gates import read_gates
from megaconsa.data.packing import IGNORED
from megaconsa.data.stream import BatchStream
from megaconsa.huggingface.export import export
from megaconsa.huggingface.load import compare_logits
from megaconsa.kernels import limits
from megaconsa.model.initialize import initial_weight
from megaconsa.reporting.metrics import read_metrics
from tests.support.comparison import (
    checkpoint,
    differences,
    differences_of_tensors,
    relative,
)
from tests.support.topologies import (
    CASES,
    CLIPPING,
    COMBINATIONS,
    CP2,
    CP2_TP2,
    CP4,
    DP2,
    DP2_GRADIENTS,
    HEAD_ALONE,
    LEARN,
    LEARN_TIED,
    ONE,
    PP2,
    PP2_DP2,
    PP2_DP2_GRADIENTS,
    PP2_DUALPIPEV,
    PP2_INTERLEAVED,
    RECOMPUTED_TIED,
    STEPS,
    TP2,
    TP2_PP2,
    TP2_SEQUENCE,
    TRAIN,
    TRAIN_UNTIED,
    UNTIED,
    Case,
    Job,
    Layout,
    Runs,
)
from tests.support.transformers_reference import masked_logits


def check_equal(
    runs: Runs, layout: Layout, faults: Mapping[str, tuple[Case, str]] = MappingProxyType({})
) -> dict[str, Path]:
    """Launches all cases and compares them.

    faults: case and fault by name. They run in the same launch, and the caller checks them.
    Returns the run of each name.
    """
    jobs = [Job(case.name, case) for case in CASES] + [
        Job(name, case, fault=fault) for name, (case, fault) in faults.items()
    ]
    done = runs.launch(layout, jobs)
    found = []
    for case in CASES:
        run = done[case.name]
        found += [
            f"{case.name}: {each}" for each in differences(run, runs.reference(case), (1, STEPS))
        ]
        if case.initialised_from is None:
            check_clipping(run)
    assert not found, "\n".join(found[:30])
    for case in (LEARN_TIED, TRAIN_UNTIED):
        check_export(done[case.name], runs.folder / f"{layout.name}-{case.name}-hf")
    return done


def check_export(run: Path, out: Path) -> None:
    """Checks the logits of a head-wise export.

    The reference is transformers' own Qwen3 with the weights of the checkpoint and a mask for each
    head.
    """
    saved = checkpoint(run, STEPS)
    table = saved.allocation
    if table is None:
        table = read_gates(saved).allocation()
    assert not table.is_layer_wise
    weights = dict(saved.weights())
    export(
        weights, saved.model_config, table, out, tokenizer=None, dtype=torch.float32, origin=None
    )
    tokens = torch.randint(
        saved.model_config.vocab_size,
        (2, 3 * table.window),
        generator=torch.Generator().manual_seed(1),
    )
    assert (
        compare_logits(out, tokens, masked_logits(weights, saved.model_config, table, tokens))
        <= 1e-5
    )
    shutil.rmtree(out)


def check_clipping(run: Path) -> None:
    """Checks that the gradient of the first step was clipped.

    Its norm was larger than CLIPPING, and it was CLIPPING when Adam got it.
    """
    saved = checkpoint(run, 1)
    first_moments = [
        value.double() for name, value in saved.moments().items() if name.startswith("exp_avg/")
    ]
    beta1 = saved.state["config"]["training"]["betas"][0]
    given = math.sqrt(sum(float(value.square().sum()) for value in first_moments)) / (1 - beta1)
    assert read_metrics(run / "metrics.jsonl")[0]["grad_norm"] > 2 * CLIPPING
    assert given == pytest.approx(CLIPPING, rel=1e-4)


def test_documents_and_clipping_are_in_play(runs: Runs) -> None:
    """All topologies are compared with this run.

    It has several documents in a sequence, a clipped gradient, and gates of all kinds.
    """
    run = runs.reference(LEARN_TIED)
    check_clipping(run)
    stream = BatchStream(runs.folder / "data", seed=0, global_batch=8, micro_batch=2)
    batches = next(stream.steps())
    assert all((batch.documents > 0).any() for batch in batches)
    assert len({int((batch.labels != IGNORED).sum()) for batch in batches}) > 1
    rows = read_metrics(run / "metrics.jsonl")
    # Units are measured in the first steps and decided in the last one.
    assert rows[0]["sampled_sparsity"] == 0
    assert rows[0]["gate_grad_norm"] > 0
    assert 0 < rows[-1]["sampled_sparsity"] < 1


def test_data_parallel_and_one_process_takes_over(runs: Runs) -> None:
    done = check_equal(runs, DP2)
    run = done[LEARN_TIED.name]
    # As if the run had been killed after step 2.
    for step in range(3, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    runs.train(runs.values(LEARN_TIED, run))
    found = differences(run, runs.reference(LEARN_TIED), (STEPS,))
    assert not found, "\n".join(map(str, found))


def test_tensor_parallel(runs: Runs) -> None:
    done = check_equal(runs, TP2, {"fault": (LEARN_TIED, "sums_over_heads")})
    check_found(runs, done["fault"], LEARN_TIED, ("q_norm", "k_norm"))


def test_tensor_and_sequence_parallel(runs: Runs) -> None:
    check_equal(runs, TP2_SEQUENCE)


def test_pipeline_parallel(runs: Runs) -> None:
    done = check_equal(runs, PP2, {"fault": (LEARN_TIED, "tied_weights")})
    check_found(runs, done["fault"], LEARN_TIED, ("embed_tokens",))


def test_context_parallel(runs: Runs) -> None:
    check_equal(runs, CP2)


def test_context_parallel_with_windows_longer_than_a_chunk(runs: Runs) -> None:
    check_equal(runs, CP4)


def test_context_and_tensor_parallel(runs: Runs) -> None:
    check_equal(runs, CP2_TP2)


def test_dualpipev(runs: Runs) -> None:
    check_equal(runs, PP2_DUALPIPEV)


def test_interleaved(runs: Runs) -> None:
    check_equal(runs, PP2_INTERLEAVED)


def test_tensor_and_pipeline_parallel(runs: Runs) -> None:
    check_equal(runs, TP2_PP2)


def test_pipeline_and_data_parallel(runs: Runs) -> None:
    check_equal(runs, PP2_DP2)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", COMBINATIONS, ids=lambda layout: layout.name)
def test_combinations(runs: Runs, layout: Layout) -> None:
    check_equal(runs, layout)


def check_found(runs: Runs, run: Path, case: Case, broken: tuple[str, ...]) -> None:
    """Checks that a run with a broken gradient is found to differ.

    Its worst gradients must be the broken ones.
    """
    found = differences(run, runs.reference(case), (1, STEPS))
    assert any("grad_norm" in each.place for each in found)
    gradients = [each for each in found if "step 1 exp_avg/" in each.place]
    wrong = [each for each in gradients if any(name in each.place for name in broken)]
    # The other gradients differ too, but only by the factor of clipping, because the norm is that
    # of all gradients.
    assert wrong
    assert min(each.size for each in wrong) > 10 * max(
        each.size for each in gradients if each not in wrong
    )


IN_BF16 = pytest.mark.parametrize(
    "layout",
    [
        pytest.param(TP2_SEQUENCE, marks=pytest.mark.slow),
        pytest.param(CP2, marks=pytest.mark.slow),
        PP2,
        DP2,
    ],
    ids=lambda layout: layout.name,
)


@IN_BF16
def test_bf16(runs: Runs, layout: Layout) -> None:
    check_bf16(runs, layout, [LEARN_TIED, TRAIN_UNTIED])


@pytest.mark.skipif(not limits.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (TP2_SEQUENCE, LEARN_TIED),
        pytest.param(ONE, TRAIN_UNTIED, marks=pytest.mark.slow),
        pytest.param(ONE, RECOMPUTED_TIED, marks=pytest.mark.slow),
        pytest.param(TP2, LEARN_TIED, marks=pytest.mark.slow),
        pytest.param(PP2, LEARN_TIED, marks=pytest.mark.slow),
        pytest.param(PP2_DUALPIPEV, LEARN_TIED, marks=pytest.mark.slow),
        pytest.param(PP2_INTERLEAVED, LEARN_TIED, marks=pytest.mark.slow),
        pytest.param(DP2, TRAIN_UNTIED, marks=pytest.mark.slow),
        pytest.param(CP2, LEARN_TIED, marks=pytest.mark.slow),
        pytest.param(PP2_DP2, LEARN_TIED, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name,
)
def test_bf16_by_the_kernels_of_a_gpu(runs: Runs, layout: Layout, case: Case) -> None:
    """Gradients of weights then go to DeepSpeed's fp32 sums without autograd."""
    check_bf16(runs, layout, [case], kernels=True)


@pytest.mark.parametrize(
    ("layout", "sharded", "kernels"),
    [
        (DP2, DP2_GRADIENTS, False),
        pytest.param(DP2, DP2_GRADIENTS, True, marks=pytest.mark.slow),
        pytest.param(PP2_DP2, PP2_DP2_GRADIENTS, True, marks=pytest.mark.slow),
    ],
    ids=["dp2", "dp2-kernels", "pp2-dp2-kernels"],
)
def test_sharded_gradients(runs: Runs, layout: Layout, sharded: Layout, kernels: bool) -> None:
    """With parallel.shard=gradients a step computes the same as without.

    Only the order in which gradients are added up differs. They are added in fp32.
    """
    cases = [LEARN_TIED, TRAIN_UNTIED]
    whole = check_bf16(runs, layout, cases, kernels=kernels)
    parts = check_bf16(runs, sharded, cases, kernels=kernels)
    for case in cases:
        found = differences_of_tensors(parts[case.name], whole[case.name], 1)
        assert not found, "\n".join(map(str, found[:30]))
        first, theirs = (
            read_metrics(run[case.name] / "metrics.jsonl")[0] for run in (parts, whole)
        )
        assert first["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    fault = Job("fault", LEARN_TIED, "bf16", fault="block_sum", kernels=kernels)
    broken = runs.launch(sharded, [fault])["fault"]
    found = differences_of_tensors(broken, whole[LEARN_TIED.name], 1)
    assert any("layers.0" in each.place for each in found)


def test_bf16_with_a_stage_of_norm_and_tied_head(runs: Runs) -> None:
    run = check_bf16(runs, TP2_PP2, [HEAD_ALONE])[HEAD_ALONE.name]
    # Gradients are summed in fp32, over micro-batches and over data ranks. bf16 could not hold
    # these sums.
    moments = torch.cat(
        [
            value.flatten()
            for name, value in checkpoint(run, 1).moments().items()
            if name.startswith("exp_avg/")
        ]
    )
    gradients = moments[moments != 0] / (1 - 0.9)
    assert ((gradients.bfloat16() - gradients) / gradients).abs().median() > 1e-4


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@IN_BF16
def test_bf16_on_gpus(runs: Runs, layout: Layout) -> None:
    kernels = {"head_dim": 32}  # the Triton kernels serve this dimension
    check_bf16(
        runs,
        layout,
        [
            Case("learn-gpu", LEARN | {"model": kernels}),
            Case("train-gpu", TRAIN | {"model": UNTIED | kernels}),
        ],
    )


def check_bf16(
    runs: Runs, layout: Layout, cases: Sequence[Case], *, kernels: bool = False
) -> dict[str, Path]:
    """Checks runs in bf16.

    DeepSpeed then trains with another optimizer class. This class drops the gradients of weights
    that are used where it does not look.
    """
    jobs = [Job(case.name, case, precision="bf16", kernels=kernels) for case in cases]
    done = runs.launch(layout, jobs)
    for case in cases:
        run = done[case.name]
        reference = runs.reference(case, "bf16")
        own, theirs = (read_metrics(path / "metrics.jsonl") for path in (run, reference))
        assert [row["loss"] for row in own] == pytest.approx(
            [row["loss"] for row in theirs], rel=0.01
        )
        first = checkpoint(run, 1)
        last = checkpoint(run, STEPS)
        truth = checkpoint(reference, 1)
        shape = first.model_config
        seed = first.state["config"]["run"]["seed"]
        beginning = {
            name: initial_weight(name, torch.Size(size), shape, seed)
            for name, size in first.weight_shapes().items()
        }
        for name, before in beginning.items():
            after_one = first.weights()[name]
            after_all = last.weights()[name]
            assert not torch.equal(before, after_one), name
            assert not torch.equal(after_one, after_all), name
            gradient = f"exp_avg/{name}"
            # The runs round to 8 bits at different places. A dropped part of a sum would make a far
            # larger difference.
            assert relative(first.moments()[gradient], truth.moments()[gradient]) < 0.1, name
    return done
