"""Writes the README.md of an export.

It says how to load the model, what its attention does, what its cache costs and where the weights
came from.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.files import binary_size
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import kv_cache_bytes, parameter_count

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

GENERATE = """
inputs = tokenizer("{prompt}", return_tensors="pt")
generated = model.generate(
    inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=64
)
print(tokenizer.decode(generated[0], skip_special_tokens=True))"""

PROMPT = "Once upon a time"
"""A prompt that fits no data in particular. The reader will put their own in its place."""

HEAD_WISE = """
The model file, `modeling_megaconsa.py`, is in this folder and needs transformers 4.57 or later. \
In the weights, the KV heads of a
layer are stored with the full-attention ones first; \
`allocation.json` and the map below show them in the original order.
"""

SHAPE = """
| | |
| --- | --- |
| parameters | {parameters:,} |
| layers, query heads, KV heads, head dimension | {shape} |
| weights | {dtype} |
"""

DENSE = """\
| KV cache per token | {dense_token} |
"""

HYBRID = """\
| KV heads with full attention | {full_heads} of {all_heads} |
| sparsity, the fraction of KV heads with the window: target, reached \
| {target:.4g}, {sparsity:.4g} |
| window | {window} keys, the query's own included |
"""

EVIDENCE = """\
| evidence: split agreement, separated share of units | {agreement:.2f}, {separated:.2f} |
"""

TOKENS = """\
| training tokens | {tokens:,}{before} |
"""

LENGTH = """\
| length of the training sequences | {length:,} tokens |
"""

LOSSES = """\
| {names} at the end, in nats a token | {values} |
"""

DATA = """\
| training data | {data} |
"""

CACHE = """
## KV cache

Keys and values of one sequence in {dtype}. \
Full heads hold every token, sliding heads the last {held}.

| context | this model | dense | share |
| --- | --- | --- | --- |
{rows}

## Allocation

A line is a layer, a letter a KV head: `F` has full attention, `.` the window.

```
{table}
```
"""

LICENCE = """
## Licence and citation

The weights have no licence until whoever trained them chooses one. It depends on the data and on \
the weights that the training started from. Before you publish this folder, add a `license:` to \
the first lines of this file.{model_file}

The allocation of heads follows ConSA. Please cite

```bibtex
@misc{{consa,
  title = {{Controllable Sparsity in Hybrid Attention via Learnable Allocation}},
  eprint = {{2606.18056}},
  archivePrefix = {{arXiv}},
  year = {{2026}}
}}
```
"""

MODEL_FILE_LICENCE = """ The code in `modeling_megaconsa.py` is under the Apache License 2.0."""

ORIGIN = """
## Origin

```json
{origin}
```
"""


def model_card(
    model_config: ModelConfig,
    allocation: Allocation,
    dtype: torch.dtype,
    *,
    has_tokenizer: bool,
    has_heat_map: bool,
    origin: dict[str, Any] | None,
) -> str:
    """Returns the text of README.md.

    dtype: of the weights, and of the keys and values whose cache sizes are shown.
    origin: where the weights came from. It may have `tokens`, the number of training tokens.
    """
    all_heads = allocation.num_layers * allocation.num_kv_heads
    precision = str(dtype).removeprefix("torch.")
    trust = "" if allocation.is_layer_wise else ", trust_remote_code=True"
    load_tokenizer = ""
    if has_tokenizer:
        load_tokenizer = f'\ntokenizer = AutoTokenizer.from_pretrained("PATH"{trust})\n'
        load_tokenizer += GENERATE.format(prompt=PROMPT)
    text = HEADER.format(
        with_windows=" with full and sliding-window attention" if allocation.sparsity else "",
        import_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        trust=trust,
        load_tokenizer=load_tokenizer,
    )
    if not allocation.is_layer_wise:
        text += HEAD_WISE
    shape = (
        model_config.num_hidden_layers,
        model_config.num_attention_heads,
        model_config.num_key_value_heads,
        model_config.head_dim,
    )
    text += SHAPE.format(
        parameters=parameter_count(model_config).total,
        shape=", ".join(map(str, shape)),
        dtype=precision,
    )
    text += _training_rows(origin or {}, allocation)
    if allocation.sparsity:
        text += HYBRID.format(
            full_heads=sum(map(sum, allocation.full)),
            all_heads=all_heads,
            target=allocation.target_sparsity,
            sparsity=allocation.sparsity,
            window=allocation.window,
        )
        agreement = allocation.origin.get("split_agreement")
        separated = allocation.origin.get("separated_share")
        if agreement is not None and separated is not None:
            text += EVIDENCE.format(agreement=agreement, separated=separated)
        cache_rows = [
            _cache_row(model_config, allocation, dtype, context)
            for context in _contexts(model_config)
        ]
        digits = len(str(allocation.num_layers - 1))
        lines = []
        for layer, row in enumerate(allocation.full):
            letters = "".join("F" if full else "." for full in row)
            lines.append(f"{layer:>{digits}} {letters}")
        text += CACHE.format(
            dtype=precision,
            # A sliding head caches one key less than its window, which includes the query's own.
            held=allocation.window - 1,
            rows="\n".join(cache_rows),
            table="\n".join(lines),
        )
        if has_heat_map:
            text += f"\n![The allocation, layer by KV head]({HEAT_MAP})\n"
    else:
        token_bytes = kv_cache_bytes(model_config, None, 1, dtype.itemsize)
        text += DENSE.format(dense_token=binary_size(token_bytes))
    model_file = "" if allocation.is_layer_wise else MODEL_FILE_LICENCE
    text += LICENCE.format(model_file=model_file)
    if origin:
        text += ORIGIN.format(origin=json.dumps(origin, indent=2, default=str))
    return text


def _training_rows(origin: dict[str, Any], allocation: Allocation) -> str:
    """Returns the rows of the table about the training. What is not known is left out."""
    text = ""
    if origin.get("tokens"):
        earlier = allocation.origin.get("tokens")
        before = f", after {earlier:,} that gave the allocation" if earlier else ""
        text += TOKENS.format(tokens=origin["tokens"], before=before)
    if origin.get("sequence_length"):
        text += LENGTH.format(length=origin["sequence_length"])
    losses = {
        name: origin[field]
        for field, name in (("loss", "loss"), ("validation_loss", "validation loss"))
        if origin.get(field) is not None
    }
    if losses:
        values = ", ".join(f"{loss:.4f}" for loss in losses.values())
        text += LOSSES.format(names=", ".join(losses), values=values)
    if origin.get("data"):
        text += DATA.format(data=f"`{origin['data']}`")
    return text


def _contexts(model_config: ModelConfig) -> list[int]:
    """Returns the contexts of the cache table, in tokens. The last one is the model's longest."""
    longest = model_config.max_position_embeddings
    shorter = [context for context in (2048, 8192, 32_768, 131_072) if context < longest]
    return [*shorter, longest]


def _cache_row(
    model_config: ModelConfig, allocation: Allocation, dtype: torch.dtype, context: int
) -> str:
    hybrid = kv_cache_bytes(model_config, allocation, context, dtype.itemsize)
    dense = kv_cache_bytes(model_config, None, context, dtype.itemsize)
    return f"| {context:,} | {binary_size(hybrid)} | {binary_size(dense)} | {hybrid / dense:.1%} |"
