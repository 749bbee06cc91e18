"""The models to evaluate: labelled export folders, all checked before any of them is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError
from megaconsa.evaluation.named_models import named_models
from megaconsa.huggingface.load import load_exported, register
from megaconsa.huggingface.source import Source, open_source

IDENTIFYING = ("config.json", "tokenizer.json", "modeling_megaconsa.py")
"""Files that a digest reads whole. Weights are large, so it takes only their sizes and times."""


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    label: str
    folder: Path
    source: Source
    digest: str

    @property
    def max_positions(self) -> int:
        return self.source.model_config.max_position_embeddings

    @property
    def window(self) -> int | None:
        """Window of the sliding heads, in tokens. None if there are none."""
        table = self.source.allocation
        if table is None or table.sparsity == 0:
            return None
        return table.window

    @property
    def sparsity(self) -> float:
        """Fraction of KV heads with a sliding window."""
        table = self.source.allocation
        return 0.0 if table is None else table.sparsity

    def load(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """Loads the model to the device, and the tokenizer, or None if the folder has none."""
        model, tokenizer = load_exported(self.folder, dtype)
        return model.to(device), tokenizer


def open_models(named: Sequence[str], data: Path, info: DatasetInfo) -> list[Candidate]:
    """Opens the models of an evaluation.

    named: `LABEL=FOLDER`, or `FOLDER`, whose name is then the label.
    data: the folder of held-out data. info: its description.

    Raises InputError if a folder is not an export, two models have the same label, or a model
    cannot read the data's tokens.
    """
    # Otherwise the tokenizer of a head-wise export would ask whether to trust its code.
    register()
    candidates = []
    for label, folder in named_models(named):
        source = open_source(folder)
        _check_vocabulary(folder, source, data, info)
        candidates.append(Candidate(label, folder, source, digest(folder)))
    return candidates


def digest(folder: Path) -> str:
    """Returns 16 hex digits that change when the model is exported again."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in IDENTIFYING:
            found.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            stat = path.stat()
            found.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def _check_vocabulary(folder: Path, source: Source, data: Path, info: DatasetInfo) -> None:
    """Raises InputError if the model does not fit the tokens of the data.

    Without a tokenizer in the folder, only the sizes of the vocabularies can be compared.
    """
    if source.model_config.vocab_size < info.vocab_size:
        raise InputError(
            f"{folder} has a vocabulary of {source.model_config.vocab_size} tokens, "
            f"but the data {data} one of {info.vocab_size}; give the data that it was trained on"
        )
    if not source.has_tokenizer:
        return
    if not same_tokenizer(Tokenizer.load(folder).fingerprint, info.tokenizer_fingerprint):
        raise InputError(
            f"{folder} has another tokenizer than the data {data}; "
            f"prepare the data with it: --tokenizer {folder}"
        )
