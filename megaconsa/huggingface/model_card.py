"""The README.md of an export: how to load it, what its attention does, what its cache costs, where it came from."""

from __future__ import annotations

import json
from typing import Any

import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.files import binary_size
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import kv_cache_bytes

HEAT_MAP = "allocation.png"

HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# Qwen3-like model{with_windows}

```python
from transformers import AutoModelForCausalLM{import_tokenizer}

model = AutoModelForCausalLM.from_pretrained("PATH"{trust}){load_tokenizer}
```
"""

HEAD_WISE = """
The model file, `modeling_megaconsa.py`, is in this folder and needs transformers 4.57 or later. In the weights, the KV heads of a
layer are stored with the full-attention ones first; `allocation.json` and the map below show them in the original order.
"""

SHAPE = """
| | |
| --- | --- |
| layers, query heads, KV heads, head dimension | {shape} |
| weights | {dtype} |
"""

DENSE = """\
| KV cache per token | {dense_token} |
"""

HYBRID = """\
| KV heads with full attention | {full_heads} of {all_heads} |
| sparsity, the fraction of KV heads with the window: target, reached | {target:.4g}, {sparsity:.4g} |
| window | {window} keys, the query's own included |
"""

EVIDENCE = """\
| evidence: split agreement, separated share of units | {agreement:.2f}, {separated:.2f} |
"""

TOKENS = """\
| training tokens | {tokens:,} |
"""

CACHE = """
## KV cache

Keys and values of one sequence in {dtype}. Full heads hold every token, sliding heads the last {held}.

| context | this model | dense | share |
| --- | --- | --- | --- |
{rows}

## Allocation

A line is a layer, a letter a KV head: `F` has full attention, `.` the window.

```
{table}
```
"""

ORIGIN = """
## Origin

```json
{origin}
```
"""


def model_card(
    model: ModelConfig,
    allocation: Allocation,
    dtype: torch.dtype,
    *,
    has_tokenizer: bool,
    has_heat_map: bool,
    origin: dict[str, Any] | None,
) -> str:
    """The text of README.md; cache sizes are for keys and values held in `dtype`. origin may have `tokens`, those of the training."""
    all_heads = allocation.num_layers * allocation.num_kv_heads
    precision = str(dtype).removeprefix("torch.")
    trust = "" if allocation.is_layer_wise else ", trust_remote_code=True"
    text = HEADER.format(
        with_windows=" with full and sliding-window attention" if allocation.sparsity else "",
        import_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        trust=trust,
        load_tokenizer=f'\ntokenizer = AutoTokenizer.from_pretrained("PATH"{trust})'
        if has_tokenizer
        else "",
    )
    if not allocation.is_layer_wise:
        text += HEAD_WISE
    shape = (
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
    )
    text += SHAPE.format(shape=", ".join(map(str, shape)), dtype=precision)
    if origin and origin.get("tokens"):
        text += TOKENS.format(tokens=origin["tokens"])
    if allocation.sparsity:
        text += HYBRID.format(
            full_heads=sum(map(sum, allocation.full)),
            all_heads=all_heads,
            target=allocation.target_sparsity,
            sparsity=allocation.sparsity,
            window=allocation.window,
        )
        learned = allocation.origin
        if (
            learned.get("split_agreement") is not None
            and learned.get("separated_share") is not None
        ):
            text += EVIDENCE.format(
                agreement=learned["split_agreement"], separated=learned["separated_share"]
            )
        digits = len(str(allocation.num_layers - 1))
        lines = (
            f"{layer:>{digits}} {''.join('F' if full else '.' for full in row)}"
            for layer, row in enumerate(allocation.full)
        )
        text += CACHE.format(
            dtype=precision,
            held=allocation.window - 1,
            rows="\n".join(
                _cache_row(model, allocation, dtype, context) for context in _contexts(model)
            ),
            table="\n".join(lines),
        )
        if has_heat_map:
            text += f"\n![The allocation, layer by KV head]({HEAT_MAP})\n"
    else:
        text += DENSE.format(
            dense_token=binary_size(kv_cache_bytes(model, None, 1, dtype.itemsize))
        )
    if origin:
        text += ORIGIN.format(origin=json.dumps(origin, indent=2, default=str))
    return text


def _contexts(model: ModelConfig) -> list[int]:
    """Contexts of the table, in tokens: up to what the model has positions for."""
    longest = model.max_position_embeddings
    return [context for context in (2048, 8192, 32_768, 131_072) if context < longest] + [longest]


def _cache_row(model: ModelConfig, allocation: Allocation, dtype: torch.dtype, context: int) -> str:
    hybrid, dense = (
        kv_cache_bytes(model, table, context, dtype.itemsize) for table in (allocation, None)
    )
    return f"| {context:,} | {binary_size(hybrid)} | {binary_size(dense)} | {hybrid / dense:.1%} |"
