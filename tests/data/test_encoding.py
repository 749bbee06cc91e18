"""Long documents get the ids that the whole text has, though they are encoded in parts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megaconsa.data import encoding
from megaconsa.data.document import Document
from megaconsa.data.encoding import encode
from megaconsa.data.tokenizer import Tokenizer
from tests.data.conftest import make_documents


@pytest.fixture(scope="session")
def byte_tokenizer(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE of bytes that splits words as Qwen's does."""
    backend = Backend(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def long_texts() -> list[str]:
    rng = random.Random(3)
    prose = " ".join(make_documents(40, seed=5))
    noise = "".join(chr(rng.choice([32, 65, 97, 0xE9, 0x65E5, 0x1F600])) for _ in range(9000))
    repeated = "ab" * 4000 + " " + "=" * 3000 + "\n" * 500
    return [prose, noise, repeated, prose[:2001], prose[:2000]]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_parts_of_a_document_are_the_whole(
    kind: str, tokenizer_folder: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "OVERLAP", 200)
    tokenizer = Tokenizer.load(tokenizer_folder if kind == "characters" else byte_tokenizer)
    texts = long_texts()
    found = list(encode(map(Document, texts), tokenizer, threads=2))
    assert [each.document.text for each in found] == texts
    for document, ids, mask in found:
        assert mask is None
        expected = [*tokenizer.encode_batch([document.text])[0], tokenizer.end_of_text]
        assert np.array_equal(ids, expected)


def test_no_part_is_longer_than_a_batch(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "OVERLAP", 200)
    tokenizer = Tokenizer.load(tokenizer_folder)
    longest = 0

    def watched(text: str) -> tuple[list[int], list[int]]:
        nonlocal longest
        longest = max(longest, len(text))
        return Tokenizer.encode_with_places(tokenizer, text)

    monkeypatch.setattr(tokenizer, "encode_with_places", watched)
    monkeypatch.setattr(tokenizer, "encode_batch", None)
    assert len(list(encode([Document(long_texts()[0])], tokenizer))) == 1
    assert 1000 < longest <= 1400
