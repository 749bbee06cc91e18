"""What identifies a tokenizer: two short digests, of the ids and of the way to them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

PARTS = "-"
"""Between the two digests. Data folders and checkpoints of earlier versions have the first alone."""


def fingerprint(content: dict[str, Any], post_processor: dict[str, Any] | None) -> str:
    """Two times 16 hex digits that change when a text gets other ids, and not with the layout of
    the tokenizer's file.

    The first covers vocabulary, merges and added tokens; the second normalizer, pre-tokenizer,
    post-processor and the model's settings. content: of a tokenizer.json, as the tokenizers library
    writes it, so that defaults are filled in.
    post_processor: as the file itself has it; releases of transformers put different ones in its
    place.
    """
    model = content["model"]
    ids = {
        "type": model["type"],
        "vocab": model["vocab"],
        "merges": [
            pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])
        ],
        "added": {token["content"]: token["id"] for token in content["added_tokens"]},
    }
    way = {
        "normalizer": content["normalizer"],
        "pre_tokenizer": content["pre_tokenizer"],
        "post_processor": _post_processor(post_processor),
        # Releases write a setting that is off as null, as false, as "" or not at all.
        "model": {
            name: value
            for name, value in model.items()
            if name not in ("vocab", "merges") and value
        },
    }
    return PARTS.join(_digest(part) for part in (ids, way))


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two fingerprints are of one tokenizer; those of earlier versions, of one part, are
    compared by that part.
    """
    return all(
        mine == theirs for mine, theirs in zip(one.split(PARTS), other.split(PARTS), strict=False)
    )


def _post_processor(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """None for a template that adds nothing, as transformers 5 puts in the place of none."""
    if (
        content is not None
        and content["type"] == "TemplateProcessing"
        and not content["special_tokens"]
    ):
        return None
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
