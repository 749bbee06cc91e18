"""What prepare-data writes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from streaming import LocalDataset

from megaconsa.data import split_documents
from megaconsa.data.dataset_info import INFO, UNFINISHED, DatasetInfo
from megaconsa.data.document import Document
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import open_split, verify, write_split
from megaconsa.data.sources import find_files
from megaconsa.data.split_documents import in_validation
from megaconsa.data.token_shards import TokenShards
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError, RunError
from tests.support.texts import read_texts


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_data_is_the_packed_text(prepared: Path, text_folder: Path, info: DatasetInfo) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    assert (info.vocab_size, info.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert info.tokenizer_fingerprint == tokenizer.fingerprint
    documents = read_texts(find_files([str(text_folder)]).files)
    counts: Counter[int] = Counter()
    for split, held_out in (("train", False), ("validation", True)):
        texts = [
            document for document in documents if in_validation(Document(document), 0.1) == held_out
        ]
        encoded = tokenizer.encode_batch(texts)
        stream = np.concatenate([[*ids, tokenizer.end_of_text] for ids in encoded])
        expected = [stream[i : i + 33] for i in range(0, len(stream) - 32, 32)]
        shards = TokenShards(prepared, split)
        assert len(shards) == len(expected) == info.splits[split].sequences
        assert info.splits[split].tokens == 32 * len(expected)
        assert info.splits[split].documents == len(texts)
        for i, sequence in enumerate(expected):
            assert shards[i].dtype == np.uint16
            assert np.array_equal(shards[i], sequence)
            counts.update(sequence[1:].tolist())
    total = sum(counts.values())
    assert info.unigram_entropy == pytest.approx(
        -sum(n / total * math.log(n / total) for n in counts.values())
    )


def test_hashes_of_files_are_recorded(prepared: Path) -> None:
    for record in json.loads((prepared / "train" / "index.json").read_text())["shards"]:
        file = prepared / "train" / record["raw_data"]["basename"]
        digest = xxhash.xxh3_64_hexdigest(file.read_bytes())
        assert record["raw_data"]["hashes"] == {"xxh3_64": digest}
        assert record["zip_data"] is None


def test_streaming_reads_the_folder(prepared: Path) -> None:
    rows = TokenShards(prepared, "train")
    theirs = LocalDataset(local=str(prepared / "train"))
    assert len(theirs) == len(rows)
    for i in range(0, len(rows), 7):
        assert np.array_equal(theirs[i]["tokens"], rows[i])


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)]
)
def test_large_vocabularies_take_four_bytes(
    tmp_path: Path, info: DatasetInfo, vocab_size: int, dtype: type
) -> None:
    sequences = np.array([[0, 7, vocab_size - 1], [vocab_size - 1, 1, 2]])
    rows, counts = write_split(tmp_path, "train", [sequences], vocab_size, sequence_length=2)
    assert (rows, counts.sum()) == (2, 4)
    splits = {"train": info.splits["train"].model_copy(update={"sequences": 2})}
    large = info.model_copy(
        update={"vocab_size": vocab_size, "sequence_length": 2, "splits": splits}
    )
    (tmp_path / INFO).write_text(large.model_dump_json())
    shards = TokenShards(tmp_path, "train")
    assert shards[0].dtype == dtype
    assert np.array_equal([shards[0], shards[1]], sequences)


def test_tokenizer_can_be_trained_on_the_way(text_folder: Path, tmp_path: Path) -> None:
    info = prepare(
        [str(text_folder)], tmp_path / "data", Options(sequence_length=16), train_tokenizer=600
    )
    assert info.vocab_size == 600
    assert verify(tmp_path / "data") == []


def test_chat_template_and_generation_config_come_along(
    text_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    words = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, words)
    (words / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (words / "generation_config.json").write_text('{"temperature": 0.6}')
    prepare([str(text_folder)], tmp_path / "data", Options(sequence_length=32), tokenizer=words)
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "data" / "tokenizer" / name).read_text() == (words / name).read_text()


def test_finished_folder_is_kept_or_refused(
    text_folder: Path, prepared: Path, tokenizer_folder: Path
) -> None:
    before = contents(prepared)
    sources = [str(text_folder)]
    prepare(
        sources,
        prepared,
        Options(sequence_length=32, validation_share=0.1),
        tokenizer=tokenizer_folder,
    )
    with pytest.raises(InputError, match="sequence-length is 32 there and 64 here"):
        prepare(
            sources,
            prepared,
            Options(sequence_length=64, validation_share=0.1),
            tokenizer=tokenizer_folder,
        )
    with pytest.raises(InputError, match="source"):
        prepare(
            sources * 2,
            prepared,
            Options(sequence_length=32, validation_share=0.1),
            tokenizer=tokenizer_folder,
        )
    with pytest.raises(InputError, match="train-tokenizer is None there and 600 here"):
        prepare(
            sources,
            prepared,
            Options(sequence_length=32, validation_share=0.1),
            train_tokenizer=600,
        )
    assert contents(prepared) == before


def test_foreign_folder_is_refused(
    text_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious").write_text("x")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="already holds other files"):
        prepare(
            [str(text_folder)], tmp_path, Options(sequence_length=32), tokenizer=tokenizer_folder
        )
    assert contents(tmp_path) == before
    (tmp_path / UNFINISHED).touch()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=r"mine\.txt"):
        prepare(
            [str(text_folder)], tmp_path, Options(sequence_length=32), tokenizer=tokenizer_folder
        )
    assert (tmp_path / "train" / "precious").exists()


def test_failure_leaves_nothing(
    text_folder: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> Iterator[np.ndarray]:
        yield np.zeros((1, 33), np.int64)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(split_documents, "cut_stream", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(
                [str(text_folder)],
                tmp_path / "data",
                Options(sequence_length=32),
                tokenizer=tokenizer_folder,
            )
    assert not (tmp_path / "data").exists()
    with pytest.raises(
        InputError, match="train split has less than one sequence of 1000000 tokens"
    ):
        prepare(
            [str(text_folder)],
            tmp_path / "data",
            Options(sequence_length=1_000_000),
            tokenizer=tokenizer_folder,
        )
    assert not (tmp_path / "data").exists()


def test_killed_preparation_starts_again(
    text_folder: Path, tokenizer_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    script = f"""
import os
from pathlib import Path
from megaconsa.data import prepare, shards
from megaconsa.data.preparation_options import Options
shards.SHARD_BYTES = 4096
prepare.finish = lambda *_: os._exit(9)
prepare.prepare(
    [{str(text_folder)!r}],
    Path("data"),
    Options(sequence_length=32),
    tokenizer=Path({str(tokenizer_folder)!r}),
)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 9
    assert (tmp_path / "data" / "train" / "index.json").exists()
    with pytest.raises(InputError, match="did not finish"):
        DatasetInfo.load(tmp_path / "data")
    prepare(
        [str(text_folder)],
        tmp_path / "data",
        Options(sequence_length=16, validation_share=0),
        tokenizer=tokenizer_folder,
    )
    assert verify(tmp_path / "data") == []
    assert not (tmp_path / "data" / "validation").exists()
    assert not (tmp_path / "data" / UNFINISHED).exists()


def test_two_preparations_do_not_mix(
    text_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with (tmp_path / UNFINISHED).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is preparing it"):
            prepare(
                [str(text_folder)],
                tmp_path,
                Options(sequence_length=32),
                tokenizer=tokenizer_folder,
            )


def test_folders_that_are_no_data_are_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        DatasetInfo.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no dataset\.json"):
        DatasetInfo.load(tmp_path / "empty")
    content = json.loads((copy / INFO).read_text())
    (copy / INFO).write_text(json.dumps({**content, "vocab_size": "many"}))
    with pytest.raises(InputError, match="vocab_size"):
        DatasetInfo.load(copy)
    (copy / INFO).write_text("{")
    with pytest.raises(InputError, match=r"dataset\.json"):
        DatasetInfo.load(copy)


def test_bad_options_are_refused_before_writing(
    text_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sources = [str(text_folder)]
    with pytest.raises(InputError, match="one of --tokenizer"):
        prepare(sources, out, Options(sequence_length=32))
    with pytest.raises(InputError, match="one of --tokenizer"):
        prepare(
            sources,
            out,
            Options(sequence_length=32),
            tokenizer=tokenizer_folder,
            train_tokenizer=600,
        )
    with pytest.raises(InputError, match="sequence-length 0"):
        prepare(sources, out, Options(sequence_length=0), tokenizer=tokenizer_folder)
    with pytest.raises(InputError, match=r"validation-share 1\.5"):
        prepare(
            sources,
            out,
            Options(sequence_length=32, validation_share=1.5),
            tokenizer=tokenizer_folder,
        )
    with pytest.raises(
        InputError, match="none of the 300 documents falls into the validation split"
    ):
        prepare(
            sources,
            out,
            Options(sequence_length=32, validation_share=1e-9),
            tokenizer=tokenizer_folder,
        )
    assert not out.exists()


def test_held_out_share_is_a_function_of_content(documents: list[str]) -> None:
    held_out = [in_validation(Document(document), 0.3) for document in documents]
    assert held_out == [in_validation(Document(document), 0.3) for document in documents]
    assert 0.2 < sum(held_out) / len(held_out) < 0.4


def test_the_split_that_is_asked_for_must_exist(prepared: Path, info: DatasetInfo) -> None:
    with pytest.raises(InputError, match="no validation split"):
        open_split(
            prepared,
            info.model_copy(update={"splits": {"train": info.splits["train"]}}),
            "validation",
        )


def test_a_source_without_documents_is_shown(
    text_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty[b].txt").touch()
    command = [sys.executable, "-m", "megaconsa.cli", "prepare-data", str(text_folder)]
    command += ["empty[b].txt", "--out", "data", "--tokenizer", str(tokenizer_folder)]
    command += ["--sequence-length", "32", "--validation-share", "0.1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(DatasetInfo.load(tmp_path / "data").sources) == 2


def test_output_that_cannot_be_written_is_named(
    text_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    options = Options(sequence_length=32)
    with pytest.raises(RunError, match=r"file.*: cannot be written \(Not a directory\)"):
        prepare([str(text_folder)], tmp_path / "file" / "x", options, tokenizer=tokenizer_folder)
