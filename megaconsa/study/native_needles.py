"""Needle retrieval on a checkpoint that was not exported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megaconsa.data.mixture_file import tokenizer_folder
from megaconsa.data.stream import Batch
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.native_model import NativeModel
from megaconsa.evaluation.needle import Needles, measure
from megaconsa.evaluation.record import NeedleCell, NeedleSettings
from megaconsa.study import fields

DEPTHS = (0.1, 0.5, 0.9)
"""Positions of the needle, as shares of the haystack."""
NEEDLE_SEED = 0


class ScoredModel:
    """A NativeModel with the interface of a transformers model.

    It has the attributes that megaconsa.evaluation.scoring uses.
    """

    def __init__(self, native: NativeModel, vocab_size: int, name: str) -> None:
        self.native = native
        self.device = native.device
        self.lm_head = native.model.lm_head
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.name_or_path = name

    def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """Returns an object with the hidden states after the final norm.

        input_ids: (B, S). Each row is one document.
        use_cache: ignored, because there is no cache.
        """
        documents = torch.zeros_like(input_ids, dtype=torch.int32)
        sequences = torch.arange(len(input_ids), device=self.device)
        batch = Batch(input_ids, input_ids, documents, sequences)
        hidden = self.native.final(self.native.embed(batch), batch)
        return SimpleNamespace(last_hidden_state=hidden)


def open_needles(data: Path, wanted: fields.Needles) -> Needles:
    """Returns needles in the held-out text of a data folder.

    Raises InputError if an example of some length cannot be made.
    """
    needles = Needles(Tokenizer.load(tokenizer_folder(data)), HeldOut(data), NEEDLE_SEED)
    needles.check_lengths(wanted.lengths)
    return needles


def needle_cells(
    model: ScoredModel,
    data: Path,
    wanted: fields.Needles,
    batch_tokens: int,
) -> list[NeedleCell]:
    """Returns the figures of each length and depth.

    batch_tokens: tokens of a forward pass.
    """
    needles = open_needles(data, wanted)
    record = NeedleSettings(
        lengths=list(wanted.lengths),
        depths=list(DEPTHS),
        needles=wanted.count,
        seed=NEEDLE_SEED,
    )
    return measure(model, needles, record, batch_tokens)
