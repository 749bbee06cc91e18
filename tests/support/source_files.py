"""Sources in every format, for tests that read them from elsewhere."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import parquet
from streaming import MDSWriter

from megaconsa.data.formats import zstd
from megaconsa.data.megatron_file import TYPES

Sequences = list[list[int]]
"""A document of Megatron-LM: the ids of each of its sequences."""


def write_megatron(path: Path, documents: Sequence[Sequences], code: int = 8) -> None:
    """Writes a pair of files by the definition of the format. path: without suffix."""
    dtype = np.dtype(TYPES.get(code, "f4"))
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    places = [sum(lengths[:number]) * dtype.itemsize for number in range(len(lengths))]
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    path.with_suffix(".bin").write_bytes(
        b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    )
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(places)}q", *places)
        + struct.pack(f"<{len(bounds)}q", *bounds)
    )


def write_mds(
    folder: Path, columns: dict[str, str], rows: Sequence[dict[str, Any]], **options: Any
) -> None:
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for row in rows:
            writer.write(row)


def write_texts(folder: Path, documents: Sequence[str]) -> None:
    """Writes documents in every format of texts, and files that are not read."""
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    (folder / "deep" / "lines.jsonl").write_bytes(lines)
    (folder / "part-00001").write_bytes(lines[: len(lines) // 4].rpartition(b"\n")[0])
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "lines.jsonl.bz2").write_bytes(bz2.compress(lines))
    (folder / "deep" / "lines.json.xz").write_bytes(lzma.compress(lines))
    (folder / "lines").write_bytes(zstd.compress(lines))
    table = arrow.table({"text": list(documents), "other": list(documents)})
    parquet.write_table(table, folder / "deep" / "er" / "table.parquet", row_group_size=25)
    with arrow.ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=20)
    with arrow.ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=20)
    (folder / "größe 100%.txt").write_text(documents[0])
    (folder / "deep" / "empty.txt").touch()
    (folder / "README.md").write_text("card")
    (folder / "picture.png").write_bytes(b"\xff\x00")
    (folder / ".hidden" / "x.jsonl").write_bytes(lines)
    (folder / "deep" / ".x.txt").write_text("hidden")


def write_ids(folder: Path, documents: Sequence[list[int]]) -> None:
    """Writes documents in every format of ids."""
    folder.mkdir()
    write_megatron(folder / "ids", [[document[:5], document[5:]] for document in documents])
    rows = [{"tokens": np.array(document)} for document in documents]
    for name, compression in (("plain", None), ("packed", "zstd")):
        write_mds(
            folder / name,
            {"tokens": "ndarray:int64"},
            rows,
            compression=compression,
            hashes=["xxh64"],
            size_limit=1 << 14,
        )
