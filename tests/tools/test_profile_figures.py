"""The figures of `megaconsa profile`, from traces made by hand whose figures are known."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megaconsa.benchmarks.profile.analysis import Amount
from megaconsa.benchmarks.profile.attribution import Pass
from megaconsa.benchmarks.profile.idle import Cause
from megaconsa.benchmarks.profile.intervals import inside, united
from megaconsa.benchmarks.profile.kernel_groups import Group, group_of
from megaconsa.benchmarks.profile.trace import Event, Nesting
from megaconsa.parallel.step_parts import Part
from tests.support import ROOT
from tests.support.traces import AUTOGRAD, TraceBuilder

GEMM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN"
NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)"


@pytest.fixture
def trace() -> TraceBuilder:
    return TraceBuilder()


def amounts(work: Any) -> dict[Pass, tuple[float, float]]:
    """Milliseconds and number of some work by pass."""
    return {
        direction: (pytest.approx(amount.ms), amount.count)
        for direction, amount in work.passes.items()
    }


def test_busy_time_is_the_union_over_streams(trace: TraceBuilder) -> None:
    trace.range("step", 0, 1000)
    trace.kernel(GEMM, called=0, start=100, end=500)
    trace.kernel(ADD, called=2, start=200, end=300)  # inside the first one
    trace.kernel(ADD, called=4, start=400, end=600)  # longer than the first one
    trace.kernel("Memset (Device)", called=6, start=600, end=650, category="gpu_memset")
    device = trace.analysis().device
    assert device is not None
    assert device.computing_ms == pytest.approx(0.55)
    assert device.communicating_ms == 0
    assert device.idle_ms == pytest.approx(0.45)
    assert device.launches == 4


def test_communication_counts_only_where_it_is_alone(trace: TraceBuilder) -> None:
    trace.range("step", 0, 1000)
    trace.kernel(GEMM, called=0, start=100, end=500)
    trace.kernel(NCCL, called=2, start=400, end=900)
    analysis = trace.analysis()
    device = analysis.device
    assert device is not None
    assert device.computing_ms == pytest.approx(0.4)
    assert device.communicating_ms == pytest.approx(0.4)
    assert device.idle_ms == pytest.approx(0.2)
    assert analysis.groups[Group.COMMUNICATION].total.ms == pytest.approx(0.5)


def test_figures_are_of_one_step(trace: TraceBuilder) -> None:
    for start in (0, 1000):
        trace.range("step", start, start + 990)
        trace.kernel(GEMM, called=start, start=start + 100, end=start + 300)
    trace.kernel(ADD, called=1100, start=1300, end=1310)
    analysis = trace.analysis()
    assert analysis.steps == 2
    assert analysis.step_ms == pytest.approx(0.995)
    assert analysis.names[GEMM] == Amount(pytest.approx(0.2), 1)
    assert analysis.names[ADD] == Amount(pytest.approx(0.005), 0.5)


def test_what_ran_outside_the_steps_does_not_count(trace: TraceBuilder) -> None:
    trace.kernel(GEMM, called=0, start=1, end=50)
    trace.range("step", 100, 200)
    trace.kernel(ADD, called=100, start=110, end=200)
    trace.kernel(GEMM, called=210, start=220, end=300)
    analysis = trace.analysis()
    assert list(analysis.names) == [ADD]
    assert analysis.device is not None
    assert analysis.device.idle_ms == pytest.approx(0.01)


def test_the_end_of_a_step_may_run_in_the_next_one(trace: TraceBuilder) -> None:
    """AdamW of the step before the first one runs when that begins, and that of the last goes on.

    Busy and idle times still add up to the step.
    """
    trace.kernel(ADD, called=0, start=60, end=130)
    trace.range("step", 100, 300)
    trace.kernel(GEMM, called=110, start=140, end=270)
    trace.kernel(ADD, called=260, start=270, end=340)
    device = trace.analysis().device
    assert device is not None
    assert device.idle == {Cause.QUEUED: pytest.approx(0.01)}
    assert device.computing_ms == pytest.approx(0.19)


def test_each_idle_time_has_its_cause(trace: TraceBuilder) -> None:
    trace.call("cudaDeviceSynchronize", -20, -10)
    trace.range("step", 0, 1000)
    trace.range("data", 10, 40)
    # The host had waited at the end of the step before, then read data, then launched.
    trace.kernel(GEMM, called=90, start=100, end=200)
    # Launched long ago.
    trace.kernel(GEMM, called=92, start=203, end=300)
    # The host was busy with something else.
    trace.kernel(ADD, called=340, start=350, end=400)
    # The host read a result.
    trace.kernel("Memcpy DtoH", called=350, start=402, end=410, category="gpu_memcpy")
    trace.call("cudaStreamSynchronize", 360, 415)
    trace.kernel(ADD, called=480, start=500, end=900)
    # The step ends with a wait.
    trace.call("cudaDeviceSynchronize", 490, 905)
    analysis = trace.analysis()
    assert analysis.device is not None
    idle = {cause: pytest.approx(ms * 1000) for cause, ms in analysis.device.idle.items()}
    assert idle == {
        Cause.DATA: 30,
        Cause.WAITED: 70 + 90 + 100,
        Cause.QUEUED: 3 + 2,
        Cause.LAUNCHING: 50,
    }
    assert analysis.device.idle_ms == pytest.approx(0.345)


def test_a_wait_before_the_last_launch_is_no_cause(trace: TraceBuilder) -> None:
    trace.range("step", 0, 400)
    trace.kernel(GEMM, called=0, start=0, end=100)
    trace.call("cudaStreamSynchronize", 5, 50)
    trace.kernel(GEMM, called=60, start=100, end=200)
    trace.kernel(GEMM, called=250, start=300, end=400)
    device = trace.analysis().device
    assert device is not None
    assert device.idle == {Cause.LAUNCHING: pytest.approx(0.1)}


def test_a_kernel_whose_launch_is_lost_has_no_cause(trace: TraceBuilder) -> None:
    trace.range("step", 0, 400)
    trace.kernel(GEMM, called=0, start=100, end=400)
    del trace.rows[1]
    analysis = trace.analysis()
    assert analysis.device is not None
    assert analysis.device.idle == {Cause.UNKNOWN: pytest.approx(0.1)}
    assert analysis.parts[Part.OTHER].total.ms == pytest.approx(0.3)


def test_waits_stand_with_their_place(trace: TraceBuilder) -> None:
    trace.range("step", 0, 1000)
    trace.range("optimizer", 100, 900)
    trace.kernel(ADD, called=110, start=120, end=200)
    trace.operator("aten::item", 130, 250)
    trace.operator("aten::_local_scalar_dense", 131, 249)
    trace.call("cudaStreamSynchronize", 140, 240)
    trace.kernel(ADD, called=300, start=310, end=1000)
    (wait,) = trace.analysis().waits
    assert (wait.place, wait.operator, wait.call) == (
        "optimizer",
        "aten::item",
        "cudaStreamSynchronize",
    )
    assert (wait.count, wait.ms, wait.idle_ms) == (1, pytest.approx(0.1), pytest.approx(0.11))


def test_parts_of_the_forward_and_backward_pass(trace: TraceBuilder) -> None:
    """The backward pass runs on another thread and is known by sequence numbers only."""
    trace.range("step", 0, 1000)
    trace.range("gates", 0, 10)
    trace.kernel(ADD, called=5, start=10, end=15)
    trace.range("forward pass", 20, 100)
    trace.range("embedding", 20, 30)
    trace.operator("aten::embedding", 21, 25, sequence=1)
    trace.kernel("indexSelectSmallIndex", called=22, start=25, end=27)
    trace.range("block 0", 30, 80)
    trace.range("attention", 35, 55)
    trace.operator("aten::mm", 36, 40, sequence=2)
    trace.kernel(GEMM, called=37, start=40, end=50)
    trace.range("MLP", 60, 75)
    # This one has no gradient, so it has the number of the next operator that has one.
    trace.operator("aten::arange", 70, 74, sequence=3)
    trace.operator("aten::add", 76, 79, sequence=3)
    trace.kernel(ADD, called=77, start=80, end=83)
    trace.range("backward pass", 100, 500)
    trace.node("AddBackward0", 110, 120, sequence=3)
    trace.kernel(ADD, called=112, start=115, end=116, thread=AUTOGRAD)
    # Activation checkpointing: the layer runs again inside a node.
    trace.node("MmBackward0", 130, 200, sequence=2)
    trace.range("block 0", 131, 160, thread=AUTOGRAD)
    trace.range("attention", 135, 150, thread=AUTOGRAD)
    trace.operator("aten::mm", 136, 140, AUTOGRAD, sequence=3)
    trace.kernel(GEMM, called=137, start=140, end=150, thread=AUTOGRAD)
    trace.kernel(GEMM, called=170, start=171, end=190, thread=AUTOGRAD)
    # The sum of a weight's gradients has no number.
    trace.node("torch::autograd::AccumulateGrad", 200, 210)
    trace.kernel(ADD, called=202, start=205, end=206, thread=AUTOGRAD)
    trace.node("EmbeddingBackward0", 220, 230, sequence=1)
    trace.kernel("embedding_backward", called=221, start=225, end=229, thread=AUTOGRAD)
    trace.kernel(ADD, called=400, start=410, end=411)
    trace.range("optimizer", 500, 900)
    trace.range("gates", 600, 650)
    trace.kernel(ADD, called=610, start=620, end=630)
    trace.kernel("multi_tensor_apply_kernel", called=700, start=710, end=900)
    analysis = trace.analysis()
    parts = {part: amounts(work) for part, work in analysis.parts.items()}
    assert parts == {
        Part.GATES: {Pass.NEITHER: (0.015, 2)},
        Part.EMBEDDING: {Pass.FORWARD: (0.002, 1), Pass.BACKWARD: (0.004, 1)},
        Part.ATTENTION: {
            Pass.FORWARD: (0.010, 1),
            Pass.RECOMPUTED: (0.010, 1),
            Pass.BACKWARD: (0.020, 2),
        },
        Part.BLOCK: {Pass.FORWARD: (0.003, 1), Pass.BACKWARD: (0.001, 1)},
        Part.OTHER: {Pass.BACKWARD: (0.001, 1)},
        Part.OPTIMIZER: {Pass.NEITHER: (0.19, 1)},
    }
    assert amounts(analysis.groups[Group.MATRIX_PRODUCTS]) == {
        Pass.FORWARD: (0.010, 1),
        Pass.RECOMPUTED: (0.010, 1),
        Pass.BACKWARD: (0.019, 1),
    }
    idle = {part: work.idle_ms for part, work in analysis.parts.items()}
    assert idle[Part.OPTIMIZER] == pytest.approx(0.08)
    assert analysis.device is not None
    # The time after the last kernel belongs to no part.
    assert sum(idle.values()) == pytest.approx(analysis.device.idle_ms - 0.1)


def test_without_a_device_operators_count_by_self_time(trace: TraceBuilder) -> None:
    trace.range("step", 0, 100)
    trace.range("embedding", 10, 60)
    trace.operator("aten::linear", 10, 50)
    trace.operator("aten::mm", 20, 40)
    analysis = trace.analysis()
    assert analysis.device is None
    assert analysis.names == {
        "aten::linear": Amount(pytest.approx(0.02), 1),
        "aten::mm": Amount(pytest.approx(0.02), 1),
    }
    assert analysis.parts[Part.EMBEDDING].total.ms == pytest.approx(0.04)


def test_nested_events_are_found() -> None:
    def event(start: float, end: float) -> Event:
        return Event("cpu_op", f"{start}", start, end, 1)

    # The second begins with the first, the third seems to end after it.
    outer, inner, last, apart = event(0, 10), event(0, 5), event(6, 10.001), event(20, 21)
    nesting = Nesting([apart, last, inner, outer])
    assert list(nesting.around(-1)) == []
    assert list(nesting.around(0)) == [inner, outer]
    assert list(nesting.around(5)) == [outer]
    assert list(nesting.around(7)) == [last, outer]
    assert list(nesting.around(15)) == []
    assert list(nesting.around(20.5)) == [apart]
    assert dict(nesting.self_times())[outer] == pytest.approx(10 - 5 - 4.001)


def test_intervals() -> None:
    assert united([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert inside([(0, 4), (5, 6)], 3, 5.5) == 1.5
    assert inside([(0, 4)], 3, 2) == 0


AT = "void at::native::"
NAMES = {
    Group.MATRIX_PRODUCTS: [
        GEMM,
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
    ],
    Group.ATTENTION: [
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31",
    ],
    Group.NORMS: [
        AT + "(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>",
        AT + "(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate",
    ],
    Group.ELEMENTWISE: [ADD],
    Group.COPIES: [
        "Memcpy HtoD (Pageable -> Device)",
        AT + "unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda",
        AT + "vectorized_elementwise_kernel<4, at::native::FillFunctor<float>",
    ],
    Group.OPTIMIZER: [AT + "multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>"],
    Group.REDUCTIONS: [AT + "reduce_kernel<512, 1, at::native::ReduceOp<float>"],
    Group.INDEXING: [
        AT + "(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16>",
        AT + "index_elementwise_kernel<128, 4, at::native::gpu_index_kernel",
    ],
    Group.COMMUNICATION: [NCCL],
    Group.OTHER: ["nobody_knows"],
}


def test_kernels_are_grouped_by_name() -> None:
    for group, names in NAMES.items():
        assert [group_of(name) for name in names] == [group] * len(names)


def test_our_own_kernels_have_a_group() -> None:
    """Every kernel of kernels/ that a training step may launch is in its group by name."""
    groups = {
        "attention": Group.ATTENTION,
        "cross_entropy": Group.CROSS_ENTROPY,
        "norm": Group.NORMS,
        "rotary": Group.ROTARY,
        "swiglu": Group.SWIGLU,
    }
    files = {path: path.read_text() for path in sorted((ROOT / "kernels").rglob("*.py"))}
    code = "\n".join(files.values())
    found = set()
    for path, text in files.items():
        folder = path.relative_to(ROOT / "kernels").parts[0]
        for name in re.findall(r"@\w+\.jit.*\ndef (\w+)\(", text):
            # Kernels are launched by name[grid](...). What is called directly is part of a kernel.
            is_kernel = not re.search(rf"(?<!def )\b{name}\(", code)
            if is_kernel and folder != "decode":
                found.add(name)
                assert group_of(name) is groups[folder], f"{path}: {name}"
    assert {"hopper_forward_kernel", "backward_kernel", "_rotate", "_cross_entropy"} <= found
