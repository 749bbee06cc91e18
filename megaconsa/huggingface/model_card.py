"""The README.md of an export: how to load it, what its attention does, what its cache costs, where it came from."""

from __future__ import annotations

import json
from typing import Any

import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.model.config import ModelConfig

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
layer are stored with the full-attention ones first; `allocation.json` and the table below show them in the original order.
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
| sparsity, the fraction of KV heads with the window | {sparsity:.4g} |
| window | {window} keys, the query's own included |
| KV cache per token | {token} and, once per sequence, {windows} for the windows; a dense model: {dense_token} |
| KV cache at {context} tokens | {hybrid}, {ratio:.1%} of a dense model's {dense} |

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
    model: ModelConfig, allocation: Allocation, dtype: torch.dtype, *, has_tokenizer: bool, origin: dict[str, Any] | None
) -> str:
    """The text of README.md; cache sizes are for keys and values held in `dtype`."""
    all_heads = allocation.num_layers * allocation.num_kv_heads
    full_heads = sum(map(sum, allocation.full))
    head_bytes = 2 * model.head_dim * dtype.itemsize  # key and value of one token in one head
    context = model.max_position_embeddings
    windows = min(allocation.window - 1, context) * (all_heads - full_heads) * head_bytes
    dense, hybrid = context * all_heads * head_bytes, context * full_heads * head_bytes + windows

    trust = "" if allocation.is_layer_wise else ", trust_remote_code=True"
    text = HEADER.format(
        with_windows=" with full and sliding-window attention" if allocation.sparsity else "",
        import_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        trust=trust,
        load_tokenizer=f'\ntokenizer = AutoTokenizer.from_pretrained("PATH"{trust})' if has_tokenizer else "",
    )
    if not allocation.is_layer_wise:
        text += HEAD_WISE
    shape = (model.num_hidden_layers, model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    text += SHAPE.format(shape=", ".join(map(str, shape)), dtype=str(dtype).removeprefix("torch."))
    if allocation.sparsity:
        digits = len(str(allocation.num_layers - 1))
        rows = (f"{layer:>{digits}} {''.join('F' if full else '.' for full in row)}" for layer, row in enumerate(allocation.full))
        text += HYBRID.format(
            full_heads=full_heads,
            all_heads=all_heads,
            sparsity=allocation.sparsity,
            window=allocation.window,
            token=_size(full_heads * head_bytes),
            windows=_size(windows),
            dense_token=_size(all_heads * head_bytes),
            context=context,
            hybrid=_size(hybrid),
            ratio=hybrid / dense,
            dense=_size(dense),
            table="\n".join(rows),
        )
    else:
        text += DENSE.format(dense_token=_size(all_heads * head_bytes))
    if origin:
        text += ORIGIN.format(origin=json.dumps(origin, indent=2, default=str))
    return text


def _size(count: float) -> str:
    """`count` bytes in the largest binary unit that leaves at least 1."""
    unit = 0
    while count >= 1024 and unit < 4:
        count, unit = count / 1024, unit + 1
    return f"{count:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
