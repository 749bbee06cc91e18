"""Reads a Qwen3 folder in transformers' format. Everything is checked before a weight is read."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.data.tokenizer_folder import GENERATION_CONFIG
from megaconsa.errors import InputError
from megaconsa.files import is_bare_name
from megaconsa.huggingface.config_file import (
    HEAD_WISE,
    check_generation_config,
    check_token_ids,
    read_allocation,
    read_json,
    read_model_config,
)
from megaconsa.huggingface.export import reorder_weight
from megaconsa.huggingface.parameter_names import name_difference, parameter_shapes
from megaconsa.model.config import ModelConfig
from megaconsa.tensor_files import DTYPES, TensorFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """A checked folder."""

    path: Path
    model_config: ModelConfig
    dtype: torch.dtype
    allocation: Allocation | None
    """The table of windows, in original head order. It is set if some heads have windows, and for
    every folder that export-hf made.
    """
    model_type: str
    """`qwen3`, or HEAD_WISE for a head-wise export, whose weights hold the full heads first."""
    token_ids: dict[str, Any]
    """bos_token_id, eos_token_id and pad_token_id, as far as config.json has them."""
    has_tokenizer: bool
    _files: TensorFiles

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every weight, in the model's order.

        A tied output layer is left out.
        """
        return parameter_shapes(self.model_config)

    @property
    def bytes(self) -> int:
        """Bytes of all weights in the folder's precision."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def read(self, name: str) -> Tensor:
        """Reads a weight in the folder's precision, with its heads in original order.

        Raises InputError if the weight is not finite.
        """
        tensor = self._files[name]
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"{self.path}: {name} holds NaN or infinity")
        if self.model_type == HEAD_WISE and ".self_attn." in name and name.endswith("_proj.weight"):
            assert self.allocation is not None
            layer = int(name.split(".")[2])
            order = self.allocation.full_heads_first(layer)
            # The inverse permutation: the place in the file of each original head.
            back = sorted(range(len(order)), key=order.__getitem__)
            tensor = reorder_weight(name, tensor, self.model_config, back)
        return tensor


def open_source(path: Path) -> Source:
    """Reads a folder's configuration and the headers of its weight files.

    Raises InputError, which names what cannot be imported.
    """
    config = read_json(path, "config.json")
    model_config = read_model_config(path, config)
    allocation = read_allocation(path, config, model_config)
    if (path / GENERATION_CONFIG).is_file():
        check_generation_config(path / GENERATION_CONFIG, model_config.vocab_size)
    token_ids = check_token_ids(f"{path / 'config.json'}", config, model_config.vocab_size)
    files = _files(path)
    dtype = _check_tensors(path, model_config, files)
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return Source(
        path, model_config, dtype, allocation, config["model_type"], token_ids, has_tokenizer, files
    )


def add_generation_config(source: Source, folder: Path) -> None:
    """Copies generation_config.json to `folder`.

    Without such a file, transformers takes the ids in config.json, so these are written instead.
    """
    if (source.path / GENERATION_CONFIG).is_file():
        shutil.copyfile(source.path / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    elif source.token_ids:
        (folder / GENERATION_CONFIG).write_text(json.dumps(source.token_ids, indent=2) + "\n")


def _files(path: Path) -> TensorFiles:
    """Opens the weight files. Raises InputError if they are incomplete or contradict the index."""
    index = _index(path)
    names = [WEIGHTS] if index is None else sorted(set(index.values()))
    if names != [WEIGHTS] and (path / WEIGHTS).is_file():
        # transformers would read the single file, but other loaders the files of the index.
        raise InputError(
            f"{path}: it has weights twice, {WEIGHTS} and the files of {INDEX}; "
            "remove those that are not the model's"
        )
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"{path}: weights {name} are missing; only safetensors are read")
    places: dict[str, str] = {}
    try:
        for name in names:
            with safe_open(path / name, "pt") as file:
                for tensor in file.keys():  # noqa: SIM118
                    if tensor in places:
                        raise InputError(
                            f"{path}: {tensor} is both in {places[tensor]} and in {name}; "
                            "remove one of the two"
                        )
                    places[tensor] = name
        files = TensorFiles([path / name for name in names])
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: weights cannot be read ({error}); a file is damaged or incomplete"
        ) from None
    for tensor, name in (index or {}).items():
        if places.get(tensor) != name:
            raise InputError(
                f"{path}: {INDEX} says that {tensor} is in {name}, but it is not; "
                "a file is of another model"
            )
    return files


def _index(path: Path) -> dict[str, str] | None:
    """Reads the index of weights in several files: weight -> file. None if there is no index."""
    if not (path / INDEX).is_file():
        return None
    index = read_json(path, INDEX).get("weight_map")
    if (
        not isinstance(index, dict)
        or not index
        or not all(is_bare_name(name) for name in index.values())
    ):
        raise InputError(f"{path / INDEX} has no weight_map from weights to files of its folder")
    return index


def _check_tensors(path: Path, model_config: ModelConfig, files: TensorFiles) -> torch.dtype:
    """Checks names, shapes and dtypes of the weights. Returns the dtype that they share.

    Raises InputError if they do not belong to the model.
    """
    shapes = parameter_shapes(model_config)
    names = set(files)
    if model_config.tie_word_embeddings and HEAD in names and EMBEDDING in names:
        # Some folders store the tied output layer a second time.
        same_shape = files.shape(HEAD) == files.shape(EMBEDDING)
        if not same_shape or not torch.equal(files[HEAD], files[EMBEDDING]):
            raise InputError(
                f"{path}: tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}"
            )
        names.remove(HEAD)
    if difference := name_difference(names, model_config):
        raise InputError(f"{path}: the weights {difference}; they do not belong to config.json")
    for name, expected in shapes.items():
        if files.shape(name) != expected:
            raise InputError(
                f"{path}: {name} has shape {files.shape(name)}, but config.json asks for {expected}"
            )
    found = sorted({files.dtype(name) for name in shapes})
    if len(found) > 1 or found[0] not in DTYPES:
        raise InputError(
            f"{path}: weights are {' and '.join(found)}; all must be one of {', '.join(DTYPES)}"
        )
    return DTYPES[found[0]]
