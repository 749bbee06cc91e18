"""Preparing a data folder: scan the text, settle the tokenizer, pack and write both splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from megaconsa.console import Task, console, progress
from megaconsa.data import TOKENIZER
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.packing import pack
from megaconsa.data.shards import (
    INFO,
    TRAIN,
    VALIDATION,
    DatasetInfo,
    SourceInfo,
    SplitInfo,
    finish,
    preparation,
    write_split,
)
from megaconsa.data.text import find_files, read_documents
from megaconsa.data.tokenizer import Tokenizer, train_sentencepiece
from megaconsa.errors import InputError

TRAINING_CHARACTERS = 20_000_000
"""A tokenizer is trained on documents spread evenly over the text, about this many characters of them."""
BATCH_CHARACTERS = 1_000_000
"""Text tokenized at a time."""


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    sequence_length: int,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    validation_share: float = 0.02,
) -> DatasetInfo:
    """Makes the data folder `out` from the sources and returns its description.

    Either `tokenizer` names a folder or `train_tokenizer` a vocabulary size. A document belongs to validation by the hash of its
    content, so that equal documents fall on the same side. A finished folder with the same source and settings is left as it
    is. InputError for all that cannot work; then nothing is left behind.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise InputError(
            "the tokenizer is not settled, give one of --tokenizer FOLDER and --train-tokenizer VOCAB"
        )
    if sequence_length < 1:
        raise InputError(
            f"--sequence-length {sequence_length} is not positive, give the number of tokens a sequence, such as 512"
        )
    if not 0 <= validation_share < 1:
        raise InputError(
            f"--validation-share {validation_share} is outside [0, 1), give a share such as 0.02"
        )
    files = find_files(sources)
    given = Tokenizer.load(tokenizer) if tokenizer else None
    source, documents = _scan(sources, files, validation_share, train_tokenizer)
    if (out / INFO).is_file():
        return _same(out, DatasetInfo.load(out), source, sequence_length, given)

    with preparation(out):
        if given:
            given.copy(out / TOKENIZER)
        else:
            assert train_tokenizer is not None
            stride = max(1, round(source.characters / TRAINING_CHARACTERS))
            with progress("training the tokenizer", None, "documents") as task:
                sample = islice(_split_documents(files, TRAIN, validation_share), 0, None, stride)
                train_sentencepiece(_counted(sample, task), out / TOKENIZER, train_tokenizer)
        used = Tokenizer.load(out / TOKENIZER)
        counts = np.zeros(used.vocab_size, np.int64)
        splits = {}
        for split in documents:
            with progress(f"packing {split}", documents[split], "documents") as task:
                ids = _encode(
                    _counted(_split_documents(files, split, validation_share), task), used
                )
                sequences = pack(ids, sequence_length, used.end_of_text)
                split_counts = write_split(out, split, sequences, used.vocab_size, sequence_length)
            tokens = int(split_counts.sum())
            if not tokens:
                option = "--validation-share" if split == VALIDATION else "more text"
                raise InputError(
                    f"the {split} split has less than one sequence of {sequence_length} tokens, raise {option}"
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
    """Whether a document is held out: a function of its content and the share alone."""
    return xxhash.xxh3_64_intdigest(document.encode()) < share * 2**64


def _scan(
    sources: Sequence[str], files: list[Path], validation_share: float, trained: int | None
) -> tuple[SourceInfo, dict[str, int]]:
    """Reads all text once: its description, and the number of documents a split. Refuses unreadable text before any writing."""
    documents = {TRAIN: 0} if validation_share == 0 else {TRAIN: 0, VALIDATION: 0}
    characters, digest = 0, xxhash.xxh3_128()
    with progress("reading", None, "documents") as task:
        for document in _counted(read_documents(files), task):
            documents[VALIDATION if in_validation(document, validation_share) else TRAIN] += 1
            characters += len(document)
            content = document.encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    for split, count in documents.items():
        if not count:
            mend = "give more text or change --validation-share (0 for no validation split)"
            raise InputError(
                f"none of the {sum(documents.values())} documents falls into the {split} split, {mend}"
            )
    source = SourceInfo(
        names=list(sources),
        digest=digest.hexdigest(),
        documents=sum(documents.values()),
        characters=characters,
        validation_share=validation_share,
        trained_vocabulary=trained,
    )
    return source, documents


def _same(
    out: Path, info: DatasetInfo, source: SourceInfo, sequence_length: int, given: Tokenizer | None
) -> DatasetInfo:
    """The finished folder's description if it is what was asked for; InputError with the difference if not."""
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
    different = [
        f"{name} is {old} there and {new} here" for name, (old, new) in pairs.items() if old != new
    ]
    if different:
        raise InputError(
            f"--out {out}: it holds other data ({'; '.join(different)}), name another folder"
        )
    console.print(f"{out} already holds this data; nothing to do", markup=False)
    return info


def _split_documents(files: list[Path], split: str, validation_share: float) -> Iterator[str]:
    return (
        document
        for document in read_documents(files)
        if in_validation(document, validation_share) == (split == VALIDATION)
    )


def _counted(documents: Iterable[str], task: Task) -> Iterator[str]:
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
            batch, held = [], 0
    yield from tokenizer.encode_batch(batch)


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
