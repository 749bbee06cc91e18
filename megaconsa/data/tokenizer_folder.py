"""Tokenizer folders in Hugging Face's format: their files, and loading them.

Loading gives the same tokenizer under every release of transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from megaconsa.data import TOKENIZER
from megaconsa.data.cache_settings import DEFAULT_CACHE, CacheSettings
from megaconsa.data.remote_cache import RemoteFolder
from megaconsa.errors import InputError
from megaconsa.files import parse_json
from megaconsa.remote_path import is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
"""A file of a model's folder. It says which ids end the model's answers, and how it samples.

It is copied together with the tokenizer.
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
"""Files and folders that a tokenizer folder may have."""
MODEL_INPUTS = ["input_ids", "attention_mask"]
"""What a tokenizer must return for `model.generate(**tokenizer(text, return_tensors="pt"))`.

The generic class of transformers 4 also returns token_type_ids, which Qwen3 refuses.
"""
QWEN3_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
"""The classes of published Qwen3 tokenizers. They return MODEL_INPUTS in every release."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer folder that transformers reads, byte for byte.

    They are copied, not loaded and saved: transformers 4 may fail to load what transformers 5
    saves.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, copy_function=shutil.copyfile)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def declare_model_inputs(folder: Path) -> None:
    """Makes transformers return MODEL_INPUTS for a text, by a line in tokenizer_config.json.

    The file stays as it is where that is already so.
    """
    file = folder / TOKENIZER_CONFIG
    config = read_mapping(file)
    declared = config.get("model_input_names")
    if declared == MODEL_INPUTS:
        return
    if declared is None and config.get("tokenizer_class") in QWEN3_CLASSES:
        return
    config["model_input_names"] = MODEL_INPUTS
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def local_tokenizer(data: Path, cache: CacheSettings = DEFAULT_CACHE) -> Path:
    """The tokenizer's folder in a data folder. One in an object store is copied to the cache.

    Raises InputError where the store has none, and UnreachableError where it stays away.
    """
    if is_remote(data):
        return RemoteFolder(data, cache).files(TOKENIZER, TOKENIZER_FILES)
    return data / TOKENIZER


def load_pretrained(folder: Path) -> PreTrainedTokenizerBase:
    """Loads transformers' tokenizer from the folder.

    The tokenizer splits text and gives ids as tokenizer.json says. No code in the folder is run.

    Raises InputError where transformers cannot load the folder. Also raises it where a token would
    get another id than the files give it, and where the end-of-text token is not in the files.
    """
    file = folder / TOKENIZER_JSON
    try:
        config = read_mapping(folder / TOKENIZER_CONFIG)
        written = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
        tokenizer = _load(folder, written, _readable(config))
    except Exception as error:
        # transformers raises whatever its readers raise. All of it means "not a tokenizer".
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"tokenizer {folder}: transformers cannot load it ({reason}), "
            "name one with tokenizer.json"
        ) from error
    if written is not None:
        _check_ids(folder, tokenizer, written, config)
    return tokenizer


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of any token. It exceeds the number of ids where they have holes."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises InputError where a token's id has no embedding in a model of `vocab_size` tokens.

    folder: the tokenizer's folder, for the error message.
    """
    largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise InputError(
            f"tokenizer={folder} has a token {largest}, but the model's vocab_size is "
            f"{vocab_size}; give the model's own tokenizer"
        )


def _cutting(backend: tokenizers.Tokenizer) -> list[Any]:
    """Normalizer and pre-tokenizer, which split a text before the vocabulary is used."""
    parts = (backend.normalizer, backend.pre_tokenizer)
    return [None if part is None else part.__getstate__() for part in parts]


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file, or an empty one where the file does not exist.

    Raises ValueError where the file holds anything else.
    """
    content = parse_json(file.read_text()) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a mapping")
    return content


def _readable(config: dict[str, Any]) -> dict[str, Any]:
    """Settings for loading that override those of tokenizer_config.json.

    transformers 4 fails on a list of extra_special_tokens, which transformers 5 saves.
    """
    import transformers

    extra = config.get("extra_special_tokens")
    if isinstance(extra, list) and int(transformers.__version__.split(".")[0]) < 5:
        return {"extra_special_tokens": {}, "additional_special_tokens": extra}
    return {}


def _load(
    folder: Path,
    written: tokenizers.Tokenizer | None,
    settings: dict[str, Any],
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer as the class that the folder names.

    written: the tokenizer as tokenizer.json says, or None without that file.
    settings: passed to transformers.

    The generic class replaces the named one where this release of transformers lacks it, or where
    it does not follow tokenizer.json. transformers 5 has classes that read only the vocabulary from
    tokenizer.json.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without fix_mistral_regex, some releases warn of every large tokenizer that it splits text
    # wrongly. Ours splits as tokenizer.json says, which the comparison below makes sure of.
    where = {"local_files_only": True, "fix_mistral_regex": False, **settings}
    try:
        # trust_remote_code is given as False. Without it, transformers would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **where)
    except ValueError:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), **where)
    if written is None or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    if _cutting(tokenizer.backend_tokenizer) == _cutting(written):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(str(folder), **where)


def _check_ids(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    written: tokenizers.Tokenizer,
    config: dict[str, Any],
) -> None:
    """Raises InputError where loaded ids differ from the files', or the files lack the eos token.

    written: the tokenizer as tokenizer.json says.
    config: the content of tokenizer_config.json.
    """
    promised: dict[str, int] = {}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        promised[token["content"]] = int(index)
    # tokenizer.json comes last, so it wins over tokenizer_config.json.
    promised |= written.get_vocab(with_added_tokens=False)
    # The tokenizers library renumbers added tokens where they do not directly follow the
    # vocabulary. Their ids are therefore taken from the file.
    for token in read_mapping(folder / TOKENIZER_JSON).get("added_tokens") or []:
        promised[token["content"]] = token["id"]
    loaded = tokenizer.get_vocab()
    for token, index in promised.items():
        if loaded.get(token) != index:
            raise InputError(
                f"tokenizer {folder}: its files give {token!r} the id {index}, "
                f"but it loads with {loaded.get(token)}; "
                "number added tokens on from the vocabulary, without a gap"
            )
    end = tokenizer.eos_token
    if end is not None and end not in promised:
        raise InputError(
            f"tokenizer {folder}: eos_token={end!r} in {TOKENIZER_CONFIG} is no token of "
            f"{TOKENIZER_JSON}; name one that is"
        )
