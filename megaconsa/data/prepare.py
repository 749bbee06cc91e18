"""Preparation of a data folder: scan the text, make the tokenizer, pack and write both splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from megaconsa.console import Task, console, progress
from megaconsa.data import TOKENIZER
from megaconsa.data.dataset_info import (
    INFO,
    TRAIN,
    VALIDATION,
    DatasetInfo,
    SourceInfo,
    SplitInfo,
)
from megaconsa.data.documents import BadDocuments, Layout, read_documents
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.folder_lock import finish, preparation
from megaconsa.data.packing import pack
from megaconsa.data.shards import write_split
from megaconsa.data.sources import SourceFile, find_files
from megaconsa.data.tokenizer import Tokenizer, train_sentencepiece
from megaconsa.errors import InputError

TRAINING_CHARACTERS = 20_000_000
"""Approximate size of the text that a tokenizer is trained on.

Its documents are spread evenly over the whole text.
"""
BATCH_CHARACTERS = 1_000_000
"""Characters of text that are tokenized at a time."""
NAMED_FILES = 5
"""How many skipped files are named."""


@dataclass(frozen=True)
class Text:
    """The text of all sources. It can be read several times."""

    names: list[str]
    """The sources as they were given."""
    files: list[SourceFile]
    layout: Layout
    skip_bad: int
    """How many bad documents are skipped."""
    validation_share: float

    def documents(self, bad: BadDocuments | None = None) -> Iterator[str]:
        """All documents.

        bad: counts the bad ones.
        """
        bad = bad or BadDocuments(self.skip_bad)
        return read_documents(self.files, self.layout, bad)

    def split(self, split: str) -> Iterator[str]:
        """The documents of one split."""
        for document in self.documents():
            if in_validation(document, self.validation_share) == (split == VALIDATION):
                yield document


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    sequence_length: int,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    validation_share: float = 0.02,
    layout: Layout | None = None,
    skip_bad: int = 0,
) -> DatasetInfo:
    """Makes the data folder `out` from the sources and returns its description.

    sources: `python`, files or folders.
    sequence_length: in tokens.
    tokenizer: a tokenizer's folder. Give either this or `train_tokenizer`.
    train_tokenizer: the vocabulary size of a tokenizer to train.
    validation_share: share of the documents in the validation split, in [0, 1).
    layout: where the documents are in their files.
    skip_bad: number of documents that may be skipped because they cannot be read.

    The hash of its content assigns a document to a split, so equal documents are in the same split.
    A finished folder with the same source and settings is left unchanged. Raises InputError for
    everything that cannot work. Nothing is left behind then.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise InputError(
            "the tokenizer is not settled, "
            "give one of --tokenizer FOLDER and --train-tokenizer VOCAB"
        )
    if sequence_length < 1:
        raise InputError(
            f"--sequence-length {sequence_length} is not positive, "
            "give the number of tokens a sequence, such as 512"
        )
    if not 0 <= validation_share < 1:
        raise InputError(
            f"--validation-share {validation_share} is outside [0, 1), give a share such as 0.02"
        )
    if layout and layout.separator == "":
        raise InputError("--separator is empty, give the text between two documents")
    found = find_files(sources)
    skipped = [f"{file.path}: {file.reason}" for file in found.skipped[:NAMED_FILES]]
    _say("files that are not read", len(found.skipped), skipped)
    text = Text(list(sources), found.files, layout or Layout(), skip_bad, validation_share)
    given = Tokenizer.load(tokenizer) if tokenizer else None
    source, documents = _scan(text, train_tokenizer)
    if (out / INFO).is_file():
        return _same(out, DatasetInfo.load(out), source, sequence_length, given)

    with preparation(out):
        if given:
            given.copy(out / TOKENIZER)
        else:
            assert train_tokenizer is not None
            # Train on every stride-th document.
            stride = max(1, round(source.characters / TRAINING_CHARACTERS))
            with progress("training the tokenizer", None, "documents") as task:
                sample = islice(text.split(TRAIN), 0, None, stride)
                train_sentencepiece(_counted(sample, task), out / TOKENIZER, train_tokenizer)
        used = Tokenizer.load(out / TOKENIZER)
        counts = np.zeros(used.vocab_size, np.int64)
        splits = {}
        for split in documents:
            with progress(f"packing {split}", documents[split], "documents") as task:
                texts = _counted(text.split(split), task)
                ids = _encode(texts, used)
                sequences = pack(ids, sequence_length, used.end_of_text)
                split_counts = write_split(out, split, sequences, used.vocab_size, sequence_length)
            tokens = int(split_counts.sum())
            if not tokens:
                option = "--validation-share" if split == VALIDATION else "more text"
                raise InputError(
                    f"the {split} split has less than one sequence of {sequence_length} tokens, "
                    f"raise {option}"
                )
            counts += split_counts
            splits[split] = SplitInfo(
                sequences=tokens // sequence_length, tokens=tokens, documents=documents[split]
            )
        info = DatasetInfo(
            vocab_size=used.vocab_size,
            tokenizer_fingerprint=used.fingerprint,
            end_of_text=used.end_of_text,
            sequence_length=sequence_length,
            unigram_entropy=_entropy(counts),
            splits=splits,
            source=source,
        )
        finish(out, info)
    return info


def in_validation(document: str, share: float) -> bool:
    """Whether a document is held out. The result depends on its content and the share alone."""
    return xxhash.xxh3_64_intdigest(document.encode()) < share * 2**64


def _say(title: str, count: int, lines: Sequence[str]) -> None:
    """Prints what was left out.

    title: says what it is.
    count: how many there are.
    lines: the first few.
    """
    if not count:
        return
    console.print(f"{title}: {count}", markup=False)
    for line in lines:
        console.print(f"  {line}", markup=False)
    if count > len(lines):
        console.print(f"  and {count - len(lines)} more", markup=False)


def _scan(text: Text, trained: int | None) -> tuple[SourceInfo, dict[str, int]]:
    """Reads all text once, so that unreadable text is refused before anything is written.

    trained: the vocabulary size of a tokenizer to train, or None.

    Returns the description of the source and the number of documents in each split. Raises
    InputError where a split has no documents.
    """
    documents = {TRAIN: 0}
    if text.validation_share != 0:
        documents[VALIDATION] = 0
    characters = 0
    bad = BadDocuments(text.skip_bad)
    digest = xxhash.xxh3_128()
    with progress("reading", None, "documents") as task:
        for document in _counted(text.documents(bad), task):
            split = VALIDATION if in_validation(document, text.validation_share) else TRAIN
            documents[split] += 1
            characters += len(document)
            content = document.encode()
            # The length comes first, so that the borders between documents count too.
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    _say("bad documents skipped", bad.count, bad.first)
    for split, count in documents.items():
        if not count:
            raise InputError(
                f"none of the {sum(documents.values())} documents falls into the {split} split, "
                "give more text or change --validation-share (0 for no validation split)"
            )
    source = SourceInfo(
        names=text.names,
        digest=digest.hexdigest(),
        documents=sum(documents.values()),
        bad_documents=bad.count,
        characters=characters,
        validation_share=text.validation_share,
        trained_vocabulary=trained,
    )
    return source, documents


def _same(
    out: Path, info: DatasetInfo, source: SourceInfo, sequence_length: int, given: Tokenizer | None
) -> DatasetInfo:
    """Returns the finished folder's description if the folder is what was asked for.

    out: the folder.
    info: its description.
    source, sequence_length, given: what was asked for. `given` is the tokenizer, or None where one
        is to be trained.

    Raises InputError, which says how they differ, if not.
    """
    pairs: dict[str, tuple[object, object]] = {
        "--sequence-length": (info.sequence_length, sequence_length),
        "--validation-share": (info.source.validation_share, source.validation_share),
        "source (hash of all text)": (info.source.digest, source.digest),
    }
    if given:
        if not same_tokenizer(info.tokenizer_fingerprint, given.fingerprint):
            pairs["--tokenizer (fingerprint)"] = (info.tokenizer_fingerprint, given.fingerprint)
    else:
        pairs["--train-tokenizer"] = (info.source.trained_vocabulary, source.trained_vocabulary)
    different = []
    for name, (old, new) in pairs.items():
        if old != new:
            different.append(f"{name} is {old} there and {new} here")
    if different:
        raise InputError(
            f"--out {out}: it holds other data ({'; '.join(different)}), name another folder"
        )
    console.print(f"{out} already holds this data; nothing to do", markup=False)
    return info


def _counted(documents: Iterable[str], task: Task) -> Iterator[str]:
    """The documents. Advances the task by one for each."""
    for document in documents:
        yield document
        task.advance()


def _encode(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each document, in order, tokenized a batch at a time."""
    batch: list[str] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document)
        if held >= BATCH_CHARACTERS:
            yield from tokenizer.encode_batch(batch)
            batch = []
            held = 0
    yield from tokenizer.encode_batch(batch)


def _entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution that the counts give, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
