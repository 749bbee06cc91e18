"""Repeated documents are counted within their source, and dropped on demand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.token_shards import TokenShards
from megaconsa.data.tokenizer import Tokenizer
from tests.data.conftest import make_documents


def write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def nearly(text: str) -> str:
    """The text with one word of many replaced."""
    words = text.split(" ")
    words[len(words) // 2] = "replaced"
    return " ".join(words)


def read(folder: Path) -> list[str]:
    """The documents of the training split, sorted."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    shards = TokenShards(folder, "train")
    stream = np.concatenate([shards[i][:-1] for i in range(len(shards))])
    return sorted(tokenizer.decode(stream).split("<|endoftext|>")[:-1])


def test_duplicates_are_counted_and_dropped(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = [text for text in make_documents(200, 11) if len(text.split(" ")) > 120]
    repeated = texts[:9]
    similar = [nearly(text) for text in texts[10:25]]
    one = [*texts, *repeated, *similar]
    random.Random(0).shuffle(one)
    sources = [write(tmp_path / "one.jsonl", one), write(tmp_path / "two.jsonl", texts)]

    basis = Options(sequence_length=16, validation_share=0)

    def prepared(name: str, **options: Any) -> list[tuple[int, int | None]]:
        chosen = replace(basis, **options)
        info = prepare(sources, tmp_path / name, chosen, tokenizer=tokenizer_folder)
        split = info.splits["train"].documents
        assert split == info.source.documents - info.source.dropped_documents
        return [(source.exact_duplicates, source.near_duplicates) for source in info.sources]

    assert prepared("kept") == [(9, None), (0, None)]
    assert prepared("exact", drop_duplicates=True) == [(9, None), (0, None)]
    assert len(read(tmp_path / "kept")) - len(read(tmp_path / "exact")) in (9, 10)
    assert prepared("near", similarity=0.8, drop_duplicates=True) == [(9, 15), (0, 0)]
    assert prepared("counted", similarity=0.8) == [(9, 15), (0, 0)]
    assert read(tmp_path / "counted") == read(tmp_path / "kept")
    left = read(tmp_path / "near")
    for text in texts[:10] + texts[25:]:
        # Once from each source. The last document may be in the tail that is dropped.
        assert left.count(text) in (1, 2)


def test_statistics_of_a_source(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = ["aei oukl", "日本" * 40, "\U0001f600"]
    sources = [write(tmp_path / "text.jsonl", texts * 20)]
    info = prepare(
        sources,
        tmp_path / "data",
        Options(sequence_length=8, validation_share=0),
        tokenizer=tokenizer_folder,
    )
    tokenizer = Tokenizer.load(tokenizer_folder)
    encoded = tokenizer.encode_batch(texts)
    (source,) = info.sources
    assert source.documents == 60
    assert source.exact_duplicates == 57
    assert source.characters == 20 * sum(map(len, texts))
    assert source.tokens == 20 * sum(len(ids) + 1 for ids in encoded)
    assert source.unknown_tokens == 0
    # The tokenizer never saw the last character. It has four bytes.
    assert source.byte_tokens == 20 * 4
    lengths: dict[int, int] = {}
    for ids in encoded:
        power = 1 << (len(ids) + 1).bit_length() - 1
        lengths[power] = lengths.get(power, 0) + 20
    assert source.lengths == lengths


def test_whole_documents_fill_sequences(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = make_documents(300, 13)
    sources = [write(tmp_path / "text.jsonl", texts)]
    chosen = Options(sequence_length=512, validation_share=0, packing="best-fit")
    info = prepare(sources, tmp_path / "data", chosen, tokenizer=tokenizer_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    encoded = tokenizer.encode_batch(texts)
    fitting = [ids for ids in encoded if len(ids) < 512]
    assert 0.5 < len(fitting) / len(encoded) < 1
    shards = TokenShards(tmp_path / "data", "train")
    rows = [shards[i].tolist() for i in range(len(shards))]
    found = set()
    for row in rows:
        begin = 0
        for end in [i for i, token in enumerate(row) if token == info.end_of_text]:
            found.add(tuple(row[begin:end]))
            begin = end + 1
    assert {tuple(ids) for ids in fitting} <= found
    # Every token but the first of each sequence, and nothing that only fills.
    tokens = sum(len(ids) + 1 for ids in encoded)
    overlaps = sum(len(range(512, len(ids), 512)) for ids in encoded)
    assert info.splits["train"].tokens == tokens + overlaps - len(rows)
    assert tokens / (len(rows) * 513) > 0.9
