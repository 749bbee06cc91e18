"""Tokenizer folders from elsewhere.

They are read in the same way by every release of transformers, copied unchanged, and told apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from megaconsa.data.dataset_info import INFO, DatasetInfo
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.preparation_options import Options
from megaconsa.data.prepare import prepare
from megaconsa.data.shards import verify
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.data.tokenizer_folder import load_pretrained
from megaconsa.errors import InputError

END = "<|endoftext|>"
TEXT = "The Value of 2024, 1999 and it's 31415."
# Qwen's pattern, except that Qwen's takes one digit at a time.
THREE_DIGITS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Make = Callable[..., Path]


def byte_level() -> tokenizers.Tokenizer:
    """A tokenizer of bytes and of words of up to three digits, with ids 0 to 1355."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    merges = [(first, second) for first in "0123456789" for second in "0123456789"]
    merges += [(first + second, third) for first, second in merges for third in "0123456789"]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(THREE_DIGITS), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END, "<|im_end|>"])
    return made


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a folder for the tokenizer of `byte_level`, with the changes asked for.

    It does not use transformers, which would make other changes.
    """

    def write(
        name: str = "tokenizer",
        change: Callable[[tokenizers.Tokenizer], None] | None = None,
        **fields: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        made = byte_level()
        if change:
            change(made)
        (folder / "tokenizer.json").write_text(made.to_str())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "model_max_length": 4096,
        } | fields
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=3))
        return folder

    return write


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "NobodysTokenizer"]
)
def test_a_text_is_cut_as_tokenizer_json_says(make: Make, kind: str) -> None:
    """Classes of transformers 5 read only the vocabulary from that file."""
    folder = make(tokenizer_class=kind)
    expected = byte_level().encode(TEXT, add_special_tokens=False).ids
    assert Tokenizer.load(folder).encode_batch([TEXT]) == [expected]
    assert load_pretrained(folder)(TEXT, add_special_tokens=False).input_ids == expected


def test_a_list_of_extra_special_tokens_is_read(make: Make) -> None:
    """transformers 5 saves such a list, and transformers 4 fails on it."""
    folder = make(extra_special_tokens=["<|im_end|>"])
    plain = Tokenizer.load(make("plain"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode_batch([TEXT]) == plain.encode_batch([TEXT])
    assert (tokenizer.fingerprint, tokenizer.end_of_text) == (plain.fingerprint, plain.end_of_text)
    assert "<|im_end|>" in load_pretrained(folder).all_special_tokens


def spread(content: dict[str, Any]) -> None:
    """Gives a far larger id to the last word of the vocabulary and to the tokens added after it."""
    content["model"]["vocab"]["999"] = 3000
    for number, token in enumerate(content["added_tokens"]):
        content["model"]["vocab"][token["content"]] = token["id"] = 3001 + number


def test_the_largest_id_counts_where_ids_have_holes(make: Make, tmp_path: Path) -> None:
    folder = edit(make(), spread)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 3003
    assert len(load_pretrained(folder)) < 1500
    (tmp_path / "text.txt").write_text("999 998 1999 " * 100)
    info = prepare(
        [str(tmp_path / "text.txt")],
        tmp_path / "data",
        Options(sequence_length=8, validation_share=0),
        tokenizer=folder,
    )
    assert info.vocab_size == 3003
    assert not verify(tmp_path / "data")


def test_tokens_that_would_load_with_other_ids_are_refused(make: Make) -> None:
    """tokenizers silently closes a gap before added tokens.

    The model has other embeddings at the resulting ids.
    """

    def gap(content: dict[str, Any]) -> None:
        for token in content["added_tokens"]:
            token["id"] += 100

    with pytest.raises(
        InputError, match=r"give '<\|endoftext\|>' the id 1456, but it loads with 1356; number"
    ):
        Tokenizer.load(edit(make(), gap))
    described = {"2000": {"content": "<|more|>", "special": True}}
    with pytest.raises(InputError, match=r"give '<\|more\|>' the id 2000, but it loads with 1358"):
        Tokenizer.load(make("described", added_tokens_decoder=described))


def test_an_end_that_is_no_token_is_refused(make: Make) -> None:
    """transformers would add it as a token that the model has never seen."""
    with pytest.raises(
        InputError,
        match=r"eos_token='<\|end\|>' in tokenizer_config.json is no token of tokenizer.json",
    ):
        Tokenizer.load(make(eos_token="<|end|>"))


CHANGES: dict[str, Callable[[tokenizers.Tokenizer], None]] = {
    "normalizer": lambda made: setattr(made, "normalizer", normalizers.Lowercase()),
    "pre_tokenizer": lambda made: setattr(
        made, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "post_processor": lambda made: setattr(
        made,
        "post_processor",
        processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 1356)]),
    ),
    "model": lambda made: setattr(made.model, "dropout", 0.1),
    "vocabulary": lambda made: made.add_tokens(["<think>"]) and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_covers_the_whole_way_to_the_ids(make: Make, change: str) -> None:
    one = Tokenizer.load(make("one"))
    other = Tokenizer.load(make("other", CHANGES[change]))
    assert not same_tokenizer(one.fingerprint, other.fingerprint)


def test_the_fingerprint_leaves_out_what_changes_no_id(make: Make) -> None:
    """The fingerprint ignores layout, class, and an inert template.

    transformers 5 adds such a template where there is no post-processor.
    """
    one = Tokenizer.load(make("one")).fingerprint
    assert Tokenizer.load(make("other", tokenizer_class="Qwen2Tokenizer")).fingerprint == one
    folder = make("again")
    AutoTokenizer.from_pretrained(make("source")).save_pretrained(folder)
    assert Tokenizer.load(folder).fingerprint == one

    def nothing(made: Any) -> None:
        made.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")

    assert Tokenizer.load(make("nothing", nothing)).fingerprint == one
    laid_out = edit(make("laid out"), lambda content: content.update(version="1.0"))
    assert Tokenizer.load(laid_out).fingerprint == one


def first_fingerprint(folder: Path) -> str:
    """Computes the fingerprint as megaconsa 0.1 did.

    Data folders from that version still exist.
    """
    content = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    model = content["model"]
    canonical = {
        "type": model["type"],
        "vocab": model["vocab"],
        "merges": [
            pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])
        ],
        "added": {token["content"]: token["id"] for token in content["added_tokens"]},
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]


def test_data_folders_with_an_earlier_fingerprint_are_whole(make: Make, tmp_path: Path) -> None:
    folder = make()
    out = tmp_path / "data"
    (tmp_path / "text.txt").write_text(TEXT * 50)

    def prepared(tokenizer: Path) -> DatasetInfo:
        return prepare(
            [str(tmp_path / "text.txt")],
            out,
            Options(sequence_length=8, validation_share=0),
            tokenizer=tokenizer,
        )

    prepared(folder)
    content = json.loads((out / INFO).read_text()) | {
        "tokenizer_fingerprint": first_fingerprint(folder)
    }
    (out / INFO).write_text(json.dumps(content))
    assert not verify(out)
    assert prepared(folder).tokenizer_fingerprint == content["tokenizer_fingerprint"]
    with pytest.raises(InputError, match="holds other data"):
        prepared(make("other", CHANGES["vocabulary"]))
    (out / INFO).write_text(json.dumps(content | {"tokenizer_fingerprint": "0" * 16}))
    assert "fingerprint" in verify(out)[0]


def test_files_are_copied_byte_for_byte(make: Make, tmp_path: Path) -> None:
    """The data folder's tokenizer must load wherever the user's tokenizer does."""
    folder = make(
        tokenizer_class="Qwen2Tokenizer",
        additional_special_tokens=["<|im_end|>"],
        chat_template="{{ messages }}",
    )
    (folder / "generation_config.json").write_text('{ "eos_token_id": [1356, 1357] }')
    (tmp_path / "text.txt").write_text(TEXT * 50)
    prepare(
        [str(tmp_path / "text.txt")],
        tmp_path / "data",
        Options(sequence_length=8, validation_share=0),
        tokenizer=folder,
    )
    copied = {file.name: file.read_bytes() for file in (tmp_path / "data" / "tokenizer").iterdir()}
    assert copied == {file.name: file.read_bytes() for file in folder.iterdir()}
