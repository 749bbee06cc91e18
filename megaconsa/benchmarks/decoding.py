"""Cache bytes, prefill time and decoding speed of exports on a GPU, beside the same weights
exported dense.

    python -m megaconsa.benchmarks.decoding --out speed.json

The model has the shape of Qwen3-0.6B and random weights. It runs `generate` as a user calls it,
greedy, in bf16. Each cell runs twice and only the second run counts, because the first compiles.
"library" is transformers with SDPA and its own cache. "kernels" is `use_kernels` with a
`KernelCache`.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megaconsa.consa import rules
from megaconsa.huggingface.decoding import KernelCache, use_kernels
from megaconsa.huggingface.export import export
from megaconsa.huggingface.load import load_exported
from megaconsa.huggingface.modeling_megaconsa import CACHE
from megaconsa.huggingface.parameter_names import parameter_shapes
from megaconsa.model.config import PRESETS
from megaconsa.model.flops import kv_cache_bytes
from megaconsa.model.initialize import initial_weight

WINDOW = 1024
CELLS = ((1, 8192), (1, 32_768), (1, 131_072), (16, 8192), (16, 32_768))
"""Batch size and context length of each measurement."""
NEW_TOKENS = 64
LARGE = 2**18
"""Prompt tokens over the whole batch. The library gets larger prompts in chunks."""
SETTLED = 8
"""First decoding steps that are not timed: compilation, tuning and the capture of the step."""


def main() -> None:
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    model_config = replace(PRESETS["qwen3-0.6b"], max_position_embeddings=131_072 + NEW_TOKENS)
    weights = {
        name: initial_weight(name, torch.Size(shape), model_config, 0)
        for name, shape in parameter_shapes(model_config).items()
    }
    layers = model_config.num_hidden_layers
    heads = model_config.num_key_value_heads
    tables = {
        "dense": rules.build("dense", layers, heads, WINDOW),
        "rho 0.5": rules.build("head-share", layers, heads, WINDOW, sparsity=0.5),
        "rho 0.75": rules.build("head-share", layers, heads, WINDOW, sparsity=0.75),
    }
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, table in tables.items():
            path = Path(folder) / name.replace(" ", "_")
            export(
                weights,
                model_config,
                table,
                path,
                tokenizer=None,
                dtype=torch.bfloat16,
                origin=None,
            )
            # Only the dense model runs in the library too, as the baseline.
            ways = ("library", "kernels") if name == "dense" else ("kernels",)
            for way in ways:
                loaded = load_exported(path, torch.bfloat16)[0].cuda()
                if way == "kernels":
                    use_kernels(loaded)
                for batch, context in CELLS:
                    row: dict[str, Any] = {
                        "model": name,
                        "way": way,
                        "batch": batch,
                        "context": context,
                    }
                    row["formula_gib"] = (
                        batch * kv_cache_bytes(model_config, table, context) / 2**30
                    )
                    try:
                        # The first run compiles and is not recorded.
                        measure(loaded, way, batch, context, SETTLED + 2)
                        row |= measure(loaded, way, batch, context, NEW_TOKENS)
                    except torch.OutOfMemoryError:
                        row["error"] = "out of memory"
                    # Free the cache of this cell before the next one is allocated.
                    gc.collect()
                    torch.cuda.empty_cache()
                    rows.append(row)
                    out.write_text(json.dumps(rows, indent=1))
                    print(row, flush=True)
                del loaded
    print_table(rows)


def measure(model: Any, way: str, batch: int, context: int, new_tokens: int) -> dict[str, float]:
    """Generates from random prompts once and returns the figures.

    way: "library" or "kernels".
    context: tokens of each prompt.
    new_tokens: tokens to generate after each prompt, more than SETTLED + 1.
    """
    tokens = torch.randint(model.config.vocab_size, (batch, context), device="cuda")
    times: list[float] = []

    def clock(*_: Any) -> torch.Tensor:
        """A stopping criterion that never stops. `generate` calls it after every token."""
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        return torch.zeros(batch, dtype=torch.bool, device="cuda")

    cache: dict[str, Any] = {}
    if way == "kernels":
        cache = {"past_key_values": KernelCache(model, context + new_tokens)}
    elif batch * context > LARGE:
        # The library copies its cache as it grows. If the prompt were given at once, the largest
        # cell would not fit.
        cache = {"prefill_chunk_size": 8192}
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    result = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=[clock],
        return_dict_in_generate=True,
        **cache,
    )
    if way == "kernels":
        held = cache["past_key_values"].nbytes
    else:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in result[CACHE].layers)
    step = (times[-1] - times[SETTLED]) / (len(times) - 1 - SETTLED)
    return {
        "cache_gib": held / 2**30,
        "prefill_s": times[0] - begun,
        "decode_ms": step * 1e3,
        "decode_tokens_per_s": batch / step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a Markdown table.

    `share` is the cache size over that of a dense cache of the same context. The last two columns
    compare the decoding speed with the dense model's.
    """
    dense = {
        (row["way"], row["batch"], row["context"]): row for row in rows if row["model"] == "dense"
    }
    print(
        "| model | way | batch | context | cache GiB | share | prefill s | decode tokens/s "
        "| / dense library | / dense kernels |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        start = f"| {row['model']} | {row['way']} | {row['batch']} | {row['context']:,} |"
        if "error" in row:
            print(start, row["error"], "|")
            continue
        others = [dense[way, row["batch"], row["context"]] for way in ("library", "kernels")]
        share = row["cache_gib"] / others[0]["formula_gib"]
        speed = row["decode_tokens_per_s"]
        ratios = []
        for other in others:
            ratios.append("" if "error" in other else f"{speed / other['decode_tokens_per_s']:.2f}")
        figures = (
            f"{row['cache_gib']:.3f} | {share:.3f} | {row['prefill_s']:.2f} "
            f"| {row['decode_tokens_per_s']:.0f}"
        )
        print(start, figures, "|", " | ".join(ratios), "|")


if __name__ == "__main__":
    main()
