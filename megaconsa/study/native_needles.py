"""Needle retrieval on a model that was not exported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megaconsa.data import TOKENIZER
from megaconsa.data.stream import Batch
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.native_model import NativeModel
from megaconsa.evaluation.needle import Needles, measure
from megaconsa.evaluation.record import NeedleCell, NeedleSettings
from megaconsa.study import fields

DEPTHS = (0.1, 0.5, 0.9)
"""Places of the needle, as shares of the haystack."""
NEEDLE_SEED = 0


class ScoredModel:
    """A NativeModel with the attributes that megaconsa.evaluation.scoring asks of a transformers
    model."""

    def __init__(self, native: NativeModel, vocab_size: int, name: str) -> None:
        self.native = native
        self.device = native.device
        self.lm_head = native.model.lm_head
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.name_or_path = name

    def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """input_ids: (B, S), each row one document. There is no cache to use."""
        documents = torch.zeros_like(input_ids, dtype=torch.int32)
        sequences = torch.arange(len(input_ids), device=self.device)
        batch = Batch(input_ids, input_ids, documents, sequences)
        hidden = self.native.final(self.native.embed(batch), batch)
        return SimpleNamespace(last_hidden_state=hidden)


def open_needles(data: Path, wanted: fields.Needles) -> Needles:
    """Needles in the held-out text of a data folder. Raises InputError where an example of a length
    cannot be made."""
    needles = Needles(Tokenizer.load(data / TOKENIZER), HeldOut(data), NEEDLE_SEED)
    needles.check_lengths(wanted.lengths)
    return needles


def needle_cells(
    model: ScoredModel,
    data: Path,
    wanted: fields.Needles,
    batch_tokens: int,
) -> list[NeedleCell]:
    """Figures of each length and depth."""
    needles = open_needles(data, wanted)
    record = NeedleSettings(
        lengths=list(wanted.lengths),
        depths=list(DEPTHS),
        needles=wanted.count,
        seed=NEEDLE_SEED,
    )
    return measure(model, needles, record, batch_tokens)
