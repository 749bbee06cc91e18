"""Opens a run, a checkpoint or an export as a model that continues texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.checkpoint.gates import read_gates
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.rules import dense
from megaconsa.data.tokenizer import load_trained_tokenizer
from megaconsa.data.tokenizer_folder import GENERATION_CONFIG, check_vocabulary, load_pretrained
from megaconsa.errors import InputError
from megaconsa.huggingface.decoding import use_kernels
from megaconsa.huggingface.in_memory import build_model
from megaconsa.huggingface.load import load_exported
from megaconsa.huggingface.source import open_source


@dataclass(frozen=True)
class TextModel:
    """A model, its tokenizer, and the ids that end a text."""

    model: Any
    """A model of transformers that runs by megaconsa's kernels, on its device."""
    tokenizer: Any
    end_ids: list[int]
    description: str
    """Where it comes from, for people."""

    @property
    def max_positions(self) -> int:
        positions: int = self.model.config.max_position_embeddings
        return positions


def open_text_model(
    path: Path, tokenizer: Path | None, device: torch.device, dtype: torch.dtype
) -> TextModel:
    """Loads a run (its newest checkpoint), a checkpoint, an import or an export.

    A run that learns uses the table that its gates would give now, as in its validation.

    tokenizer: the folder to use instead of the model's own.

    Raises InputError if the folder is none of these, or if it has no tokenizer that fits.
    """
    if _is_export(path):
        source = open_source(path)
        model, own = load_exported(path, dtype)
        words = load_pretrained(tokenizer) if tokenizer else own
        if words is None:
            raise _without_tokenizer(path)
        check_vocabulary(tokenizer or path, words, source.model_config.vocab_size)
        folders = [path]
        description = f"{path}"
    else:
        checkpoint = store.resolve(path)
        folder = tokenizer or checkpoint.tokenizer
        if folder is None or not folder.is_dir():
            raise _without_tokenizer(path if folder is None else folder)
        trained = checkpoint.state["data"]["tokenizer_fingerprint"]
        words = load_trained_tokenizer(folder, checkpoint.model_config.vocab_size, trained)
        with checkpoint.in_use():
            table, origin = _allocation(checkpoint)
            model = build_model(checkpoint.weights(), checkpoint.model_config, table, dtype)
        folders = [folder, checkpoint.path]
        description = f"{checkpoint.path}{origin}"
    name = str(dtype).removeprefix("torch.")
    return TextModel(
        use_kernels(model.to(device)),
        words,
        _end_ids(folders, words),
        f"{description}, {name} on {device.type}",
    )


def _is_export(path: Path) -> bool:
    """Whether the folder is a model of transformers. A run may hold one in a folder of its own."""
    is_ours = (path / run_folder.CONFIG).is_file() or (path / "state.json").is_file()
    return (path / "config.json").is_file() and not is_ours


def _without_tokenizer(path: Path) -> InputError:
    return InputError(f"{path}: no tokenizer is there; give its folder with --tokenizer")


def _allocation(checkpoint: Checkpoint) -> tuple[Allocation, str]:
    """The checkpoint's table, and a remark on where it comes from."""
    table = checkpoint.allocation
    if table is not None:
        return table, ""
    model_config = checkpoint.model_config
    if checkpoint.imported:
        layers = model_config.num_hidden_layers
        heads = model_config.num_key_value_heads
        return dense(layers, heads, model_config.max_position_embeddings), ""
    return read_gates(checkpoint).allocation(), ", with the allocation that its gates give now"


def _end_ids(folders: Iterable[Path], tokenizer: Any) -> list[int]:
    """The ids that end a text: the tokenizer's, and those of the first generation config."""
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for folder in folders:
        file = folder / GENERATION_CONFIG
        if file.is_file():
            ids = json.loads(file.read_text()).get("eos_token_id")
            found |= set(ids) if isinstance(ids, list) else {ids}
            break
    return sorted(found - {None})
