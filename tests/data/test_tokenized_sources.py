"""Documents that were tokenized elsewhere: Megatron-LM's files and MDS folders of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaconsa.data import pieces
from megaconsa.data.bad_documents import BadDocuments
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.document import Vocabulary
from megaconsa.data.documents import Layout, read_documents
from megaconsa.data.megatron_file import TYPES, MegatronFile
from megaconsa.data.pieces import cut, identity
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import verify
from megaconsa.data.sources import find_files
from megaconsa.data.token_shards import TokenShards
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError
from tests.support.source_files import Sequences, write_mds, write_megatron
from tests.support.texts import read_texts

END = 1
WORDS = Vocabulary(300, END)


def read_ids(path: Path, **options: Any) -> list[list[int]]:
    """The ids of each document of a source."""
    files = find_files([str(path)]).files
    found = []
    for document in read_documents(files, vocabulary=WORDS, **options):
        assert document.ids is not None
        assert document.ids.dtype == np.int64
        found.append(document.ids.tolist())
    return found


def ended(document: list[int]) -> list[int]:
    return document if document[-1] == END else [*document, END]


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 120), max_size=9), max_size=3), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents=DOCUMENTS, code=st.sampled_from(sorted(TYPES)), size=st.integers(1, 60))
def test_megatron_documents_are_read_once_wherever_a_file_is_cut(
    documents: list[Sequences],
    code: int,
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_megatron(tmp_path / "x", documents, code)
    joined = [[token for sequence in document for token in sequence] for document in documents]
    expected = [ended(document) for document in joined if document and document != [END]]
    monkeypatch.setattr(pieces, "PIECE_BYTES", size)
    found = list(cut(find_files([str(tmp_path)]).files))
    read = [
        document.ids.tolist()
        for piece in found
        for document in read_documents(piece.files, vocabulary=WORDS)
        if document.ids is not None
    ]
    assert read == expected
    assert sum(piece.size for piece in found) == (tmp_path / "x.bin").stat().st_size


def test_both_names_of_a_megatron_pair_and_its_folder_are_the_same(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", [[[5, 6], [7]], [[8, END]]])
    for name in ("x.bin", "x.idx", "."):
        found = find_files([str(tmp_path / name)])
        assert read_ids(tmp_path / name) == [[5, 6, 7, END], [8, END]]
        assert [file.path.name for file in found.files] == ["x.bin"]
        assert found.skipped == []
    before = identity(found.files[0])
    write_megatron(tmp_path / "x", [[[5, 6]], [[7]], [[8, END]]])
    assert before != identity(found.files[0])
    (tmp_path / "x.bin").unlink()
    with pytest.raises(InputError, match=r"x.bin: the file of x.idx cannot be found"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (9, b"\x02", "it is no index of Megatron-LM of version 1"),
        (17, b"\x07", "its type of ids is 7, which is no type of integers"),
        (18, b"\x04", "bytes instead of"),
        (-24, b"\x01", "its documents are not its 3 sequences"),
        (-8, b"\x02", "its documents are not its 3 sequences"),
    ],
)
def test_damaged_megatron_indices_are_refused(
    tmp_path: Path, place: int, content: bytes, message: str
) -> None:
    write_megatron(tmp_path / "x", [[[5, 6], [7]], [[8, END]]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[place] = content[0]
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(InputError, match=rf"x.idx: the index is damaged .*{message}"):
        read_ids(tmp_path / "x.bin")
    (tmp_path / "x.idx").write_bytes(index[:20])
    with pytest.raises(InputError, match="it ends within its header"):
        MegatronFile(tmp_path / "x.bin", tmp_path / "x.idx")


def test_a_short_megatron_file_and_foreign_ids_are_refused_by_number(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", [[[5, 300]], [[7]], [[8, 9]]])
    with pytest.raises(InputError, match=r"x.bin, document 1: id 300 is outside the vocabulary of"):
        read_ids(tmp_path)
    bad = BadDocuments(1)
    assert read_ids(tmp_path, bad=bad) == [[7, END], [8, 9, END]]
    write_megatron(tmp_path / "x", [[[5]], [[-1]]], code=4)
    with pytest.raises(InputError, match=r"x.bin, document 2: id -1 is outside"):
        read_ids(tmp_path)
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"x.bin, document 2: bytes 4 to 8 are not in the file of"):
        read_ids(tmp_path)


IDS = [[5, 6, 7], [8, END], [0, 9, 10, 11], [299]]


@pytest.mark.parametrize("compression", [None, "zstd", "gz", "bz2", "br", "snappy"])
@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [
        ("bytes", np.int64),
        ("bytes", np.uint32),
        ("ndarray:int32", np.int32),
        ("ndarray", np.uint16),
    ],
)
def test_mds_ids_of_any_encoding(
    tmp_path: Path, encoding: str, dtype: type, compression: str | None
) -> None:
    rows = []
    for document in IDS:
        ids = np.array(document, dtype)
        rows.append({"id": "x", "input_ids": ids.tobytes() if encoding == "bytes" else ids})
    write_mds(
        tmp_path / "train",
        {"id": "str", "input_ids": encoding},
        rows,
        compression=compression,
        hashes=["sha1", "xxh64"],
        size_limit=100,
    )
    (tmp_path / "README.md").write_text("card")
    found = find_files([str(tmp_path)])
    assert len(found.files) > 1
    assert [file.path.name for file in found.skipped] == ["README.md"]
    # The files of a folder are shuffled.
    assert sorted(read_ids(tmp_path)) == sorted(ended(document) for document in IDS)
    with pytest.raises(InputError, match="it has no column \"content\" but 'id', 'input_ids'"):
        read_ids(tmp_path, layout=Layout("content"))
    with pytest.raises(InputError, match="its documents are ids, give their --tokenizer"):
        read_texts(found.files)


def test_mds_text_and_its_column(tmp_path: Path) -> None:
    rows = [{"content": text, "text": "other", "tokens": b""} for text in ("one", "", "grüße")]
    write_mds(tmp_path, {"content": "str", "text": "str", "tokens": "bytes"}, rows)
    for name in (".", "index.json"):
        files = find_files([str(tmp_path / name)]).files
        assert read_texts(files, Layout("content")) == ["one", "grüße"]
        assert read_texts(files) == ["other"] * 3


def test_an_index_that_merges_others_reads_no_document_twice(tmp_path: Path) -> None:
    shards = []
    for part in ("a", "b"):
        write_mds(tmp_path / part, {"text": "str"}, [{"text": part}])
        for shard in json.loads((tmp_path / part / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{part}/{shard['raw_data']['basename']}"
            shards.append(shard)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert sorted(read_texts(find_files([str(tmp_path)]).files)) == ["a", "b"]
    shards[0]["raw_data"]["basename"] = "../b.mds"
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    with pytest.raises(InputError, match=r"it names '../b.mds', which is no file of its folder"):
        find_files([str(tmp_path)])


def test_mds_shards_that_are_missing_damaged_or_unsafe_are_refused(tmp_path: Path) -> None:
    write_mds(tmp_path / "a", {"text": "str"}, [{"text": "one"}], hashes=["sha1"])
    shard = tmp_path / "a" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"shard.00000.mds: shard does not match its sha1 hash"):
        read_texts(find_files([str(tmp_path / "a")]).files)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard.00000.mds: shard cannot be found"):
        find_files([str(tmp_path / "a")])
    write_mds(tmp_path / "b", {"text": "str", "x": "pkl"}, [{"text": "one", "x": 3}])
    with pytest.raises(InputError, match=r"shard.00000.mds: it holds pickled objects"):
        read_texts(find_files([str(tmp_path / "b")]).files)
    write_mds(tmp_path / "c", {"text": "int"}, [{"text": 3}])
    with pytest.raises(InputError, match='column "text" is stored as int, which is neither'):
        read_texts(find_files([str(tmp_path / "c")]).files)
    rows = [{"tokens": np.ones((2, 2))}, {"tokens": np.ones(2, np.int32)}]
    write_mds(tmp_path / "d", {"tokens": "ndarray"}, rows)
    with pytest.raises(InputError, match='document 1: column "tokens" is float64 of shape'):
        read_ids(tmp_path / "d")
    write_mds(tmp_path / "e", {"tokens": "bytes"}, [{"tokens": b"123456"}])
    with pytest.raises(InputError, match='document 1: column "tokens" has 6 bytes, not 4 for each'):
        read_ids(tmp_path / "e")


def test_the_same_tokens_give_the_same_data_as_the_text(
    documents: list[str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Up to the split and the characters, which come from another hash and are not known."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    ids = tokenizer.encode_batch(documents)
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": document}) for document in documents]
    (tmp_path / "text" / "x.jsonl").write_text("\n".join(lines))
    (tmp_path / "megatron").mkdir()
    write_megatron(tmp_path / "megatron" / "x", [[document] for document in ids])
    rows = [{"tokens": np.array([*each, tokenizer.end_of_text])} for each in ids]
    write_mds(tmp_path / "mds", {"tokens": "ndarray:int64"}, rows)
    found: dict[str, DatasetInfo] = {}
    for name in ("text", "megatron", "mds"):
        options = Options(sequence_length=32, validation_share=0)
        found[name] = prepare(
            [str(tmp_path / name)], tmp_path / f"{name}_data", options, tokenizer=tokenizer_folder
        )
        assert verify(tmp_path / f"{name}_data") == []
    rows_of_text = TokenShards(tmp_path / "text_data", "train")
    every = np.arange(len(rows_of_text))
    for name in ("megatron", "mds"):
        rows_of_ids = TokenShards(tmp_path / f"{name}_data", "train")
        assert np.array_equal(rows_of_ids.rows(every), rows_of_text.rows(every))
        assert found[name].splits == found["text"].splits
        assert found[name].sources[0].characters == 0
    # Whatever the format is, equal ids are equal documents.
    assert found["megatron"].source.digest == found["mds"].source.digest
    held_out = [
        prepare(
            [str(tmp_path / name)],
            tmp_path / f"{name}_split",
            Options(sequence_length=32, validation_share=0.2),
            tokenizer=tokenizer_folder,
        ).splits
        for name in ("megatron", "mds")
    ]
    assert held_out[0] == held_out[1]
    with pytest.raises(InputError, match=r"x.bin: its documents are ids already, give the token"):
        prepare(
            [str(tmp_path / "text"), str(tmp_path / "megatron")],
            tmp_path / "none",
            Options(sequence_length=32),
            train_tokenizer=512,
        )
    with pytest.raises(InputError, match="it belongs to a data folder of megaconsa"):
        find_files([str(tmp_path / "text_data")])


def test_equal_ids_are_duplicates(tokenizer_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [[rng.integers(2, 500, 40).tolist()] for _ in range(10)]
    write_megatron(tmp_path / "x", [*documents, *documents[:3]])
    options = Options(sequence_length=8, validation_share=0, drop_duplicates=True)
    info = prepare([str(tmp_path)], tmp_path / "data", options, tokenizer=tokenizer_folder)
    assert (info.source.documents, info.source.dropped_documents) == (13, 3)
    assert info.sources[0].exact_duplicates == 3
