"""Both formats of the tokenizer give the same ids, and decoding returns the original text."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megaconsa.data.sentencepiece_log import merges_reported
from megaconsa.data.sources import find_files
from megaconsa.data.tokenizer import END_OF_TEXT, Tokenizer, train_sentencepiece
from megaconsa.errors import InputError
from tests.support.texts import read_texts

TEXTS = [
    "def f(x):\n\treturn  x   # two\n\n\n    four\t\ttabs\r\n",
    "  leading and trailing  ",
    " ",
    "\n",
    "größe, naïve, 日本語, 🙂👩‍👩‍👧, e\u0301, \u00a0, \x00\x7f",
    "0123456789 12.5e-3",
    f"a literal {END_OF_TEXT} in a text",
    "",
    "     " * 50 + "x",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def processor(tokenizer_folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(
        model_file=str(tokenizer_folder / "sentencepiece.model")
    )


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(
    tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert ids == processor.encode(text)
    assert tokenizer.end_of_text not in ids


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(" \n\taabbkloinde1(=日é🙂."), max_size=80) | st.text(max_size=20))
def test_any_text_has_equal_ids(
    tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_python_sources_round_trip(tokenizer: Tokenizer) -> None:
    texts = read_texts(find_files(["python"]).files[:10])
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_training_is_deterministic(
    documents: list[str], tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    train_sentencepiece(iter(documents), tmp_path, 512)
    for name in ("sentencepiece.model", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_progress_of_training(
    documents: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It comes while the merges are made, and sums up to the vocabulary."""
    steps: list[int] = []
    train_sentencepiece(documents, tmp_path, 1000, steps.append)
    assert len(steps) > 3
    assert sum(steps) == 1000
    assert capfd.readouterr() == ("", "")


def test_foreign_lines_on_stderr_are_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    with merges_reported(steps.append):
        os.write(2, b"bpe_model_trainer.cc(268) LOG(INFO) Added: freq=2 size=20 all=3\n")
        os.write(2, b"somebody else\nI0 1 bpe_model_trainer.cc:421] Merged: freq=2 merges=50\n")
    os.write(2, b"later\n")
    assert steps == [20, 30]
    assert capfd.readouterr().err == "somebody else\nlater\n"


def test_size_and_fingerprint(documents: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.vocab_size == 512
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    file = tmp_path / "saved" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    train_sentencepiece(documents, tmp_path / "other", 520)
    assert Tokenizer.load(tmp_path / "other").fingerprint != tokenizer.fingerprint


def test_bad_folders_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot load"):
        Tokenizer.load(tmp_path / "empty")
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "no-end"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no end-of-text token"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("size", [100, 100_000])
def test_impossible_sizes_are_refused(documents: list[str], tmp_path: Path, size: int) -> None:
    with pytest.raises(InputError, match=f"vocabulary {size}"):
        train_sentencepiece(documents, tmp_path / "out", size)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_during_training_is_no_refusal(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "to be or not to be"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sentencepiece(texts(), tmp_path, 512)
