"""Reads the config.json of a Qwen3 folder: shape, windows and token ids.

Everything is checked before a weight is read. A field that changes what the model computes is
either understood or refused. Two fields that contradict each other are refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from megaconsa.consa.allocation import FORMAT_VERSION, Allocation
from megaconsa.errors import InputError
from megaconsa.files import parse_json
from megaconsa.huggingface.modeling_megaconsa import FULL, SLIDING, MegaconsaConfig, rope_parameters
from megaconsa.model.config import ModelConfig

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
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Reads a JSON file of the folder `path`.

    Raises InputError if the file cannot be read or is not a mapping.
    """
    try:
        content = parse_json((path / name).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a model folder: {name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a model folder: {name} is not a mapping")
    return content


def read_model_config(path: Path, config: dict[str, Any]) -> ModelConfig:
    """Reads the model's shape.

    Raises InputError unless the model is a dense Qwen3 or an export of one.
    """
    kind = config.get("model_type")
    if kind not in ("qwen3", HEAD_WISE):
        raise InputError(
            f"{path} holds a model of type {kind}; "
            "only dense Qwen3 (model_type qwen3) can be imported"
        )
    # The folder's code may compute anything. In a head-wise export, it is megaconsa's own.
    own_code = config.get("auto_map")
    has_own_model = isinstance(own_code, dict) and "AutoModelForCausalLM" in own_code
    unsupported: dict[str, bool] = {
        "attention_bias": bool(config.get("attention_bias")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config") is not None,
        "is_causal": config.get("is_causal", True) is not True,
        "partial_rotary_factor": config.get("partial_rotary_factor") not in (None, 1),
        "auto_map": kind == "qwen3" and has_own_model,
    }
    for field, refused in unsupported.items():
        if refused:
            raise _unsupported(path, config, field)
    # A folder may leave these out. The defaults are Qwen3Config's own.
    rest = {
        "head_dim": config.get("head_dim", 128),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "rope_theta": _rope_theta(path, config),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "initializer_range": config.get("initializer_range", 0.02),
        "max_position_embeddings": config.get("max_position_embeddings", 32_768),
    }
    try:
        required = {name: config[name] for name in SIZES if name not in rest}
    except KeyError as error:
        raise InputError(f"{path}: config.json lacks {error.args[0]}") from None
    fields = {**required, **rest}
    for name in SIZES:
        if type(fields[name]) is not int or fields[name] < 1:
            raise InputError(
                f"{path}: {name}={fields[name]!r} in config.json is not a positive integer"
            )
    for name in NUMBERS:
        if type(fields[name]) not in (int, float) or not 0 < fields[name] < math.inf:
            raise InputError(
                f"{path}: {name}={fields[name]!r} in config.json is not a positive number"
            )
        fields[name] = float(fields[name])
    if type(fields["tie_word_embeddings"]) is not bool:
        raise InputError(
            f"{path}: tie_word_embeddings={fields['tie_word_embeddings']!r} in config.json "
            "is not true or false"
        )
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise InputError(
            f"{path}: num_attention_heads={fields['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads={fields['num_key_value_heads']}"
        )
    return ModelConfig(**fields)


def _rope_theta(path: Path, config: dict[str, Any]) -> float:
    """Reads the base of the plain rotary embedding, in any spelling.

    Raises InputError for every other kind of embedding.
    """
    try:
        parameters = rope_parameters(config)
    except ValueError as error:
        raise InputError(f"{path}: in config.json, {error}") from None
    plain = {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    if parameters not in (plain, plain | {"partial_rotary_factor": 1}):
        field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        raise _unsupported(path, config, field)
    theta: float = parameters["rope_theta"]
    return theta


def _unsupported(path: Path, config: dict[str, Any], field: str) -> InputError:
    value = json.dumps(config[field])
    return InputError(
        f"{path}: {field}={value} in config.json is not supported; "
        "only Qwen3 without it can be imported"
    )


def read_allocation(
    path: Path, config: dict[str, Any], model_config: ModelConfig
) -> Allocation | None:
    """Reads the table of windows, in the model's original head order.

    export-hf writes the table to allocation.json and config.json. A model that transformers saved
    again has only config.json.

    Returns None if every layer has full attention. Raises InputError if the two files disagree or
    if config.json contradicts itself.
    """
    table = _table(path, config, model_config)
    file = path / "allocation.json"
    if not file.exists():
        return table
    allocation = Allocation.load(file)
    allocation.check_shape(
        model_config.num_hidden_layers, model_config.num_key_value_heads, str(file)
    )
    if table is None:
        full = ((True,) * model_config.num_key_value_heads,) * model_config.num_hidden_layers
    else:
        full = table.full
    other_window = allocation.sparsity > 0 and config.get("sliding_window") != allocation.window
    if allocation.full != full or other_window:
        raise InputError(
            f"{path}: allocation.json and config.json disagree about windows; "
            "export the model again"
        )
    return allocation


def _table(path: Path, config: dict[str, Any], model_config: ModelConfig) -> Allocation | None:
    """Reads the table from config.json. Returns None if every layer of a plain Qwen3 is full."""
    layers = model_config.num_hidden_layers
    heads = model_config.num_key_value_heads
    types = config.get("layer_types")
    if types is None:
        types = [FULL] * layers
    if not isinstance(types, list):
        raise InputError(f"{path}: layer_types={types!r} in config.json is not a list")
    if len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise InputError(
            f"{path}: layer_types={types!r} in config.json must be {FULL} or {SLIDING} "
            f"for each of {layers} layers"
        )
    if config["model_type"] == HEAD_WISE:
        full = config.get("full_attention")
        counts = config.get("num_full_kv_heads")
        table = _checked(path, "full_attention", full, config, model_config, "kv_head")
        unused = table.sparsity > 0 and not config.get("use_sliding_window", True)
        if unused or SLIDING in types or counts != [sum(row) for row in table.full]:
            raise InputError(
                f"{path}: num_full_kv_heads={counts!r}, full_attention, layer_types and "
                "use_sliding_window in config.json disagree about windows; export the model again"
            )
        return table
    windowed = bool(config.get("use_sliding_window"))
    if windowed != (SLIDING in types):
        raise InputError(
            f"{path}: use_sliding_window={json.dumps(config.get('use_sliding_window'))} and "
            "layer_types in config.json disagree about windows; "
            f"windowed layers need both use_sliding_window=true and {SLIDING} in layer_types"
        )
    if not windowed:
        return None
    full = [[kind == FULL] * heads for kind in types]
    return _checked(path, "layer_types", full, config, model_config, "layer")


def _checked(
    path: Path,
    field: str,
    full: Any,
    config: dict[str, Any],
    model_config: ModelConfig,
    granularity: str,
) -> Allocation:
    """Builds the table from `full`, the content of `field`, and checks it against the shape."""
    window = config.get("sliding_window")
    all_full = isinstance(full, list) and all(isinstance(row, list) and all(row) for row in full)
    if all_full and window is None:
        # Any window will do, because no head uses it.
        window = model_config.max_position_embeddings
    data = {
        "version": FORMAT_VERSION,
        "num_layers": model_config.num_hidden_layers,
        "num_kv_heads": model_config.num_key_value_heads,
        "window": window,
        "granularity": granularity,
        "scope": "per_layer",
        "target_sparsity": 0.0,
        "full": full,
        "origin": {"config.json": field},
    }
    return Allocation.from_json(data, f"{path}: {field} and sliding_window in config.json")


def check_token_ids(where: str, fields: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Returns the ids of the special tokens in `fields`, unchanged.

    An id is a number. `eos_token_id` may be a list, because several tokens may end a text.

    Raises InputError for an id outside the vocabulary. The message begins with `where`.
    """
    found = {name: fields[name] for name in TOKEN_IDS if fields.get(name) is not None}
    for name, value in found.items():
        is_list = name == "eos_token_id" and isinstance(value, list) and len(value) > 0
        ids = value if is_list else [value]
        if any(type(each) is not int or not 0 <= each < vocab_size for each in ids):
            raise InputError(
                f"{where}: {name}={json.dumps(value)} is no token of a vocabulary of {vocab_size}; "
                "correct it"
            )
    return found


def check_generation_config(file: Path, vocab_size: int) -> None:
    """Raises InputError if transformers cannot load the generation config, or if the config names
    tokens that the model does not have.
    """
    check_token_ids(str(file), read_json(file.parent, file.name), vocab_size)
    try:
        GenerationConfig.from_pretrained(file.parent, file.name, local_files_only=True)
    except Exception as error:  # transformers does not specify what a broken file raises
        raise InputError(f"{file} cannot be loaded: {' '.join(str(error).split())}") from error
