"""Reading a Qwen3 folder of transformers' format: everything is checked before a weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.files import is_bare_name, parse_json
from megaconsa.huggingface.export import reorder_weight
from megaconsa.huggingface.modeling_megaconsa import MegaconsaConfig
from megaconsa.huggingface.names import name_difference, parameter_shapes
from megaconsa.model.config import ModelConfig
from megaconsa.tensor_files import DTYPES, TensorFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEAD_WISE = MegaconsaConfig.model_type
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
NUMBERS = ("rope_theta", "rms_norm_eps", "initializer_range")


@dataclass(frozen=True)
class Source:
    """A checked folder."""

    path: Path
    shape: ModelConfig
    dtype: torch.dtype
    allocation: Allocation | None
    """Of a folder that export-hf made: the table, in the model's original head order."""
    model_type: str
    """Of a head-wise export, in which full heads stand first, another than Qwen3's."""
    has_tokenizer: bool
    _files: TensorFiles

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every weight, in the model's order; a tied output layer is none."""
        return parameter_shapes(self.shape)

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def read(self, name: str) -> Tensor:
        """A weight in the folder's precision, heads in original order; InputError where it is not finite."""
        tensor = self._files[name]
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"{self.path}: {name} holds NaN or infinity")
        if self.model_type == HEAD_WISE and ".self_attn." in name and name.endswith("_proj.weight"):
            assert self.allocation is not None
            order = self.allocation.full_heads_first(int(name.split(".")[2]))
            back = sorted(range(len(order)), key=order.__getitem__)
            tensor = reorder_weight(name, tensor, self.shape, back)
        return tensor


def open_source(path: Path) -> Source:
    """Reads a folder's configuration and the headers of its files; InputError names what cannot be imported."""
    config = _json(path, "config.json")
    shape = _shape(path, config)
    allocation = _allocation(path, config, shape)
    files = _files(path)
    dtype = _check_tensors(path, shape, files)
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return Source(path, shape, dtype, allocation, config["model_type"], has_tokenizer, files)


def _shape(path: Path, config: dict[str, Any]) -> ModelConfig:
    kind = config.get("model_type")
    if kind not in ("qwen3", HEAD_WISE):
        raise InputError(f"{path} holds a model of type {kind}; only dense Qwen3 (model_type qwen3) can be imported")
    # transformers 5 writes the rotary fields into one mapping.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unsupported: dict[str, bool] = {
        "rope_scaling": not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": bool(config.get("attention_bias")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config") is not None,
    }
    for field, refused in unsupported.items():
        if refused:
            value = json.dumps(rope if field == "rope_scaling" else config[field])
            raise InputError(f"{path}: {field}={value} in config.json is not supported; only Qwen3 without it can be imported")
    # Qwen3Config's own defaults, for folders that leave them out.
    rest = {
        "head_dim": config.get("head_dim", 128),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "rope_theta": config.get("rope_theta", rope.get("rope_theta", 10_000.0)),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "initializer_range": config.get("initializer_range", 0.02),
        "max_position_embeddings": config.get("max_position_embeddings", 32_768),
    }
    try:
        fields = {**{name: config[name] for name in SIZES if name not in rest}, **rest}
    except KeyError as error:
        raise InputError(f"{path}: config.json lacks {error.args[0]}") from None
    for name in SIZES:
        if type(fields[name]) is not int or fields[name] < 1:
            raise InputError(f"{path}: {name}={fields[name]!r} in config.json is not a positive integer")
    for name in NUMBERS:
        if type(fields[name]) not in (int, float) or not 0 < fields[name] < math.inf:
            raise InputError(f"{path}: {name}={fields[name]!r} in config.json is not a positive number")
        fields[name] = float(fields[name])
    if type(fields["tie_word_embeddings"]) is not bool:
        raise InputError(f"{path}: tie_word_embeddings={fields['tie_word_embeddings']!r} in config.json is not true or false")
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise InputError(
            f"{path}: num_attention_heads={fields['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads={fields['num_key_value_heads']}"
        )
    return ModelConfig(**fields)


def _allocation(path: Path, config: dict[str, Any], shape: ModelConfig) -> Allocation | None:
    """The table of an export of megaconsa's, which config.json must agree with; other kinds of windows are refused."""
    types = config.get("layer_types") or []
    if not isinstance(types, list):
        raise InputError(f"{path}: layer_types={types!r} in config.json is not a list")
    windowed = bool(config.get("use_sliding_window")) or "sliding_attention" in types
    file = path / "allocation.json"
    if not file.exists():
        if windowed or config["model_type"] == HEAD_WISE:
            raise InputError(
                f"{path}: use_sliding_window in config.json without an allocation.json; windows are imported from export-hf's folders only"
            )
        return None
    allocation = Allocation.load(file)
    allocation.check_shape(shape.num_hidden_layers, shape.num_key_value_heads, str(file))
    if config["model_type"] == HEAD_WISE:
        agrees = config.get("full_attention") == [list(row) for row in allocation.full]
    else:
        kinds = ["full_attention" if row[0] else "sliding_attention" for row in allocation.full]
        agrees = allocation.is_layer_wise and (types or ["full_attention"] * shape.num_hidden_layers) == kinds
    if not agrees or (allocation.sparsity > 0 and config.get("sliding_window") != allocation.window):
        raise InputError(f"{path}: allocation.json and config.json disagree about windows; export the model again")
    return allocation


def _files(path: Path) -> TensorFiles:
    if (path / INDEX).is_file():
        index = _json(path, INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(is_bare_name(name) for name in index.values()):
            raise InputError(f"{path / INDEX} has no weight_map from weights to files of its folder")
        names = sorted(set(index.values()))
    else:
        names = [WEIGHTS]
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"{path}: weights {name} are missing; only safetensors are read")
    try:
        return TensorFiles([path / name for name in names])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: weights cannot be read ({error}); a file is damaged or incomplete") from None


def _check_tensors(path: Path, shape: ModelConfig, files: TensorFiles) -> torch.dtype:
    """Refuses weights that are not the model's; returns their precision."""
    shapes = parameter_shapes(shape)
    names = set(files)
    if shape.tie_word_embeddings and HEAD in names and EMBEDDING in names:
        # Some folders store the tied output layer a second time.
        if files.shape(HEAD) != files.shape(EMBEDDING) or not torch.equal(files[HEAD], files[EMBEDDING]):
            raise InputError(f"{path}: tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}")
        names.remove(HEAD)
    if difference := name_difference(names, shape):
        raise InputError(f"{path}: the weights {difference}; they do not belong to config.json")
    for name, expected in shapes.items():
        if files.shape(name) != expected:
            raise InputError(f"{path}: {name} has shape {files.shape(name)}, but config.json asks for {expected}")
    found = sorted({files.dtype(name) for name in shapes})
    if len(found) > 1 or found[0] not in DTYPES:
        raise InputError(f"{path}: weights are {' and '.join(found)}; all must be one of {', '.join(DTYPES)}")
    return DTYPES[found[0]]


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = parse_json((path / name).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a model folder: {name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a model folder: {name} is not a mapping")
    return content
