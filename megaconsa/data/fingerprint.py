"""The fingerprint of a tokenizer: one digest of its ids, and one of how text becomes ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

PARTS = "-"
"""Separates the two digests.

Data folders and checkpoints of earlier versions have only the first digest.
"""


def fingerprint(content: dict[str, Any], post_processor: dict[str, Any] | None) -> str:
    """The fingerprint of a tokenizer: two times 16 hex digits.

    content: the content of a tokenizer.json as the tokenizers library writes it, with defaults
        filled in.
    post_processor: as the file itself has it. Releases of transformers replace it by different
        ones.

    The fingerprint changes when a text gets other ids. It does not change with the layout of the
    tokenizer's file. The first part covers vocabulary, merges and added tokens. The second covers
    normalizer, pre-tokenizer, post-processor and the model's settings.
    """
    model = content["model"]
    # A merge is written as "left right" or as a pair.
    merges = []
    for pair in model.get("merges", []):
        merges.append(pair.split(" ") if isinstance(pair, str) else pair)
    # Releases write a setting that is off as null, as false, as "" or not at all.
    settings = {}
    for name, value in model.items():
        if name not in ("vocab", "merges") and value:
            settings[name] = value
    ids = {
        "type": model["type"],
        "vocab": model["vocab"],
        "merges": merges,
        "added": {token["content"]: token["id"] for token in content["added_tokens"]},
    }
    way = {
        "normalizer": content["normalizer"],
        "pre_tokenizer": content["pre_tokenizer"],
        "post_processor": _post_processor(post_processor),
        "model": settings,
    }
    return PARTS.join([_digest(ids), _digest(way)])


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same tokenizer.

    Fingerprints of earlier versions have one part, and are compared by that part.
    """
    # Not strict: the shorter fingerprint ends the comparison.
    parts = zip(one.split(PARTS), other.split(PARTS), strict=False)
    return all(mine == theirs for mine, theirs in parts)


def _post_processor(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """None for a template that adds nothing. transformers 5 writes such a template for none."""
    if (
        content is not None
        and content["type"] == "TemplateProcessing"
        and not content["special_tokens"]
    ):
        return None
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
