"""What is measured on a checkpoint.

It is compared with the trainer and with a plain computation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.data.dataset_info import VALIDATION
from megaconsa.data.stream import BatchStream
from megaconsa.errors import InputError
from megaconsa.model.qwen3 import Qwen3
from megaconsa.study.fields import Needles
from megaconsa.study.measures import Measures, measure_checkpoint

NO_NEEDLES = Needles()
CPU = torch.device("cpu")


@pytest.fixture
def trained(
    make_config: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], list[dict[str, Any]]],
    tmp_path: Path,
) -> tuple[Checkpoint, float]:
    """A run with half of the heads windowed.

    Returns its checkpoint, and the validation loss that the trainer reports over all held-out
    sequences.
    """
    allocation = {"source": "rule", "rule": "head-share", "sparsity": 0.5}
    rows = train(make_config(allocation=allocation, validation={"sequences": 100_000}))
    return store.resolve(tmp_path / "run"), rows[-1]["validation_loss"]


def test_validation_loss_is_the_trainer_s(trained: tuple[Checkpoint, float]) -> None:
    checkpoint, reported = trained
    measures = measure_checkpoint(checkpoint, NO_NEEDLES, CPU)
    assert measures.losses.mean == pytest.approx(reported, abs=1e-5)
    assert measures.sparsity == 0.5
    assert measures.needle_accuracy is None


def test_far_losses_are_those_of_late_positions(
    trained: tuple[Checkpoint, float],
    small_data: Path,
) -> None:
    """Computes the losses position by position, with all logits.

    A loop counts the positions in each document.
    """
    checkpoint, _ = trained
    measures = measure_checkpoint(checkpoint, NO_NEEDLES, CPU)
    allocation = checkpoint.allocation
    assert allocation is not None
    model = Qwen3(checkpoint.model_config, allocation, "reference")
    model.load_state_dict(dict(checkpoint.weights()), strict=False)
    stream = BatchStream(small_data, VALIDATION, seed=0, global_batch=1, micro_batch=1)
    sequences = stream.fixed_batches(100_000)
    for number, batch in enumerate(sequences[:10]):
        with torch.no_grad():
            logits = model(batch.tokens, batch.documents)[0]
        total = 0.0
        count = 0
        position = 0
        for place, token in enumerate(batch.tokens[0].tolist()):
            label = batch.labels[0, place]
            if label >= 0 and position >= 2 * allocation.window:
                total += float(cross_entropy(logits[place][None], label[None]))
                count += 1
            position = 0 if token == stream.info.end_of_text else position + 1
        assert measures.far_losses.tokens[number] == count
        assert measures.far_losses.sums[number] == pytest.approx(total, abs=1e-3)
    assert sum(measures.far_losses.tokens) < sum(measures.losses.tokens)


def test_needles_are_those_of_the_evaluation(trained: tuple[Checkpoint, float]) -> None:
    """An untrained model finds no needle and hardly prefers the stated number."""
    checkpoint, _ = trained
    measures = measure_checkpoint(checkpoint, Needles(lengths=(56,), count=2), CPU)
    assert measures.needle_accuracy == 0
    assert measures.needle_margin == pytest.approx(0, abs=0.5)


def test_a_needle_that_does_not_fit_is_refused(trained: tuple[Checkpoint, float]) -> None:
    with pytest.raises(InputError, match="leaves no haystack"):
        measure_checkpoint(trained[0], Needles(lengths=(8,), count=1), CPU)


def test_measures_go_through_their_file(trained: tuple[Checkpoint, float], tmp_path: Path) -> None:
    measures = measure_checkpoint(trained[0], NO_NEEDLES, CPU)
    file = tmp_path / "measures.json"
    measures.save(file)
    assert Measures.load(file) == measures
    file.write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        Measures.load(file)
