"""Data folders as version 1 of their format had them: MDS shards, compressed as a whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from streaming.base.format.mds.writer import MDSWriter

from megaconsa.data.dataset_info import INFO, DatasetInfo
from megaconsa.data.shard_file import COLUMN, HASH
from megaconsa.data.shards import encoding
from megaconsa.data.token_shards import TokenShards


def compress(folder: Path, out: Path, shard_bytes: int) -> Path:
    """Writes the data of a folder as version 1 had it. Returns `out`."""
    info = DatasetInfo.load(folder)
    shutil.copytree(folder / "tokenizer", out / "tokenizer")
    columns = {COLUMN: encoding(info.vocab_size, info.sequence_length)}
    for split in info.splits:
        rows = TokenShards(folder, split)
        with MDSWriter(
            columns=columns,
            out=str(out / split),
            compression="zstd",
            hashes=[HASH],
            size_limit=shard_bytes,
        ) as writer:
            for i in range(len(rows)):
                writer.write({COLUMN: rows[i]})
    (out / INFO).write_text(info.model_copy(update={"version": 1}).model_dump_json())
    return out
