"""Writes a Hugging Face folder: a stock Qwen3 where layers are of one kind, else one that ships its model file."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.data.tokenizer_folder import (
    GENERATION_CONFIG,
    check_vocabulary,
    copy_tokenizer,
    load_pretrained,
)
from megaconsa.errors import InputError
from megaconsa.files import check_new_folder, check_space, new_folder
from megaconsa.huggingface.config_file import TOKEN_IDS, check_generation_config
from megaconsa.huggingface.model_card import HEAT_MAP, model_card
from megaconsa.huggingface.names import name_difference, parameter_shapes, qwen3_config_fields
from megaconsa.model.config import ModelConfig
from megaconsa.tensor_files import write_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODEL_FILE = Path(__file__).with_name("modeling_megaconsa.py")


@torch.no_grad()
def export(
    weights: Mapping[str, Tensor],
    model: ModelConfig,
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
    """Writes `out`, a folder that transformers' Auto classes load; memory holds one weight at a time if `weights` reads them so.

    weights: canonical name -> unsharded fp32 tensor, heads in original order. `allocation`: in the same order; all-true is dense.
    tokenizer: folder with `tokenizer_config.json`, whose files are copied; None leaves the export without one.
    origin: where the weights came from (run, step, ...), shown in the model card.
    fingerprint: of the tokenizer that the weights were trained with, as far as known; another is
    refused.
    token_ids: bos_token_id and so on for config.json; the tokenizer's if not given.
    generation_config: the file to copy; the tokenizer folder's if not given, and where that has
    none, one of the token ids.
    max_shard_size: of a weight file, a number and KB, MB, GB or TB; a larger weight has a file of its own.
    heat_map: draws the allocation into the file it is given, for the model card. advance is told of bytes as they are written.
    The folder appears under its name only when it is complete. Raises InputError, with nothing written, where the weights, the
    allocation or the tokenizer do not fit the model, `out` exists and is not an empty folder, or the disk has no room for it; RunError,
    with nothing left behind, where writing fails.
    """
    check_new_folder(out)
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype} cannot be exported; use {', '.join(map(str, DTYPES))}")
    allocation.check_shape(model.num_hidden_layers, model.num_key_value_heads, "the allocation")
    if allocation.sparsity > 0 and allocation.window < 2:
        raise InputError(
            f"the allocation's window={allocation.window} cannot be exported: transformers' sliding cache needs 2 or more"
        )
    split = _split(model, dtype, max_shard_size)
    check_space(out, export_bytes(model, dtype))
    _check_weights(weights, model, dtype)
    special_tokens = _special_tokens(tokenizer, model, fingerprint) if tokenizer else {}
    if generation_config is None and tokenizer and (tokenizer / GENERATION_CONFIG).is_file():
        generation_config = tokenizer / GENERATION_CONFIG
    if generation_config is not None:
        check_generation_config(generation_config, model.vocab_size)

    def read(name: str) -> Tensor:
        tensor = weights[name]
        if not allocation.is_layer_wise and ".self_attn." in name and name.endswith("_proj.weight"):
            tensor = reorder_weight(
                name, tensor, model, allocation.full_heads_first(int(name.split(".")[2]))
            )
        return tensor.detach().to("cpu", dtype)

    with new_folder(out) as folder:
        if not allocation.is_layer_wise:
            shutil.copyfile(MODEL_FILE, folder / MODEL_FILE.name)
        # The padding token is left to the generation config: in the model's it would freeze its
        # embedding in fine-tuning.
        in_config = token_ids or {
            name: value for name, value in special_tokens.items() if name != "pad_token_id"
        }
        _write_json(folder / "config.json", _config(model, allocation, dtype, in_config))
        if tokenizer:
            copy_tokenizer(tokenizer, folder)
        if generation_config is not None:
            shutil.copyfile(generation_config, folder / GENERATION_CONFIG)
        else:
            generation = (token_ids or special_tokens) | {
                "transformers_version": transformers.__version__
            }
            _write_json(folder / GENERATION_CONFIG, generation)
        allocation.save(folder / "allocation.json")
        if heat_map is not None:
            heat_map(folder / HEAT_MAP)
        card = model_card(
            model,
            allocation,
            dtype,
            has_tokenizer=tokenizer is not None,
            has_heat_map=heat_map is not None,
            origin=origin,
        )
        (folder / "README.md").write_text(card)
        shapes = parameter_shapes(model)
        for filename, names in split.filename_to_tensors.items():
            write_tensors(
                folder / filename, {name: shapes[name] for name in names}, dtype, read, advance
            )
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(folder / "model.safetensors.index.json", index)


def export_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights in `dtype`."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values()) * dtype.itemsize


def reorder_weight(name: str, tensor: Tensor, model: ModelConfig, order: Sequence[int]) -> Tensor:
    """A projection of attention with its KV heads, or their query heads, in another order.

    order[i] is the present index of the KV head that comes to place i. Rows of q, k and v and columns of o are copied; where all four
    projections of a layer are reordered alike, the function of the model stays the same.
    """
    heads = 1 if ".k_proj." in name or ".v_proj." in name else model.queries_per_kv_head
    return tensor.index_select(
        1 if ".o_proj." in name else 0, _rows(order, model.head_dim * heads).to(tensor.device)
    )


def _rows(order: Sequence[int], size: int) -> Tensor:
    """Row indices of blocks of `size` rows in the given order of blocks."""
    return (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten()


def _check_weights(weights: Mapping[str, Tensor], model: ModelConfig, dtype: torch.dtype) -> None:
    """Raises InputError unless the weights are those of the model, finite, and within the range of `dtype`."""
    shapes = parameter_shapes(model)
    if difference := name_difference(weights.keys(), model):
        raise InputError(
            f"the weights {difference}; they do not belong to this model configuration"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}, but the model configuration asks for {shape}"
            )
        low, high = map(float, tensor.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{name} holds NaN or infinity; export an earlier checkpoint")
        if max(-low, high) > torch.finfo(dtype).max:
            raise InputError(
                f"{name} holds {max(-low, high):g}, which overflows {dtype}; export in torch.bfloat16"
            )


def _special_tokens(tokenizer: Path, model: ModelConfig, fingerprint: str | None) -> dict[str, int]:
    """Ids that generation needs, of those the tokenizer has: bos_token_id, eos_token_id,
    pad_token_id.

    InputError where the tokenizer does not fit the model or has another fingerprint than
    `fingerprint`.
    """
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise InputError(
            f"tokenizer={tokenizer} is not a tokenizer folder: it has no tokenizer_config.json"
        )
    loaded = load_pretrained(tokenizer)
    check_vocabulary(tokenizer, loaded, model.vocab_size)
    if fingerprint is not None:
        found = Tokenizer.load(tokenizer).fingerprint
        if not same_tokenizer(fingerprint, found):
            raise InputError(
                f"tokenizer={tokenizer} has fingerprint {found}, but the weights were trained with {fingerprint}; "
                "give the folder of that one with --tokenizer"
            )
    ids = {name: getattr(loaded, name) for name in TOKEN_IDS}
    return {name: value for name, value in ids.items() if value is not None}


def _config(
    model: ModelConfig,
    allocation: Allocation,
    dtype: torch.dtype,
    token_ids: dict[str, Any],
) -> dict[str, Any]:
    fields = qwen3_config_fields(model)
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
            fields |= {
                "layer_types": [
                    "full_attention" if full else "sliding_attention" for full in full_layers
                ],
                # Ignored beside layer_types; an engine that knows only this field must see that not all layers are full.
                "max_window_layers": full_layers.index(False),
            }
    fields |= token_ids
    return fields | {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }


def _split(model: ModelConfig, dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
    """Which weight goes into which file."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise InputError(f"max_shard_size={max_shard_size} is not a size; write it as 5GB or 500MB")
    sizes = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, shape in parameter_shapes(model).items()
    }
    return split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
