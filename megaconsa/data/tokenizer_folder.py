"""A tokenizer folder of Hugging Face's format: its files, and reading it alike under every release
of transformers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megaconsa.errors import InputError
from megaconsa.files import parse_json

GENERATION_CONFIG = "generation_config.json"
"""Of a model's folder: the ids that end its answers, and how it samples. It goes where the
tokenizer goes.
"""
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates",
    GENERATION_CONFIG,
)
"""Files and folders that stand in a tokenizer folder, as far as it has them."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer folder that transformers reads, byte for byte.

    Never saved anew: what transformers 5 saves, transformers 4 may not load.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, copy_function=shutil.copyfile)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def load_pretrained(folder: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the folder, which cuts a text as tokenizer.json says and gives the
    ids that it says.

    No code in the folder is run. InputError where transformers cannot load it, where a token would
    have another id than the files give it, and where the text would end with a token that they do
    not have.
    """
    file = folder / TOKENIZER_JSON
    try:
        config = read_mapping(folder / TOKENIZER_CONFIG)
        written = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
        tokenizer = _load(folder, written, _readable(config))
    except (
        Exception
    ) as error:  # transformers raises whatever its readers raise; all of it means "not a tokenizer"
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"tokenizer {folder}: transformers cannot load it ({reason}), name one with tokenizer.json"
        ) from error
    if written is not None:
        _check_ids(folder, tokenizer, written, config)
    return tokenizer


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of any token; where ids have holes it exceeds their number."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """InputError where the tokenizer of `folder` has an id that a model of `vocab_size` tokens has
    no embedding for.
    """
    largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise InputError(
            f"tokenizer={folder} has a token {largest}, but the model's vocab_size is {vocab_size}; give the model's own tokenizer"
        )


def _cutting(backend: tokenizers.Tokenizer) -> list[Any]:
    """What decides how a text is cut before the vocabulary is looked at."""
    parts = (backend.normalizer, backend.pre_tokenizer)
    return [None if part is None else part.__getstate__() for part in parts]


def read_mapping(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; an empty one where there is no such file."""
    content = parse_json(file.read_text()) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a mapping")
    return content


def _readable(config: dict[str, Any]) -> dict[str, Any]:
    """Settings to load with, beside those of tokenizer_config.json: what transformers 5 saves there
    stops transformers 4.
    """
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list) and int(transformers.__version__.split(".")[0]) < 5:
        return {"extra_special_tokens": {}, "additional_special_tokens": extra}
    return {}


def _load(
    folder: Path,
    written: tokenizers.Tokenizer | None,
    settings: dict[str, Any],
) -> PreTrainedTokenizerBase:
    """As the class that the folder names, unless this transformers lacks it or builds it otherwise
    than tokenizer.json.

    transformers 5 has classes that take the vocabulary alone from tokenizer.json.
    """
    # False, not left out: transformers would ask on the terminal.
    where = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **where, **settings)
    except ValueError:
        return PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, **settings
        )
    if written is None or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    if _cutting(tokenizer.backend_tokenizer) == _cutting(written):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **settings)


def _check_ids(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    written: tokenizers.Tokenizer,
    config: dict[str, Any],
) -> None:
    # tokenizers numbers added tokens anew where they do not follow on the vocabulary, so they are
    # taken from the file.
    added = read_mapping(folder / TOKENIZER_JSON).get("added_tokens") or []
    promised = {
        token["content"]: int(index)
        for index, token in (config.get("added_tokens_decoder") or {}).items()
    }
    promised |= written.get_vocab(with_added_tokens=False) | {
        token["content"]: token["id"] for token in added
    }
    loaded = tokenizer.get_vocab()
    for token, index in promised.items():
        if loaded.get(token) != index:
            raise InputError(
                f"tokenizer {folder}: its files give {token!r} the id {index}, but it loads with {loaded.get(token)}; "
                "number added tokens on from the vocabulary, without a gap"
            )
    end = tokenizer.eos_token
    if end is not None and end not in promised:
        raise InputError(
            f"tokenizer {folder}: eos_token={end!r} in {TOKENIZER_CONFIG} is no token of {TOKENIZER_JSON}; name one that is"
        )
