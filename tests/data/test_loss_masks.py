"""Masks of what is not to be predicted, from prompts and columns to the labels of batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from streaming import LocalDataset, MDSWriter

from megaconsa.data import encoding, pieces, shards
from megaconsa.data.dataset_info import INFO, DatasetInfo, Packing, SplitInfo
from megaconsa.data.document import Document
from megaconsa.data.documents import Layout
from megaconsa.data.encoding import encode
from megaconsa.data.packing import cut_stream, fit_documents, mask_labels, masked_type
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import verify, write_split
from megaconsa.data.stream import BatchStream
from megaconsa.data.token_shards import TokenShards
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import DataError, InputError

END = 0
IGNORED = -100


def masked(documents: Sequence[Sequence[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    """The documents joined, each with its end-of-text token, and their lengths."""
    flat = [token for document in documents for token in [*document, (END, 1)]]
    return np.array(flat, masked_type("<u2")), np.array([len(each) + 1 for each in documents])


DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 1)), min_size=1, max_size=20), min_size=1
)


@given(DOCUMENTS, st.integers(1, 9))
def test_cutting_keeps_each_mask_with_its_token(
    documents: list[list[tuple[int, int]]], length: int
) -> None:
    ids, _ = masked(documents)
    rows = [row for block in cut_stream([ids[:7], ids[7:]], length) for row in block]
    for k, row in enumerate(rows):
        assert np.array_equal(row, ids[k * length : k * length + length + 1])
        (labels,) = mask_labels(row["tokens"][None], END, True, row["loss_mask"][None])
        for i, label in enumerate(labels.tolist()):
            known = row["loss_mask"][i + 1] and row["tokens"][i] != END
            assert label == (row["tokens"][i + 1] if known else IGNORED)


@given(DOCUMENTS, st.integers(2, 9))
def test_best_fit_keeps_each_mask_with_its_token(
    documents: list[list[tuple[int, int]]], length: int
) -> None:
    ids, lengths = masked(documents)
    filling = np.array((END, 0), ids.dtype)
    packed = fit_documents(ids, lengths, length, filling)
    alone = fit_documents(ids["tokens"], lengths, length, END)
    assert np.array_equal(packed["tokens"], alone)
    labels = mask_labels(packed["tokens"], END, True, packed["loss_mask"])
    found = sorted(
        (int(token), int(label))
        for row, row_labels in zip(packed["tokens"], labels, strict=True)
        for token, label in zip(row[:-1], row_labels, strict=True)
        if label != IGNORED
    )
    expected = []
    for document in documents:
        whole = [*document, (END, 1)]
        for (token, _), (following, predicted) in pairwise(whole):
            if predicted:
                expected.append((token, following))
    assert found == sorted(expected)


def conversations(documents: list[str]) -> list[dict[str, str]]:
    """Questions and answers. Some questions are empty, and some answers."""
    found = []
    for number, document in enumerate(documents):
        cut = (number * 37) % min(len(document), 150)
        found.append({"question": document[:cut], "answer": document[cut:] if number % 9 else ""})
    return found


def write_rows(folder: Path, rows: list[dict[str, str]], kind: str) -> None:
    folder.mkdir()
    table = arrow.Table.from_pylist(rows)
    if kind == "lines":
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "x.jsonl").write_text(text)
    elif kind == "parquet":
        parquet.write_table(table, folder / "x.parquet", row_group_size=40)
    elif kind == "arrow":
        with arrow.ipc.new_file(str(folder / "x.arrow"), table.schema) as writer:
            writer.write_table(table)
    else:
        with MDSWriter(out=str(folder), columns={"question": "str", "answer": "str"}) as mds:
            for row in rows:
                mds.write(row)


LAYOUT = Layout("answer", prompt="question")


@pytest.fixture(scope="session")
def instructions(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructions") / "lines"
    write_rows(folder, conversations(documents), "lines")
    return folder


def prepared_from(
    source: Path, out: Path, tokenizer: Path, packing: Packing = "cut", share: float = 0.1
) -> DatasetInfo:
    options = Options(sequence_length=32, validation_share=share, layout=LAYOUT, packing=packing)
    return prepare([str(source)], out, options, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def with_masks(
    instructions: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("with_masks") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 4096)
        patch.setattr(pieces, "PIECE_BYTES", 5000)
        prepared_from(instructions, folder, tokenizer_folder)
    return folder


def slow_documents(
    rows: list[dict[str, str]], tokenizer: Tokenizer
) -> list[tuple[Document, list[int], list[int]]]:
    """Each conversation with its ids and what of them is predicted."""
    found = []
    for row in rows:
        if not row["answer"]:
            continue
        question, answer = tokenizer.encode_batch([row["question"], row["answer"]])
        ids = [*question, *answer, tokenizer.end_of_text]
        mask = [0] * len(question) + [1] * (len(answer) + 1)
        found.append((Document(row["answer"], prompt=row["question"]), ids, mask))
    return found


def test_labels_are_those_of_a_slow_truth(
    documents: list[str], with_masks: Path, tokenizer_folder: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    info = DatasetInfo.load(with_masks)
    assert info.loss_mask
    assert verify(with_masks) == []
    for split in ("train", "validation"):
        stream_ids: list[int] = []
        predicted: list[int] = []
        for document, ids, mask in slow_documents(conversations(documents), tokenizer):
            if (document.hash() < 0.1 * 2**64) == (split == "validation"):
                stream_ids += ids
                predicted += mask
        count = (len(stream_ids) - 1) // 32
        assert info.splits[split].sequences == count
        assert info.splits[split].tokens == sum(predicted[1 : count * 32 + 1])
        for separate in (True, False):
            stream = BatchStream(
                with_masks,
                split,
                seed=0,
                global_batch=1,
                micro_batch=1,
                separate_documents=separate,
                shuffle=False,
            )
            for number, (batch,) in enumerate(islice(stream.steps(), count)):
                for i in range(32):
                    at = number * 32 + i
                    assert batch.tokens[0, i] == stream_ids[at]
                    known = predicted[at + 1]
                    if separate and stream_ids[at] == tokenizer.end_of_text:
                        known = 0
                    assert batch.labels[0, i] == (stream_ids[at + 1] if known else IGNORED)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_fixed_batches_have_masks(with_masks: Path, workers: int) -> None:
    stream = BatchStream(with_masks, seed=0, global_batch=8, micro_batch=8, workers=workers)
    ids = stream.ids(np.arange(8))
    masks = np.empty((8, 33), np.uint8)
    rows = stream.shards.rows(ids, masks)
    assert 0 < masks.sum() < masks.size
    labels = mask_labels(rows, stream.info.end_of_text, True, masks)
    (batch,) = next(stream.steps())
    assert np.array_equal(batch.labels.numpy(), labels)
    fixed = stream.fixed_batches(8)
    stream.shards.rows(stream.shards.sample(8), masks)
    assert (fixed[0].labels.numpy()[masks[:, 1:] == 0] == IGNORED).all()
    assert np.array_equal(stream.shards[int(ids[0])], rows[0])


@pytest.mark.parametrize("kind", ["parquet", "arrow", "mds"])
@pytest.mark.parametrize("packing", ["cut", "best-fit"])
def test_every_format_gives_the_same_rows(
    documents: list[str],
    instructions: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    kind: str,
    packing: Packing,
) -> None:
    write_rows(tmp_path / "source", conversations(documents), kind)
    infos = []
    for name, source in (("one", instructions), ("two", tmp_path / "source")):
        infos.append(prepared_from(source, tmp_path / name, tokenizer_folder, packing))
    assert infos[0].splits == infos[1].splits
    assert infos[0].source.digest == infos[1].source.digest
    assert infos[0].source.prompt_field == "question"
    for split in ("train", "validation"):
        for file in (tmp_path / "one" / split).iterdir():
            assert file.read_bytes() == (tmp_path / "two" / split / file.name).read_bytes()
    stream = BatchStream(tmp_path / "one", seed=0, global_batch=1, micro_batch=1)
    steps = islice(stream.steps(), len(stream.shards))
    known = sum(int((batch.labels != IGNORED).sum()) for (batch,) in steps)
    # The first token behind an empty prompt is predicted only across documents.
    assert known <= infos[0].splits["train"].tokens
    if packing == "best-fit":
        tokenizer = Tokenizer.load(tokenizer_folder)
        expected = 0
        for document, _, mask in slow_documents(conversations(documents), tokenizer):
            if document.hash() >= 0.1 * 2**64:
                expected += sum(mask[1:])
        assert known == expected


def test_streaming_reads_the_masks(with_masks: Path) -> None:
    theirs = LocalDataset(local=str(with_masks / "train"))
    rows = TokenShards(with_masks, "train")
    masks = np.empty((len(rows), 33), np.uint8)
    ids = rows.rows(np.arange(len(rows)), masks)
    for number in range(0, len(rows), 5):
        assert np.array_equal(theirs[number]["tokens"], ids[number])
        assert np.array_equal(theirs[number]["loss_mask"], masks[number])


def test_a_damaged_mask_is_found(with_masks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(with_masks, tmp_path / "copy"))
    file = folder / "train" / "shard.00001.mds"
    rows = TokenShards(folder, "train")
    shard = rows._split.shard(1)
    data = bytearray(file.read_bytes())
    row_bytes = 33 + 8 + 66
    data[len(data) - 2 * row_bytes + 5] ^= 1
    file.write_bytes(data)
    last = int(rows._split.ends[1]) - 1
    rows.rows(np.array([last]))
    for masks in (None, np.empty((1, 33), np.uint8)):
        with pytest.raises(DataError, match=r"shard.00001.mds: row \d+ does not match its hash"):
            rows.rows(np.array([last - 1]), masks)
    with pytest.raises(DataError, match="does not match its xxh3_64 hash"):
        shard.verify()
    assert len(verify(folder)) == 1


def test_other_values_of_a_mask_are_found(with_masks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(with_masks, tmp_path / "copy"))
    shutil.rmtree(folder / "validation")
    rows = np.zeros((1, 33), masked_type("<u2"))
    rows["loss_mask"][0, 4] = 2
    write_split(folder, "validation", [rows], 512, 32, masked=True)
    info = DatasetInfo.load(folder)
    splits = {**info.splits, "validation": SplitInfo(sequences=1, tokens=1, documents=1)}
    (folder / INFO).write_text(info.model_copy(update={"splits": splits}).model_dump_json())
    (fault,) = verify(folder)
    assert "the mask of row 0 has other values than 0, 1" in fault


def test_a_folder_without_masks_says_nothing_of_them(prepared: Path, info: DatasetInfo) -> None:
    content = json.loads((prepared / INFO).read_text())
    assert "loss_mask" not in content
    assert "prompt_field" not in content["source"]
    assert "loss_mask" not in info.identity()
    assert "prompt_field" not in info.identity()["source"]
    masks = np.zeros((2, 33), np.uint8)
    TokenShards(prepared, "train").rows(np.arange(2), masks)
    assert masks.all()


def test_a_mixture_may_have_masks_in_some_folders(
    prepared: Path, with_masks: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text(
        f"sources:\n  plain: {{path: {prepared}, weight: 0.5}}\n"
        f"  chats: {{path: {with_masks}, weight: 0.5}}\n"
    )
    stream = BatchStream(file, seed=0, global_batch=32, micro_batch=32)
    plain = len(TokenShards(prepared, "train"))
    ids = stream.ids(np.arange(32))
    (batch,) = next(stream.steps())
    assert 0 < (ids < plain).sum() < 32
    for row, index in enumerate(ids.tolist()):
        folder, own = (prepared, index) if index < plain else (with_masks, index - plain)
        alone = BatchStream(folder, seed=0, global_batch=1, micro_batch=1, shuffle=False)
        (expected,) = next(alone.steps(own))
        assert torch.equal(batch.tokens[row], expected.tokens[0])
        assert torch.equal(batch.labels[row], expected.labels[0])


def test_long_prompts_and_documents_are_encoded_in_parts(
    documents: list[str], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "OVERLAP", 200)
    tokenizer = Tokenizer.load(tokenizer_folder)
    long = " ".join(documents[:9])
    pairs = [("short", long), (long, "short"), (long, long), ("a", "b"), ("", "c")]
    found = list(encode([Document(text, prompt=prompt) for prompt, text in pairs], tokenizer))
    for (prompt, text), (_, ids, mask) in zip(pairs, found, strict=True):
        before, behind = tokenizer.encode_batch([prompt, text])
        assert ids.tolist() == [*before, *behind, tokenizer.end_of_text]
        assert mask is not None
        assert mask.tolist() == [0] * len(before) + [1] * (len(behind) + 1)


def test_prompts_that_cannot_be_are_refused(
    text_folder: Path, instructions: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"its documents have no fields, so --prompt-field"):
        prepared_from(text_folder, out, tokenizer_folder)
    faults = {"answer": "is the field of the documents too", "x": "with --prompt-field"}
    for prompt, message in faults.items():
        options = Options(sequence_length=8, layout=Layout("answer", prompt=prompt))
        with pytest.raises(InputError, match=message):
            prepare([str(instructions)], out, options, tokenizer=tokenizer_folder)
    for kind in ("parquet", "mds"):
        write_rows(tmp_path / kind, [{"question": "a", "answer": "b"}], kind)
        options = Options(sequence_length=8, layout=Layout("answer", prompt="x"))
        with pytest.raises(InputError, match=r'no column "x" .* name it with --prompt-field'):
            prepare([str(tmp_path / kind)], out, options, tokenizer=tokenizer_folder)
    line = json.dumps({"question": None, "answer": "x"})
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(InputError, match='line 1: field "question" is NoneType'):
        prepared_from(tmp_path / "x.jsonl", out, tokenizer_folder)
    assert not out.exists()


def test_a_finished_folder_with_another_prompt_is_refused(
    instructions: Path, with_masks: Path, tokenizer_folder: Path
) -> None:
    prepared_from(instructions, with_masks, tokenizer_folder)
    options = Options(sequence_length=32, validation_share=0.1, layout=Layout("answer"))
    with pytest.raises(InputError, match="--prompt-field is question there and None here"):
        prepare([str(instructions)], with_masks, options, tokenizer=tokenizer_folder)
