"""Held-out documents are those from before packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megaconsa.data.dataset_info import VALIDATION
from megaconsa.data.document import Document
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.split_documents import in_validation
from megaconsa.data.token_shards import TokenShards
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.evaluation.held_out import HeldOut


def test_documents_are_the_texts(small_data: Path, tmp_path: Path) -> None:
    """Documents are shorter than a sequence or span several sequences.

    They come in order. Only documents in the dropped tail are missing.
    """
    texts = [
        "import re\n" * 40,
        "x",
        "class A:\n    pass\n" * 30,
        *(f"number {i}, some words" for i in range(200)),
    ]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    data = tmp_path / "data"
    tokenizer = Tokenizer.load(small_data / "tokenizer")
    prepare(
        [str(tmp_path / "texts.jsonl")],
        data,
        Options(sequence_length=16, validation_share=0.8),
        tokenizer=small_data / "tokenizer",
    )
    expected = [text for text in texts if in_validation(Document(text), 0.8)]
    held_out = HeldOut(data)
    documents = [held_out.document(index, 10**6).tolist() for index in range(len(held_out.starts))]
    assert len(expected) - 3 <= len(documents) <= len(expected)
    assert [len(document) for document in documents] == held_out.lengths.tolist()
    for document, text in zip(documents[:-1], expected, strict=False):
        assert document.pop() == held_out.info.end_of_text
        assert tokenizer.decode(document) == text
    assert max(held_out.lengths) > 100


def test_tokens_are_the_stream(small_data: Path, held_out: HeldOut) -> None:
    shards = TokenShards(small_data, VALIDATION)
    rows = [shards[i] for i in range(len(shards))]
    stream = np.concatenate([*(row[:-1] for row in rows), rows[-1][-1:]]).astype(np.int64)
    documents = [held_out.document(index, 10**6) for index in range(len(held_out.starts))]
    assert np.array_equal(np.concatenate(documents), stream)
    text = stream[stream != held_out.info.end_of_text]
    assert held_out.text_tokens == len(text)
    assert np.array_equal(held_out.text(0, len(text)), text)
    assert np.array_equal(held_out.text(0, 100), text[:100])
    last = len(documents) - 1
    own = documents[last][documents[last] != held_out.info.end_of_text]
    assert np.array_equal(held_out.text(last, len(own) + 50), np.concatenate([own, text[:50]]))
