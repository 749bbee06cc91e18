"""Writes a Hugging Face folder.

The folder holds a stock Qwen3 if the heads of each layer are of one kind. Otherwise it ships
megaconsa's model file.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.data.tokenizer import load_trained_tokenizer
from megaconsa.data.tokenizer_folder import (
    GENERATION_CONFIG,
    copy_tokenizer,
    declare_model_inputs,
)
from megaconsa.errors import InputError
from megaconsa.files import check_new_folder, check_space, new_folder
from megaconsa.huggingface.config_file import TOKEN_IDS, check_generation_config
from megaconsa.huggingface.model_card import HEAT_MAP, model_card
from megaconsa.huggingface.parameter_names import (
    name_difference,
    parameter_shapes,
    qwen3_config_fields,
)
from megaconsa.model.config import ModelConfig
from megaconsa.tensor_files import write_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODEL_FILE = Path(__file__).with_name("modeling_megaconsa.py")
TRANSFORMERS_VERSION = "4.57.0"
"""The release in whose format configurations are written, whatever release is installed.

Where a configuration says 4.57.3 or later, transformers 4.57 warns that the tokenizer splits text
by a wrong regex, although that is a fault of Mistral's tokenizers only.
"""


@torch.no_grad()
def export(
    weights: Mapping[str, Tensor],
    model_config: ModelConfig,
    allocation: Allocation,
    out: Path,
    *,
    tokenizer: Path | None,
    dtype: torch.dtype,
    origin: dict[str, Any] | None,
    fingerprint: str | None = None,
    token_ids: dict[str, Any] | None = None,
    generation_config: Path | None = None,
    max_shard_size: str = "5GB",
    heat_map: Callable[[Path], None] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `out`, a folder that transformers' Auto classes load.

    Memory holds one weight at a time if `weights` reads them one by one. The folder appears under
    its name only when it is complete.

    weights: canonical name -> unsharded fp32 tensor, heads in original order.
    allocation: in the same head order. An all-true table is a dense model.
    tokenizer: folder with `tokenizer_config.json`, whose files are copied. None exports none.
    origin: where the weights came from (run, step, ...), shown in the model card.
    fingerprint: of the tokenizer that the weights were trained with, if known. A tokenizer with
        another fingerprint is refused.
    token_ids: bos_token_id and so on for config.json. The default is the tokenizer's ids.
    generation_config: the file to copy. The default is the tokenizer folder's, or, if it has none,
        a new one with the token ids.
    max_shard_size: largest size of a weight file, as a number with KB, MB, GB or TB. A weight that
        is larger gets a file to itself.
    heat_map: draws the allocation into the given file, for the model card.
    advance: is called with the number of bytes as they are written.

    Raises InputError, with nothing written, if the weights, the allocation or the tokenizer do not
    fit the model, if `out` exists and is not an empty folder, or if the disk has no room for it.
    Raises RunError, with nothing left behind, if writing fails.
    """
    check_new_folder(out)
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype} cannot be exported; use {', '.join(map(str, DTYPES))}")
    allocation.check_shape(
        model_config.num_hidden_layers, model_config.num_key_value_heads, "the allocation"
    )
    if allocation.sparsity > 0 and allocation.window < 2:
        raise InputError(
            f"the allocation's window={allocation.window} cannot be exported: "
            "transformers' sliding cache needs 2 or more"
        )
    split = _split(model_config, dtype, max_shard_size)
    check_space(out, export_bytes(model_config, dtype))
    _check_weights(weights, model_config, dtype)
    special_tokens = _special_tokens(tokenizer, model_config, fingerprint) if tokenizer else {}
    if generation_config is None and tokenizer and (tokenizer / GENERATION_CONFIG).is_file():
        generation_config = tokenizer / GENERATION_CONFIG
    if generation_config is not None:
        check_generation_config(generation_config, model_config.vocab_size)

    def read(name: str) -> Tensor:
        return exported_weight(name, weights, model_config, allocation, dtype)

    with new_folder(out) as folder:
        if not allocation.is_layer_wise:
            shutil.copyfile(MODEL_FILE, folder / MODEL_FILE.name)
        # Only the generation config gets the tokenizer's padding token. With it in config.json,
        # fine-tuning would not train that token's embedding.
        without_padding = special_tokens.copy()
        without_padding.pop("pad_token_id", None)
        config = exported_config(model_config, allocation, dtype, token_ids or without_padding)
        _write_json(folder / "config.json", config)
        if tokenizer:
            copy_tokenizer(tokenizer, folder)
            declare_model_inputs(folder)
        if generation_config is not None:
            shutil.copyfile(generation_config, folder / GENERATION_CONFIG)
        else:
            written_for = {"transformers_version": TRANSFORMERS_VERSION}
            generation = (token_ids or special_tokens) | written_for
            _write_json(folder / GENERATION_CONFIG, generation)
        allocation.save(folder / "allocation.json")
        if heat_map is not None:
            heat_map(folder / HEAT_MAP)
        card = model_card(
            model_config,
            allocation,
            dtype,
            has_tokenizer=tokenizer is not None,
            has_heat_map=heat_map is not None,
            origin=origin,
        )
        (folder / "README.md").write_text(card)
        shapes = parameter_shapes(model_config)
        for filename, names in split.filename_to_tensors.items():
            in_file = {name: shapes[name] for name in names}
            write_tensors(folder / filename, in_file, dtype, read, advance)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(folder / "model.safetensors.index.json", index)


def export_bytes(model_config: ModelConfig, dtype: torch.dtype) -> int:
    """Returns the bytes of all weights in `dtype`."""
    return (
        sum(math.prod(shape) for shape in parameter_shapes(model_config).values()) * dtype.itemsize
    )


def reorder_weight(
    name: str, tensor: Tensor, model_config: ModelConfig, order: Sequence[int]
) -> Tensor:
    """Copies an attention projection with its KV heads, or their query heads, in another order.

    order: order[i] is the present index of the KV head that moves to place i.

    Rows of q, k and v and columns of o are reordered. The model computes the same if all four
    projections of a layer are reordered alike.
    """
    heads = 1 if ".k_proj." in name or ".v_proj." in name else model_config.queries_per_kv_head
    dim = 1 if ".o_proj." in name else 0
    rows = _rows(order, model_config.head_dim * heads).to(tensor.device)
    return tensor.index_select(dim, rows)


def _rows(order: Sequence[int], size: int) -> Tensor:
    """Returns the row indices of blocks of `size` rows, with the blocks in the given order."""
    return (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten()


def _check_weights(
    weights: Mapping[str, Tensor], model_config: ModelConfig, dtype: torch.dtype
) -> None:
    """Raises InputError unless the weights belong to the model, are finite and fit into `dtype`."""
    shapes = parameter_shapes(model_config)
    if difference := name_difference(weights.keys(), model_config):
        raise InputError(
            f"the weights {difference}; they do not belong to this model configuration"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}, "
                f"but the model configuration asks for {shape}"
            )
        low, high = map(float, tensor.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{name} holds NaN or infinity; export an earlier checkpoint")
        if max(-low, high) > torch.finfo(dtype).max:
            raise InputError(
                f"{name} holds {max(-low, high):g}, which overflows {dtype}; "
                "export in torch.bfloat16"
            )


def _special_tokens(
    tokenizer: Path, model_config: ModelConfig, fingerprint: str | None
) -> dict[str, int]:
    """Returns the ids that generation needs: bos_token_id, eos_token_id and pad_token_id.

    Ids that the tokenizer lacks are left out. Raises InputError if the tokenizer does not fit the
    model, or if its fingerprint differs from `fingerprint`.
    """
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise InputError(
            f"tokenizer={tokenizer} is not a tokenizer folder: it has no tokenizer_config.json"
        )
    loaded = load_trained_tokenizer(tokenizer, model_config.vocab_size, fingerprint)
    ids = {name: getattr(loaded, name) for name in TOKEN_IDS}
    return {name: value for name, value in ids.items() if value is not None}


def exported_weight(
    name: str,
    weights: Mapping[str, Tensor],
    model_config: ModelConfig,
    allocation: Allocation,
    dtype: torch.dtype,
) -> Tensor:
    """Returns a weight as an export holds it: on the CPU, with its heads in the export's order."""
    tensor = weights[name]
    is_projection = ".self_attn." in name and name.endswith("_proj.weight")
    if is_projection and not allocation.is_layer_wise:
        layer = int(name.split(".")[2])
        tensor = reorder_weight(name, tensor, model_config, allocation.full_heads_first(layer))
    return tensor.detach().to("cpu", dtype)


def exported_config(
    model_config: ModelConfig,
    allocation: Allocation,
    dtype: torch.dtype,
    token_ids: dict[str, Any],
) -> dict[str, Any]:
    """Returns the content of config.json."""
    fields = qwen3_config_fields(model_config)
    if allocation.sparsity > 0:
        fields |= {"use_sliding_window": True, "sliding_window": allocation.window}
    if not allocation.is_layer_wise:
        fields |= {
            "model_type": "megaconsa",
            "architectures": ["MegaconsaForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{MODEL_FILE.stem}.MegaconsaConfig",
                "AutoModel": f"{MODEL_FILE.stem}.MegaconsaModel",
                "AutoModelForCausalLM": f"{MODEL_FILE.stem}.MegaconsaForCausalLM",
            },
            "num_full_kv_heads": [sum(row) for row in allocation.full],
            "full_attention": [list(row) for row in allocation.full],
        }
    else:
        fields |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
        if allocation.sparsity > 0:
            full_layers = [row[0] for row in allocation.full]
            fields["layer_types"] = [
                "full_attention" if full else "sliding_attention" for full in full_layers
            ]
            # transformers ignores this field beside layer_types. An engine that knows only this
            # field must see that not all layers are full.
            fields["max_window_layers"] = full_layers.index(False)
    fields |= token_ids
    return fields | {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": TRANSFORMERS_VERSION,
    }


def _split(model_config: ModelConfig, dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
    """Decides which weight goes into which file. Raises InputError for a malformed size."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise InputError(f"max_shard_size={max_shard_size} is not a size; write it as 5GB or 500MB")
    sizes = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, shape in parameter_shapes(model_config).items()
    }
    return split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
