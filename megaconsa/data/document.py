"""A document: a text, or the ids of one that was tokenized elsewhere, and what is predicted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xxhash


class Vocabulary(NamedTuple):
    """What must be known to read ids."""

    size: int
    """One more than the largest id."""
    end_of_text: int
    """Id of the token that follows each document."""


class Document(NamedTuple):
    """A document, as it was read."""

    text: str = ""
    """Empty where the document is ids."""
    ids: np.ndarray | None = None
    """(n,) int64, or None where the document is a text."""
    prompt: str | None = None
    """The text that stands before the document and is not predicted."""
    mask: np.ndarray | None = None
    """Of ids: (n,) uint8, 1 where an id is to be predicted. None: all are."""

    @property
    def texts(self) -> list[str]:
        """The texts that are tokenized one by one and joined. Empty for ids."""
        if self.ids is not None:
            return []
        return [self.text] if self.prompt is None else [self.prompt, self.text]

    @property
    def is_empty(self) -> bool:
        """Whether it has no text and no ids."""
        return not self.text and (self.ids is None or not len(self.ids))

    @property
    def characters(self) -> int:
        """Number of characters. 0 for ids, because their text is not known."""
        return len(self.text) + len(self.prompt or "")

    @property
    def size(self) -> int:
        """Characters or ids, whichever it holds."""
        return self.characters if self.ids is None else len(self.ids)

    def hash(self, seed: int = 0) -> int:
        """The hash of its content (xxh3_64). Equal documents have equal hashes.

        Documents with other prompts or masks are others.
        """
        if self.prompt is not None:
            seed = xxhash.xxh3_64_intdigest(self.prompt.encode(), seed=seed)
        if self.mask is not None:
            seed = xxhash.xxh3_64_intdigest(self.mask.tobytes(), seed=seed)
        content = self.text.encode() if self.ids is None else self.ids.tobytes()
        return xxhash.xxh3_64_intdigest(content, seed=seed)

    def ended(self, vocabulary: Vocabulary) -> Document:
        """The document with an end-of-text token behind its ids, unless one is there already.

        The new token is predicted if the last id is. A document that is empty, or is nothing but
        that token, is returned as an empty one.

        Raises ValueError, with what is wrong, where an id is outside the vocabulary.
        """
        if self.ids is None or not len(self.ids):
            return self
        least = int(self.ids.min())
        largest = int(self.ids.max())
        if least < 0 or largest >= vocabulary.size:
            raise ValueError(
                f"id {least if least < 0 else largest} is outside the vocabulary of "
                f"{vocabulary.size} tokens, give the tokenizer that the ids are from"
            )
        if self.ids[-1] != vocabulary.end_of_text:
            ids = np.append(self.ids, vocabulary.end_of_text)
            mask = None if self.mask is None else np.append(self.mask, self.mask[-1:])
            return self._replace(ids=ids, mask=mask)
        return self if len(self.ids) > 1 else Document()
