"""What a configuration will cost, from shapes alone: parameters, memory, FLOPs, KV cache, time. It needs no GPU and no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation, top_k
from megaconsa.errors import InputError
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import kv_cache_bytes, parameter_count, peak_flops, training_flops


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the end of a micro-batch's forward pass, which is about the peak."""

    weights: int
    gradients: int
    """fp32, accumulated over micro-batches; every data rank holds all of them."""
    optimizer: int
    """fp32 master weights and Adam's two moments, sharded over the data ranks (ZeRO-1)."""
    activations: int
    activations_kept: int
    """Activations without checkpointing."""
    activations_checkpointed: int
    """Activations with checkpointing."""
    logits: int
    """What the fused cross-entropy needs: a chunk of logits, and the gradients of the head and of its input."""
    total: int


@dataclass(frozen=True)
class Cost:
    """What depends on the allocation."""

    flops_per_token: float
    """Forward and backward, one document a sequence."""
    attention_share: float
    """Part of the FLOPs that is attention's Q K^T and P V."""
    kv_cache_bytes_per_token: int
    """What one more token adds once the windows are full."""
    kv_cache_bytes: int
    """One sequence of `Plan.context` tokens."""


@dataclass(frozen=True)
class Plan:
    model: str
    source: str
    window: int
    sparsity: float
    parameters: int
    embedding_parameters: int
    matmul_parameters: int
    gpus: int
    data_ranks: int
    accumulation: int
    """Micro-batches a data rank runs for each step."""
    memory: Memory
    context: int
    dense: Cost
    allocation: Cost
    """While learning: at the target sparsity, which the finished table has."""
    tokens_per_step: int
    steps: int
    tokens: int
    device: str
    peak_flops: float
    mfu: float
    tokens_per_second: float
    """Of all GPUs together, at `mfu`; a learning run is reckoned as dense."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(config: Config, gpus: int, device: str, mfu: float, context: int | None = None) -> Plan:
    """Reckons a run of `config` on `gpus` devices at `mfu`; context (tokens) of the KV cache: None is the training length.

    Raises InputError for a device whose peak is unknown, an MFU outside (0, 1], a batch that the data ranks cannot share, and
    an allocation that does not fit.
    """
    peak = peak_flops(device)
    if peak is None:
        raise InputError(f"--device {device} is no GPU whose bf16 peak is known; use for example a100, h100, h200 or b200")
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu:g} must lie between 0 and 1; 0.4 is common")
    shape, training = config.shape(), config.training
    data_ranks = _data_ranks(config, gpus)
    allocation = planned_allocation(config)
    length = training.sequence_length
    context = length if context is None else context
    dense = _cost(shape, None, length, context)
    hybrid = _cost(shape, allocation, length, context)
    count = parameter_count(shape)
    tokens_per_step = training.global_batch * length
    tokens_per_second = gpus * peak * mfu / (dense if config.learning else hybrid).flops_per_token
    return Plan(
        model=config.model.preset,
        source=config.allocation.source if config.allocation.source != "rule" else config.allocation.rule,
        window=allocation.window,
        sparsity=allocation.sparsity,
        parameters=count.total,
        embedding_parameters=count.embedding,
        matmul_parameters=count.matmul,
        gpus=gpus,
        data_ranks=data_ranks,
        accumulation=training.global_batch // (training.micro_batch * data_ranks),
        memory=_memory(config, shape, data_ranks),
        context=context,
        dense=dense,
        allocation=hybrid,
        tokens_per_step=tokens_per_step,
        steps=training.steps,
        tokens=tokens_per_step * training.steps,
        device=device,
        peak_flops=peak,
        mfu=mfu,
        tokens_per_second=tokens_per_second,
        seconds=tokens_per_step * training.steps / tokens_per_second,
    )


def planned_allocation(config: Config) -> Allocation:
    """The allocation of a run; while learning some table of the final sparsity, on which alone FLOPs and cache depend."""
    fixed = config.fixed_allocation()
    if fixed is not None:
        return fixed
    wanted, shape = config.allocation, config.shape()
    layers, kv_heads, window = shape.num_hidden_layers, shape.num_key_value_heads, config.attention.window
    units = torch.zeros(layers) if wanted.granularity == "layer" else torch.zeros(layers, kv_heads)
    full = top_k(units, wanted.sparsity, kv_heads, wanted.granularity, wanted.scope)
    return Allocation(window, tuple(map(tuple, full.tolist())), wanted.granularity, wanted.scope, wanted.sparsity)


def activation_values(model: ModelConfig, learning: bool) -> int:
    """Values that one layer keeps of one token for the backward pass.

    Inputs of the two norms and their outputs (4 hidden); q and k before their norms and after rotation, v and the attention's
    output (3 of the queries' width, 3 of the keys'); gate before and after silu, up, and the product (4 intermediate).
    The gated kernel also keeps the difference of its two outputs (one queries' width).
    """
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return 4 * model.hidden_size + (4 if learning else 3) * queries + 3 * keys + 4 * model.intermediate_size


def _data_ranks(config: Config, gpus: int) -> int:
    training, split = config.training, config.parallel.tensor * config.parallel.pipeline
    if gpus % split:
        raise InputError(f"--gpus {gpus} must be a multiple of parallel.tensor x parallel.pipeline = {split}")
    sequences = training.micro_batch * gpus // split
    if training.global_batch % sequences:
        raise InputError(
            f"training.global_batch={training.global_batch} must be a multiple of training.micro_batch x data ranks = "
            f"{training.micro_batch} x {gpus // split} with --gpus {gpus}"
        )
    return gpus // split


def _cost(model: ModelConfig, allocation: Allocation | None, length: int, context: int) -> Cost:
    flops = training_flops(model, allocation, length, [length])
    linear = 6 * parameter_count(model).matmul * length
    cache = kv_cache_bytes(model, allocation, context)
    # A context at which every window is full, whatever the one asked for.
    long = max(context, allocation.window if allocation else 0)
    growth = kv_cache_bytes(model, allocation, long + 1) - kv_cache_bytes(model, allocation, long)
    return Cost(flops / length, 1 - linear / flops, growth, cache)


def _memory(config: Config, shape: ModelConfig, data_ranks: int) -> Memory:
    """Tensor and pipeline ranks share weights evenly; a first pipeline stage has as many layers in flight as one GPU alone."""
    training, parallel = config.training, config.parallel
    value = 4 if training.precision == "fp32" else 2
    weights = -(-parameter_count(shape).total // (parallel.tensor * parallel.pipeline))
    tokens = training.micro_batch * training.sequence_length
    layer = value * tokens * activation_values(shape, config.learning) // parallel.tensor
    inputs = value * tokens * shape.hidden_size
    kept = shape.num_hidden_layers * layer
    checkpointed = shape.num_hidden_layers * inputs + layer
    activations = checkpointed if training.activation_checkpointing else kept
    parts = {
        "weights": value * weights,
        "gradients": 4 * weights,
        "optimizer": -(-12 * weights // data_ranks),
        "activations": activations,
        "logits": _logit_bytes(shape, tokens, value) // parallel.tensor,
    }
    return Memory(**parts, activations_kept=kept, activations_checkpointed=checkpointed, total=sum(parts.values()))


def _logit_bytes(shape: ModelConfig, tokens: int, value: int) -> int:
    """A chunk of logits, the head's gradient in fp32 and again in the weights' precision, and the gradient of the hidden states.

    The chunk is Liger's (fused_linear_cross_entropy): about as large as the hidden states, its tokens a power of two.
    """
    share = -(-tokens // -(-shape.vocab_size // shape.hidden_size))
    chunk = min(tokens, 1 << (share - 1).bit_length())
    return (
        value * chunk * shape.vocab_size + (4 + value) * shape.vocab_size * shape.hidden_size + value * tokens * shape.hidden_size
    )


def plan_table(plan: Plan) -> Table:
    """The plan for a terminal: one row a quantity, dense beside the allocation where the two differ."""
    name = f"{plan.source}, {plan.sparsity:.0%} windowed, W={plan.window}"
    table = Table("", "dense", name, box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
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
    section("FLOPs")
    compare("  per token (training)", lambda cost: cost.flops_per_token, _flops)
    table.add_row("  of these attention", f"{plan.dense.attention_share:.1%}", f"{plan.allocation.attention_share:.1%}")
    section("KV cache, bf16")
    compare("  one more token adds", lambda cost: cost.kv_cache_bytes_per_token, _bytes)
    compare(f"  sequence of {plan.context:,} tokens", lambda cost: cost.kv_cache_bytes, _bytes)
    section("Memory of each GPU")
    table.add_row("  weights", _bytes(memory.weights))
    table.add_row("  fp32 gradients", _bytes(memory.gradients))
    table.add_row("  fp32 weights, moments", _bytes(memory.optimizer))
    table.add_row(
        "  activations",
        _bytes(memory.activations),
        f"[dim]checkpointed {_bytes(memory.activations_checkpointed)}, kept {_bytes(memory.activations_kept)}",
    )
    table.add_row("  logits (fused loss)", _bytes(memory.logits))
    table.add_row("  [bold]total", f"[bold]{_bytes(memory.total)}")
    section(f"Run on {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}")
    table.add_row(
        "  tokens a step", f"{plan.tokens_per_step:,}", f"[dim]{plan.accumulation} micro-batches x {plan.data_ranks} data ranks"
    )
    table.add_row("  tokens", f"{plan.tokens:,}", f"[dim]{plan.steps:,} steps")
    basis = "counted as dense" if plan.source == "learn" else "with this allocation"
    assumed = f"[dim]{basis}, {plan.mfu:.0%} of {plan.peak_flops / 1e12:.0f} TFLOP/s ({plan.device})"
    table.add_row("  tokens/s", f"{plan.tokens_per_second:,.0f}", assumed)
    table.add_row("  time", _duration(plan.seconds))
    return table


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
