"""Tokenizing the pieces of a source in several processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megaconsa.console import progress
from megaconsa.data import tokenized
from megaconsa.data.bad_documents import BadDocuments
from megaconsa.data.document import Vocabulary
from megaconsa.data.documents import Layout, read_documents
from megaconsa.data.encoding import encode
from megaconsa.data.pieces import Piece
from megaconsa.data.tokenized import PieceWriter, TokenizedPiece
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.data.worker_process import die_with_parent
from megaconsa.errors import InputError, RunError

MIB = 1 << 20
COMMON = 0
UNKNOWN = 1
"""A token that stands for characters which the vocabulary cannot write."""
BYTE = 2
"""A token that is a single byte of a character that has several."""


@dataclass(frozen=True)
class Settings:
    """How documents are read."""

    layout: Layout
    skip_bad: int
    """How many bad documents are skipped, over all pieces."""


@dataclass(frozen=True)
class NamedPiece:
    """A tokenized piece and the name of its files."""

    source: str
    name: str
    counts: TokenizedPiece


def by_source(pieces: Sequence[NamedPiece]) -> dict[str, list[int]]:
    """The indices of the pieces of each source, in order."""
    found: dict[str, list[int]] = {}
    for index, piece in enumerate(pieces):
        found.setdefault(piece.source, []).append(index)
    return found


def tokenize(
    pieces: Sequence[Piece], folder: Path, tokenizer: Tokenizer, settings: Settings, workers: int
) -> list[NamedPiece]:
    """Tokenizes the pieces into a folder, and returns them in order.

    Pieces that the folder already has are kept. The others are removed.

    workers: number of processes. The result does not depend on it.

    Raises InputError for a piece that has a fault. Raises RunError where a process dies.
    """
    layout = settings.layout
    key = [tokenizer.fingerprint, tokenizer.end_of_text, *layout.fields, layout.separator]
    names = [piece.key(key) for piece in pieces]
    tokenized.remove_unfinished(folder, names)
    found = {name: tokenized.find(folder, name) for name in names}
    # Equal files have equal names. They are tokenized once.
    missing = {
        name: piece for name, piece in zip(names, pieces, strict=True) if found[name] is None
    }
    total = math.ceil(sum(piece.size for piece in missing.values()) / MIB)
    work = _Work(missing, settings, tokenizer, _rarity(tokenizer))
    with (
        progress("tokenizing", total, "MiB") as task,
        _single_threaded_tokenizers(),
        _Pool(work, workers) as pool,
    ):
        running = {pool.submit(folder, name): name for name in missing}
        for future in as_completed(running):
            name = running[future]
            found[name] = _result(future)
            task.advance(missing[name].size / MIB)
    named = []
    for piece, name in zip(pieces, names, strict=True):
        counts = found[name]
        assert counts is not None
        named.append(NamedPiece(piece.source, name, counts))
    _check_bad(named, settings.skip_bad)
    return named


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Context in which the tokenizers library starts no threads.

    Its threads do not survive a fork, so a forked process would wait for them for ever.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _result(future: Future[TokenizedPiece]) -> TokenizedPiece:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that tokenizes was killed, perhaps because memory ran out; "
            "give fewer --workers and run the same command: it continues"
        ) from error


def _check_bad(pieces: Sequence[NamedPiece], limit: int) -> None:
    """Raises InputError if there are more bad documents than the limit."""
    bad = sum(piece.counts.bad_documents for piece in pieces)
    if bad > limit:
        first = next(piece.counts.bad[0] for piece in pieces if piece.counts.bad)
        raise InputError(f"{bad} documents are bad, of at most {limit}; the first: {first}")


class _Pool:
    """The processes that tokenize."""

    def __init__(self, work: _Work, workers: int) -> None:
        processes = max(1, min(workers, len(work.pieces)))
        # Pieces that cannot be divided further may use the cores that are left.
        threads = max(1, workers // processes)
        self._others = set(multiprocessing.active_children())
        self._executor = ProcessPoolExecutor(
            processes,
            # A fork has everything imported. An import of transformers takes seconds.
            multiprocessing.get_context("fork"),
            _begin,
            (os.getpid(), replace(work, threads=threads)),
        )

    def __enter__(self) -> _Pool:
        return self

    def submit(self, folder: Path, name: str) -> Future[TokenizedPiece]:
        return self._executor.submit(_tokenize_piece, folder, name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # A piece may take minutes.
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
        self._executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Work:
    """What a process of the pool knows."""

    pieces: dict[str, Piece]
    """By name."""
    settings: Settings
    tokenizer: Tokenizer
    rarity: np.ndarray
    """What each id stands for (_rarity)."""
    threads: int = 1


def _rarity(tokenizer: Tokenizer) -> np.ndarray:
    """COMMON, UNKNOWN or BYTE for each id, (vocab_size,) uint8."""
    rarity = np.full(tokenizer.vocab_size, COMMON, np.uint8)
    rarity[tokenizer.byte_ids()] = BYTE
    if tokenizer.unknown_id is not None:
        rarity[tokenizer.unknown_id] = UNKNOWN
    return rarity


_work: _Work
"""Set in the processes of the pool."""


def _begin(parent: int, work: _Work) -> None:
    """Begins a process."""
    global _work
    die_with_parent(parent)
    # Ctrl-C reaches the parent, which ends its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work = work


def _tokenize_piece(folder: Path, name: str) -> TokenizedPiece:
    """Tokenizes one piece."""
    settings = _work.settings
    tokenizer = _work.tokenizer
    bad = BadDocuments(settings.skip_bad)
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text)
    documents = read_documents(_work.pieces[name].files, settings.layout, bad, vocabulary)
    writer = PieceWriter(folder, name, tokenizer.vocab_size)
    rare = np.zeros(3, np.int64)
    for document, ids, mask in encode(documents, tokenizer, _work.threads):
        writer.add(document.hash(), document.characters, ids, mask)
        rare += np.bincount(_work.rarity[ids], minlength=len(rare))
    return writer.finish(
        unknown_tokens=int(rare[UNKNOWN]),
        byte_tokens=int(rare[BYTE]),
        bad_documents=bad.count,
        bad=bad.first,
    )
