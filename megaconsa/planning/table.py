"""The plan of a run as a table, and the sentence that says whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megaconsa.planning.changes import Change
from megaconsa.planning.plan import Cost, Plan
from megaconsa.planning.scaling import Scaled
from megaconsa.tables import Cell, Row, Table

AXES = ("tp", "cp", "pp", "dp")
"""Headings for the numbers of tensor, context, pipeline and data ranks."""


def plan_table(plan: Plan) -> Table:
    """Returns the plan with one row per quantity.

    Dense attention is beside the allocation where the two differ.
    """
    name = f"{plan.source}, {plan.sparsity:.0%} windowed, W={plan.window}"
    table = Table(("", "dense", name))
    _add_model(table, plan)
    _add_costs(table, plan)
    _add_memory(table, plan)
    if plan.pipeline_ranks > 1:
        _add_pipeline(table, plan)
    if plan.tensor_ranks > 1:
        _add_tensor_balance(table, plan)
    if plan.gpus > 1:
        _add_traffic(table, plan)
    _add_run(table, plan)
    return table


def verdict(plan: Plan, change: Change | None) -> list[str]:
    """Returns lines that say whether the plan fits, and what would make it fit.

    change: the smallest change that fits, if it does not.
    """
    card = f"{plan.gigabytes} GB ({plan.device})"
    found = f"{_bytes(plan.memory.total)} by estimate, {_bytes(plan.memory_limit)} allowed"
    if plan.fits:
        return [f"fits in {card}: {found}"]
    lines = [f"does not fit in {card}: {found}"]
    if change is None:
        lines.append("no change of up to three fields fits on up to 1024 GPUs; take a larger GPU")
        return lines
    words = str(change)
    if change.plan.gpus != plan.gpus:
        words = f"{words} --gpus {change.plan.gpus}".strip()
    speed = change.plan.tokens_per_second
    lines.append(
        f"the smallest change that fits: {words}  "
        f"({_bytes(change.plan.memory.total)}, {speed:,.0f} tokens/s)"
    )
    return lines


def topology_table(plans: Sequence[Plan]) -> Table:
    """Returns one row for each topology: its tensor, context, pipeline and data ranks first."""
    table = Table(
        (
            *AXES,
            "GiB",
            "fits",
            "MFU",
            "tokens/s",
            "time",
            "GPU-hours",
            "receives",
        ),
        left=(),
    )
    for plan in plans:
        mfu = plan.mfu * plan.efficiency
        received = plan.traffic.total
        cells = [
            *_ranks(plan),
            Cell(f"{plan.memory.total / 2**30:.1f}", plan.memory.total / 2**30),
            Cell("yes" if plan.fits else "no", plan.fits),
            Cell(f"{mfu:.0%}", mfu),
            Cell(f"{plan.tokens_per_second:,.0f}", plan.tokens_per_second),
            Cell(_duration(plan.seconds), plan.seconds),
            Cell(f"{plan.gpu_hours:,.0f}", plan.gpu_hours),
            Cell(_bytes(received), received),
        ]
        table.rows.append(Row(cells))
    return table


def scaling_table(found: Sequence[Scaled]) -> Table:
    """Returns one row for each number of GPUs. Waits are shares of a step."""
    table = Table(
        (
            "GPUs",
            "sequences",
            *AXES,
            "idle",
            "data",
            "tensor",
            "context",
            "pipeline",
            "tokens/s a GPU",
            "of one GPU",
        ),
        left=(),
    )
    for each in found:
        plan = each.plan
        waits = (each.idle, each.data, each.tensor, each.context, each.pipeline)
        cells = [
            _count(plan.gpus),
            _count(plan.accumulation * plan.data_ranks * each.micro_batch),
            *_ranks(plan),
            *(_share(wait / each.seconds) for wait in waits),
            Cell(f"{each.tokens_per_second:,.0f}", each.tokens_per_second),
            _share(each.efficiency),
        ]
        table.rows.append(Row(cells))
    return table


def _ranks(plan: Plan) -> list[Cell]:
    """Returns the numbers of ranks on AXES."""
    ranks = (plan.tensor_ranks, plan.context_ranks, plan.pipeline_ranks, plan.data_ranks)
    return [_count(number) for number in ranks]


def _share(share: float) -> Cell:
    return Cell(f"{share:.1%}", share)


def _add_model(table: Table, plan: Plan) -> None:
    section = f"Model {plan.model}"
    table.rows += [
        Row(("  parameters", _count(plan.parameters)), section=section),
        Row(("  of these embedding", _count(plan.embedding_parameters)), section=section),
        Row(("  multiplying each token", _count(plan.matmul_parameters)), section=section),
    ]
    if plan.budget is not None:
        note = f"from {plan.budget}"
        target = Cell(f"sparsity {plan.sparsity:g}", plan.sparsity)
        table.rows.append(Row(("  target", "", target), note, section))
    if plan.assumed is not None:
        target = Cell(f"sparsity {plan.sparsity:g}", plan.sparsity)
        table.rows.append(Row(("  assumed", "", target), plan.assumed, section))


def _add_costs(table: Table, plan: Plan) -> None:
    def compare(
        label: str, section: str, cost: Callable[[Cost], float], show: Callable[[Any], str]
    ) -> None:
        dense = cost(plan.dense)
        hybrid = cost(plan.allocation)
        shown = f"{show(hybrid)}  ({hybrid / dense - 1:+.1%})"
        cells = (label, Cell(show(dense), dense), Cell(shown, hybrid))
        table.rows.append(Row(cells, section=section))

    compare("  per token (training)", "FLOPs", lambda cost: cost.flops_per_token, _flops)
    dense = plan.dense.attention_share
    hybrid = plan.allocation.attention_share
    cells = ("  of these attention", Cell(f"{dense:.1%}", dense), Cell(f"{hybrid:.1%}", hybrid))
    table.rows.append(Row(cells, section="FLOPs"))
    cache = "KV cache, bf16"
    compare("  one more token adds", cache, lambda cost: cost.kv_cache_bytes_per_token, _bytes)
    sequence = f"  sequence of {plan.context:,} tokens"
    compare(sequence, cache, lambda cost: cost.kv_cache_bytes, _bytes)


def _add_memory(table: Table, plan: Plan) -> None:
    memory = plan.memory
    recomputed = plan.recomputed
    one_rank = plan.pipeline_ranks == 1
    section = "Memory of each GPU" if one_rank else "Memory of the fullest GPU"

    def add(label: str, size: int, note: str = "") -> None:
        table.rows.append(Row((label, _size(size)), note, section))

    add("  weights", memory.weights)
    add("  gradients", memory.gradients)
    add("  fp32 weights, moments", memory.optimizer)
    kept = f"checkpointed {_bytes(memory.activations_checkpointed)}"
    add("  activations", memory.activations, f"{kept}, kept {_bytes(memory.activations_kept)}")
    if memory.keys:
        add("  of these, keys received", memory.keys, "keys and values of other context ranks")
    if recomputed.heads or recomputed.whole:
        note = recomputed.describe(plan.num_layers)
        table.rows.append(Row(("  recomputed",), note, section))
    if memory.logits:
        add("  logits (fused loss)", memory.logits)
    add("  total", memory.total)
    add("  allowed", plan.memory_limit, f"of {plan.gigabytes} GB, for slack, CUDA and NCCL")


def _add_pipeline(table: Table, plan: Plan) -> None:
    section = f"Pipeline, {plan.schedule}"
    for rank, held in enumerate(plan.pipeline):
        stages = " and ".join(_layer_names(bounds, plan.num_layers) for bounds in held.layers)
        flight = " + ".join(map(str, held.in_flight))
        work = f"{stages}; {held.cost_share:.1%} of the FLOPs; micro-batches in flight {flight}"
        cells = (f"  memory of rank {rank}", _size(held.memory.total))
        table.rows.append(Row(cells, work, section))
    imbalance = Cell(f"{plan.pipeline_imbalance:.3f}", plan.pipeline_imbalance)
    table.rows.append(Row(("  busiest rank over mean", imbalance), section=section))
    bubble = Cell(f"{plan.bubble:.1%}", plan.bubble)
    note = "more micro-batches a step shrink it"
    table.rows.append(Row(("  bubble", bubble), note, section))


def _add_tensor_balance(table: Table, plan: Plan) -> None:
    balance = plan.tensor_balance
    heads = " ".join(map(str, balance.full_heads))
    of_heads = ""
    of_imbalance = ""
    # While learning no head is known to be full, and all cost the same in any order.
    if plan.source != "learn":
        unpermuted = " ".join(map(str, balance.full_heads_unpermuted))
        of_heads = f"in the model's order {unpermuted}"
        of_imbalance = f"in the model's order {balance.imbalance_unpermuted:.3f}"
    section = "Tensor parallelism"
    imbalance = Cell(f"{balance.imbalance:.3f}", balance.imbalance)
    table.rows += [
        Row(("  full heads by rank", heads), of_heads, section),
        Row(("  busiest rank over mean", imbalance), of_imbalance, section),
    ]


def _add_traffic(table: Table, plan: Plan) -> None:
    traffic = plan.traffic
    parts = {
        "  data ranks": (traffic.data, "gradients and new weights"),
        "  tensor ranks": (traffic.tensor, "hidden states"),
        "  context ranks, gather": (traffic.context_gather, "keys and values of full heads"),
        "  context ranks, halo": (traffic.context_halo, "those before chunks, of windowed heads"),
        "  pipeline ranks": (traffic.pipeline, "hidden states and their gradients"),
    }
    for label, (size, note) in parts.items():
        if size:
            section = "A GPU receives in a step"
            table.rows.append(Row((label, _size(size)), note, section))


def _add_run(table: Table, plan: Plan) -> None:
    section = f"Run on {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"

    def add(label: str, cell: Cell, note: str = "") -> None:
        table.rows.append(Row((label, cell), note, section))

    batches = f"{plan.accumulation} micro-batches x {plan.data_ranks} data ranks"
    add("  tokens a step", _count(plan.tokens_per_step), batches)
    add("  tokens", _count(plan.tokens), f"{plan.steps:,} steps")
    basis = "counted as dense" if plan.source == "learn" else "with this allocation"
    busy = f", GPUs busy {plan.efficiency:.1%} of the time" if plan.efficiency < 1 else ""
    peak = f"{plan.peak_flops / 1e12:.0f} TFLOP/s ({plan.device})"
    reached = f"{basis}, {plan.mfu:.0%} of {peak}{busy}"
    add("  tokens/s", Cell(f"{plan.tokens_per_second:,.0f}", plan.tokens_per_second), reached)
    why = f"assumed: {', '.join(plan.mfu_reasons)}" if plan.mfu_reasons else "as given by --mfu"
    add("  MFU", Cell(f"{plan.mfu:.1%}", plan.mfu), why)
    add("  time", Cell(_duration(plan.seconds), plan.seconds))
    add("  GPU-hours", Cell(f"{plan.gpu_hours:,.1f}", plan.gpu_hours))
    add("  a checkpoint", _size(plan.checkpoint_bytes), "fp32 weights and moments")


def _count(number: int) -> Cell:
    return Cell(f"{number:,}", number)


def _size(size: int) -> Cell:
    return Cell(_bytes(size), size)


def _layer_names(bounds: tuple[int, int], num_layers: int) -> str:
    """Returns the content of a stage, such as `embedding, layers 0-6`.

    bounds: first layer of the pipeline, and the one after the last. Layer 1 of the pipeline is
    layer 0 of the model.
    """
    start, stop = bounds
    first = max(start, 1) - 1
    last = min(stop, num_layers + 1) - 2
    names = []
    if start == 0:
        names.append("embedding")
    if first == last:
        names.append(f"layer {first}")
    elif first < last:
        names.append(f"layers {first}-{last}")
    if stop == num_layers + 3:
        names.append("head")
    return ", ".join(names)


def _bytes(size: int) -> str:
    """Returns a size in the largest unit of which it has at least one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(size.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 1024**power:.2f} {units[power]}"


def _flops(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} GFLOP"
    return f"{count / 1e6:.2f} MFLOP"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
