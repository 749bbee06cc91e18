"""The plan of a run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from megaconsa.planning.plan import Cost, Plan


def plan_table(plan: Plan) -> Table:
    """Returns the plan with one row per quantity.

    Dense attention is beside the allocation where the two differ.
    """
    name = f"{plan.source}, {plan.sparsity:.0%} windowed, W={plan.window}"
    table = Table(
        "", "dense", name, box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0)
    )
    _add_model(table, plan)
    _add_costs(table, plan)
    _add_memory(table, plan)
    if plan.pipeline_ranks > 1:
        _add_pipeline(table, plan)
    if plan.tensor_ranks > 1:
        _add_tensor_balance(table, plan)
    _add_run(table, plan)
    return table


def _add_title(table: Table, title: str) -> None:
    table.add_row("")
    table.add_row(f"[bold]{title}")


def _add_model(table: Table, plan: Plan) -> None:
    table.add_row(f"[bold]Model {plan.model}")
    table.add_row("  parameters", f"{plan.parameters:,}")
    table.add_row("  of these embedding", f"{plan.embedding_parameters:,}")
    table.add_row("  multiplying each token", f"{plan.matmul_parameters:,}")
    if plan.budget is not None:
        table.add_row("  target", "", f"sparsity {plan.sparsity:g} from {plan.budget}")


def _add_costs(table: Table, plan: Plan) -> None:
    def compare(label: str, cost: Callable[[Cost], float], show: Callable[[Any], str]) -> None:
        dense = cost(plan.dense)
        hybrid = cost(plan.allocation)
        table.add_row(label, show(dense), f"{show(hybrid)}  ({hybrid / dense - 1:+.1%})")

    _add_title(table, "FLOPs")
    compare("  per token (training)", lambda cost: cost.flops_per_token, _flops)
    table.add_row(
        "  of these attention",
        f"{plan.dense.attention_share:.1%}",
        f"{plan.allocation.attention_share:.1%}",
    )
    _add_title(table, "KV cache, bf16")
    compare("  one more token adds", lambda cost: cost.kv_cache_bytes_per_token, _bytes)
    compare(f"  sequence of {plan.context:,} tokens", lambda cost: cost.kv_cache_bytes, _bytes)


def _add_memory(table: Table, plan: Plan) -> None:
    memory = plan.memory
    recomputed = plan.recomputed
    one_rank = plan.pipeline_ranks == 1
    _add_title(table, "Memory of each GPU" if one_rank else "Memory of the fullest GPU")
    table.add_row("  weights", _bytes(memory.weights))
    table.add_row("  gradients", _bytes(memory.gradients))
    table.add_row("  fp32 weights, moments", _bytes(memory.optimizer))
    checkpointed = _bytes(memory.activations_checkpointed)
    kept = _bytes(memory.activations_kept)
    table.add_row(
        "  activations",
        _bytes(memory.activations),
        f"[dim]checkpointed {checkpointed}, kept {kept}",
    )
    if recomputed.heads or recomputed.whole:
        table.add_row("  recomputed", "", f"[dim]{recomputed.describe(_num_layers(plan))}")
    table.add_row("  logits (fused loss)", _bytes(memory.logits))
    table.add_row("  [bold]total", f"[bold]{_bytes(memory.total)}")


def _add_pipeline(table: Table, plan: Plan) -> None:
    _add_title(table, f"Pipeline, {plan.schedule}")
    num_layers = _num_layers(plan)
    for rank, held in enumerate(plan.pipeline):
        stages = " and ".join(_layer_names(bounds, num_layers) for bounds in held.layers)
        flight = " + ".join(map(str, held.in_flight))
        work = (
            f"[dim]{stages}; {held.cost_share:.1%} of the FLOPs; micro-batches in flight {flight}"
        )
        table.add_row(f"  memory of rank {rank}", _bytes(held.memory.total), work)
    table.add_row("  busiest rank over mean", f"{plan.pipeline_imbalance:.3f}")
    table.add_row("  bubble", f"{plan.bubble:.1%}", "[dim]more micro-batches a step shrink it")


def _add_tensor_balance(table: Table, plan: Plan) -> None:
    _add_title(table, "Tensor parallelism")
    balance = plan.tensor_balance
    heads = " ".join(map(str, balance.full_heads))
    heads_unpermuted = ""
    imbalance_unpermuted = ""
    # While learning no head is known to be full, and all cost the same in any order.
    if plan.source != "learn":
        order = "[dim]in the model's order "
        heads_unpermuted = order + " ".join(map(str, balance.full_heads_unpermuted))
        imbalance_unpermuted = f"{order}{balance.imbalance_unpermuted:.3f}"
    table.add_row("  full heads by rank", heads, heads_unpermuted)
    table.add_row("  busiest rank over mean", f"{balance.imbalance:.3f}", imbalance_unpermuted)


def _add_run(table: Table, plan: Plan) -> None:
    _add_title(table, f"Run on {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}")
    table.add_row(
        "  tokens a step",
        f"{plan.tokens_per_step:,}",
        f"[dim]{plan.accumulation} micro-batches x {plan.data_ranks} data ranks",
    )
    table.add_row("  tokens", f"{plan.tokens:,}", f"[dim]{plan.steps:,} steps")
    basis = "counted as dense" if plan.source == "learn" else "with this allocation"
    busy = f", GPUs busy {plan.efficiency:.1%} of the time" if plan.efficiency < 1 else ""
    peak = f"{plan.peak_flops / 1e12:.0f} TFLOP/s ({plan.device})"
    assumed = f"[dim]{basis}, {plan.mfu:.0%} of {peak}{busy}"
    table.add_row("  tokens/s", f"{plan.tokens_per_second:,.0f}", assumed)
    table.add_row("  time", _duration(plan.seconds))


def _num_layers(plan: Plan) -> int:
    """The model's layers."""
    # The pipeline also has the embedding, the final norm and the output head.
    return max(stop for held in plan.pipeline for _, stop in held.layers) - 3


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
