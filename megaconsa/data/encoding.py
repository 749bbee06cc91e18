"""Documents to ids, in batches, with bounded memory however long a document is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from megaconsa.data.document import Document
from megaconsa.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1_000_000
"""Characters of text that are encoded at a time."""
OVERLAP = 4096
"""Characters that two neighbouring parts of a long document share on each side of the cut."""
AGREEING = 16
"""Tokens on each side of a cut that must be the same in both parts."""


class Encoded(NamedTuple):
    """A document and its ids."""

    document: Document
    ids: np.ndarray
    """(n,) int64, with the end-of-text token."""
    mask: np.ndarray | None
    """(n,) uint8, 1 where an id is to be predicted. None: all are."""


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, threads: int = 1
) -> Iterator[Encoded]:
    """Each document with its ids, in order. Documents that are ids are passed on.

    A document of more than BATCH_CHARACTERS is encoded in overlapping parts, because a tokenizer
    takes more than a hundred bytes for each character.

    threads: how many batches are encoded at a time, while the caller's thread reads on.
    """
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[list[Encoded]]] = deque()
        for batch in _batches(documents):
            running.append(pool.submit(_encode_batch, batch, tokenizer))
            if len(running) > threads:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in batches. A long one is a batch of its own."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        if batch and held + document.size > BATCH_CHARACTERS:
            yield batch
            batch = []
            held = 0
        batch.append(document)
        held += document.size
    if batch:
        yield batch


def _encode_batch(batch: list[Document], tokenizer: Tokenizer) -> list[Encoded]:
    texts = [text for document in batch for text in document.texts]
    encoded = iter(_encode_texts(texts, tokenizer))
    found = []
    for document in batch:
        if document.ids is not None:
            found.append(Encoded(document, document.ids, document.mask))
            continue
        parts = [next(encoded) for _ in document.texts]
        ids = np.concatenate([*parts, [tokenizer.end_of_text]])
        mask = None
        if document.prompt is not None:
            mask = np.ones(len(ids), np.uint8)
            mask[: len(parts[0])] = 0
        found.append(Encoded(document, ids, mask))
    return found


def _encode_texts(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each text, int64."""
    if any(len(text) > BATCH_CHARACTERS for text in texts):
        # They are a prompt and its document at most, because a long document is a batch alone.
        return [_encode_text(text, tokenizer) for text in texts]
    return [np.array(ids, np.int64) for ids in tokenizer.encode_batch(texts)]


def _encode_text(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of one text of any length, int64."""
    if len(text) > BATCH_CHARACTERS:
        return _encode_long(text, tokenizer)
    return np.array(tokenizer.encode_batch([text])[0], np.int64)


def _encode_long(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a long document: those of the whole, put together from overlapping parts.

    Two neighbouring parts are joined where both have AGREEING equal tokens on each side. What a
    tokenizer makes of a place depends on the text around it, not on the rest of the document, so
    the parts are those of the whole there. Where two parts agree nowhere, as in one endless word,
    the document is encoded as a whole.
    """
    length = len(text)
    kept: list[np.ndarray] = []
    begin = 0
    left = _Part(text, 0, min(BATCH_CHARACTERS + OVERLAP, length), tokenizer)
    for middle in range(BATCH_CHARACTERS, length, BATCH_CHARACTERS):
        stop = min(middle + BATCH_CHARACTERS + OVERLAP, length)
        right = _Part(text, middle - OVERLAP, stop, tokenizer)
        joint = _joint(left, right)
        if joint is None:
            return np.array(tokenizer.encode_batch([text])[0], np.int64)
        end, next_begin = joint
        kept.append(left.ids[begin:end])
        left = right
        begin = next_begin
    kept.append(left.ids[begin:])
    return np.concatenate(kept)


class _Part:
    """A part of a document, encoded alone."""

    def __init__(self, text: str, start: int, stop: int, tokenizer: Tokenizer) -> None:
        """start, stop: the part's place in the document, in characters."""
        ids, starts = tokenizer.encode_with_places(text[start:stop])
        self.ids = np.array(ids, np.int64)
        self.starts = np.array(starts, np.int64) + start
        """The place in the document at which each token begins."""


def _joint(left: _Part, right: _Part) -> tuple[int, int] | None:
    """Where the right part continues the left one: the index of the same token in both.

    None if there is no such place.
    """
    if not len(left.ids) or not len(right.ids):
        return None
    # The left part is whole up to its last token, the right one from its first token on.
    first = int(np.searchsorted(left.starts, right.starts[0]))
    places = left.starts[first:]
    matches = np.searchsorted(right.starts, places)
    middle = len(places) // 2
    # The middle of the overlap is the furthest from both ends, so it comes first.
    for index in sorted(range(len(places)), key=lambda i: abs(i - middle)):
        mine = first + index
        theirs = int(matches[index])
        if _agree(left, mine, right, theirs):
            return mine, theirs
    return None


def _agree(left: _Part, mine: int, right: _Part, theirs: int) -> bool:
    """Whether the tokens around two places are the same."""
    if min(mine, theirs) < AGREEING:
        return False
    if mine + AGREEING > len(left.ids) or theirs + AGREEING > len(right.ids):
        return False
    # The bytes of one character may be several tokens that begin at the same place.
    if left.starts[mine] == left.starts[mine - 1]:
        return False
    one = slice(mine - AGREEING, mine + AGREEING)
    other = slice(theirs - AGREEING, theirs + AGREEING)
    same_ids = np.array_equal(left.ids[one], right.ids[other])
    return same_ids and np.array_equal(left.starts[one], right.starts[other])
