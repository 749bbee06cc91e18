"""Masks of ids that others wrote: the columns `loss_mask` and `labels` of MDS folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from megaconsa.data.document import Vocabulary
from megaconsa.data.documents import read_documents
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.sources import find_files
from megaconsa.data.token_shards import TokenShards
from megaconsa.errors import InputError

WORDS = Vocabulary(300, 1)
IDS = [[5, 6, 7], [8, 9, 1]]


def read_masks(folder: Path, columns: dict[str, str], rows: list[dict[str, Any]]) -> list[Any]:
    """The ids and masks of a folder that is written from rows."""
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for row in rows:
            writer.write(row)
    found = read_documents(find_files([str(folder)]).files, vocabulary=WORDS)
    return [
        (
            None if each.ids is None else each.ids.tolist(),
            None if each.mask is None else [*each.mask],
        )
        for each in found
    ]


@pytest.mark.parametrize(
    "kind", ["int64 bytes", "int32 bytes", "arrays", "loss_mask", "mask bytes"]
)
def test_mds_columns_of_masks(tmp_path: Path, kind: str) -> None:
    labels = [[-100, 6, -100], [-100, 9, 1]]
    rows: list[dict[str, Any]] = []
    for ids, label in zip(IDS, labels, strict=True):
        mask = np.array(label) != -100
        if kind == "arrays":
            rows.append({"tokens": np.array(ids), "labels": np.array(label)})
        elif kind == "loss_mask":
            rows.append({"tokens": np.array(ids), "loss_mask": mask.astype(np.uint8)})
        elif kind == "mask bytes":
            rows.append({"tokens": np.array(ids), "loss_mask": mask.tobytes()})
        else:
            dtype = kind.split()[0]
            row = {"tokens": np.array(ids, dtype), "labels": np.array(label, dtype)}
            rows.append({name: column.tobytes() for name, column in row.items()})
    columns = {}
    for name, value in rows[0].items():
        columns[name] = "bytes" if isinstance(value, bytes) else "ndarray"
    # The added end-of-text token is predicted if the token before it is.
    assert read_masks(tmp_path, columns, rows) == [
        ([5, 6, 7, 1], [0, 1, 0, 0]),
        ([8, 9, 1], [0, 1, 1]),
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", [6, 7, 1], "has other values than the ids and -100"),
        ("labels", [5], "has 1 values for 3 ids"),
        ("loss_mask", [0, 1, 2], "has other values than 0 and 1"),
        ("loss_mask", [0.0, 1.0, 1.0], "is float64 of shape"),
    ],
)
def test_bad_masks_are_refused(tmp_path: Path, name: str, value: list[Any], message: str) -> None:
    rows = [{"tokens": np.array(IDS[0]), name: np.array(value)}]
    with pytest.raises(InputError, match=f'shard.00000.mds, document 1: column "{name}" {message}'):
        read_masks(tmp_path, {"tokens": "ndarray", name: "ndarray"}, rows)


def test_masks_of_ids_come_through(tokenizer_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with MDSWriter(
        out=str(tmp_path / "source"), columns={"tokens": "ndarray", "loss_mask": "ndarray"}
    ) as writer:
        for _ in range(30):
            ids = rng.integers(2, 500, 40)
            writer.write({"tokens": ids, "loss_mask": (ids % 3 == 0).astype(np.int32)})
    options = Options(sequence_length=16, validation_share=0)
    info = prepare(
        [str(tmp_path / "source")], tmp_path / "data", options, tokenizer=tokenizer_folder
    )
    rows = TokenShards(tmp_path / "data", "train")
    masks = np.empty((len(rows), 17), np.uint8)
    ids = rows.rows(np.arange(len(rows)), masks)
    inner = ids != info.end_of_text
    assert np.array_equal(masks[inner], ids[inner] % 3 == 0)
    assert info.splits["train"].tokens == masks[:, 1:].sum()
