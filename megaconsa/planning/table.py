"""The plan of a run for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from megaconsa.planning.plan import Cost, Plan


def plan_table(plan: Plan) -> Table:
    """The plan for a terminal: one row a quantity, dense beside the allocation where the two differ."""
    name = f"{plan.source}, {plan.sparsity:.0%} windowed, W={plan.window}"
    table = Table(
        "", "dense", name, box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0)
    )
    memory = plan.memory

    def section(title: str) -> None:
        table.add_row("")
        table.add_row(f"[bold]{title}")

    def compare(label: str, cost: Callable[[Cost], float], show: Callable[[Any], str]) -> None:
        a, b = cost(plan.dense), cost(plan.allocation)
        table.add_row(label, show(a), f"{show(b)}  ({b / a - 1:+.1%})")

    table.add_row(f"[bold]Model {plan.model}")
    table.add_row("  parameters", f"{plan.parameters:,}")
    table.add_row("  of these embedding", f"{plan.embedding_parameters:,}")
    table.add_row("  multiplying each token", f"{plan.matmul_parameters:,}")
    if plan.budget is not None:
        table.add_row("  target", "", f"sparsity {plan.sparsity:g} from {plan.budget}")
    section("FLOPs")
    compare("  per token (training)", lambda cost: cost.flops_per_token, _flops)
    table.add_row(
        "  of these attention",
        f"{plan.dense.attention_share:.1%}",
        f"{plan.allocation.attention_share:.1%}",
    )
    section("KV cache, bf16")
    compare("  one more token adds", lambda cost: cost.kv_cache_bytes_per_token, _bytes)
    compare(f"  sequence of {plan.context:,} tokens", lambda cost: cost.kv_cache_bytes, _bytes)
    section("Memory of each GPU" if plan.pipeline_ranks == 1 else "Memory of the fullest GPU")
    table.add_row("  weights", _bytes(memory.weights))
    table.add_row("  gradients", _bytes(memory.gradients))
    table.add_row("  fp32 weights, moments", _bytes(memory.optimizer))
    table.add_row(
        "  activations",
        _bytes(memory.activations),
        f"[dim]checkpointed {_bytes(memory.activations_checkpointed)}, kept {_bytes(memory.activations_kept)}",
    )
    table.add_row("  logits (fused loss)", _bytes(memory.logits))
    table.add_row("  [bold]total", f"[bold]{_bytes(memory.total)}")
    if plan.pipeline_ranks > 1:
        section(f"Pipeline, {plan.schedule}")
        num_layers = max(stop for held in plan.pipeline for _, stop in held.layers) - 3
        for rank, held in enumerate(plan.pipeline):
            stages = " and ".join(_layer_names(bounds, num_layers) for bounds in held.layers)
            flight = " + ".join(map(str, held.in_flight))
            work = f"[dim]{stages}; {held.cost_share:.1%} of the FLOPs; micro-batches in flight {flight}"
            table.add_row(f"  memory of rank {rank}", _bytes(held.memory.total), work)
        table.add_row("  busiest rank over mean", f"{plan.pipeline_imbalance:.3f}")
        table.add_row("  bubble", f"{plan.bubble:.1%}", "[dim]more micro-batches a step shrink it")
    if plan.tensor_ranks > 1:
        section("Tensor parallelism")
        balance = plan.tensor_balance
        counts, unpermuted = (
            " ".join(map(str, heads))
            for heads in (balance.full_heads, balance.full_heads_unpermuted)
        )
        # While learning no head is known to be full, and all cost the same.
        order = "" if plan.source == "learn" else "[dim]in the model's order "
        table.add_row("  full heads by rank", counts, order and order + unpermuted)
        table.add_row(
            "  busiest rank over mean",
            f"{balance.imbalance:.3f}",
            order and f"{order}{balance.imbalance_unpermuted:.3f}",
        )
    section(f"Run on {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}")
    table.add_row(
        "  tokens a step",
        f"{plan.tokens_per_step:,}",
        f"[dim]{plan.accumulation} micro-batches x {plan.data_ranks} data ranks",
    )
    table.add_row("  tokens", f"{plan.tokens:,}", f"[dim]{plan.steps:,} steps")
    basis = "counted as dense" if plan.source == "learn" else "with this allocation"
    busy = f", GPUs busy {plan.efficiency:.1%} of the time" if plan.efficiency < 1 else ""
    assumed = f"[dim]{basis}, {plan.mfu:.0%} of {plan.peak_flops / 1e12:.0f} TFLOP/s ({plan.device}){busy}"
    table.add_row("  tokens/s", f"{plan.tokens_per_second:,.0f}", assumed)
    table.add_row("  time", _duration(plan.seconds))
    return table


def _layer_names(bounds: tuple[int, int], num_layers: int) -> str:
    """`embedding, layers 0-6` for the stage with these bounds; the pipeline's layer 1 is the model's layer 0."""
    start, stop = bounds
    first, last = max(start, 1) - 1, min(stop, num_layers + 1) - 2
    blocks = (
        [] if first > last else [f"layer {first}" if first == last else f"layers {first}-{last}"]
    )
    return ", ".join([*["embedding"] * (start == 0), *blocks, *["head"] * (stop == num_layers + 3)])


def _bytes(size: int) -> str:
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _flops(count: float) -> str:
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e9 else f"{count / 1e6:.2f} MFLOP"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
