"""The tokenizer of an export, as users of transformers load it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from megaconsa.data.tokenizer_folder import TOKENIZER_CONFIG, TOKENIZER_JSON, load_pretrained
from megaconsa.errors import RunError
from megaconsa.evaluation.export_check import check_ids
from megaconsa.huggingface.export import export
from tests.support.transformers_reference import DENSE, MODEL, random_weights

END = "<|endoftext|>"
LARGE = 100_200
"""Tokens of a vocabulary about which some releases of transformers warn."""


@pytest.fixture
def warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers logs, which pytest's own fixture does not see."""
    messages: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(note)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def write_tokenizer(folder: Path, size: int, **fields: Any) -> Path:
    """Writes a tokenizer of bytes, without transformers. Further tokens are never merged."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for number in range(len(vocabulary), size - 1):
        vocabulary[f"word {number}"] = number
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    folder.mkdir()
    made.save(str(folder / TOKENIZER_JSON))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END} | fields
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=3))
    return folder


def export_with(tokenizer: Path, size: int, out: Path) -> Path:
    shape = replace(MODEL, vocab_size=size, hidden_size=16)
    weights = random_weights(shape)
    export(weights, shape, DENSE, out, tokenizer=tokenizer, dtype=torch.float32, origin=None)
    return out


def test_a_large_vocabulary_gives_no_false_alarm(
    tmp_path: Path, warnings_of_transformers: list[str]
) -> None:
    """transformers 4.57.3 and later suspect that its regex is Mistral's."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", LARGE)
    out = export_with(tokenizer, LARGE, tmp_path / "hf")
    assert check_ids(out, tokenizer, torch.arange(40, 90)[None]) == 50
    # A folder that such a release saved raises the same alarm, and is read without it too.
    config = json.loads((out / "config.json").read_text()) | {"transformers_version": "4.57.6"}
    (out / "config.json").write_text(json.dumps(config))
    load_pretrained(out)
    assert [message for message in warnings_of_transformers if "regex" in message] == []


def test_other_ids_than_in_training_are_found(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", MODEL.vocab_size + 1)
    out = export_with(tokenizer, MODEL.vocab_size + 1, tmp_path / "hf")
    tokens = torch.arange(30, 90)[None]
    assert check_ids(out, tokenizer, tokens) == 60
    content = json.loads((out / TOKENIZER_JSON).read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (out / TOKENIZER_JSON).write_text(json.dumps(content))
    with pytest.raises(RunError, match="gives a text other ids than the run was trained with"):
        check_ids(out, tokenizer, tokens)


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"tokenizer_class": "Qwen2Tokenizer"}, False),
        ({"model_input_names": ["input_ids", "attention_mask"]}, False),
        ({}, True),
        ({"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}, True),
    ],
    ids=["Qwen3's class", "declared", "the generic class", "declared otherwise"],
)
def test_only_what_must_change_is_changed(
    tmp_path: Path, fields: dict[str, Any], changed: bool
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", MODEL.vocab_size + 1, **fields)
    out = export_with(tokenizer, MODEL.vocab_size + 1, tmp_path / "hf")
    before = (tokenizer / TOKENIZER_CONFIG).read_text()
    after = (out / TOKENIZER_CONFIG).read_text()
    assert (before != after) == changed
    assert (out / TOKENIZER_JSON).read_bytes() == (tokenizer / TOKENIZER_JSON).read_bytes()
    expected = json.loads(before) | {"model_input_names": ["input_ids", "attention_mask"]}
    assert json.loads(after) == (expected if changed else json.loads(before))
    assert list(AutoTokenizer.from_pretrained(out)("a")) == ["input_ids", "attention_mask"]
