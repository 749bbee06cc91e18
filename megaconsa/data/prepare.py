"""Preparation of a data folder: tokenize the text, then pack and write both splits."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from megaconsa.console import console, progress
from megaconsa.data import PIECES, TOKENIZER, tokenized
from megaconsa.data.bad_documents import BadDocuments
from megaconsa.data.dataset_info import (
    INFO,
    TRAIN,
    VALIDATION,
    DatasetInfo,
    SourceInfo,
    SplitInfo,
)
from megaconsa.data.document import Document
from megaconsa.data.documents import has_fields, holds_ids, read_documents
from megaconsa.data.duplicates import UNIQUE, find_duplicates
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.folder_lock import finish, preparation
from megaconsa.data.pieces import Piece, cut, identity
from megaconsa.data.preparation_options import Options
from megaconsa.data.sources import SourceFiles, find_files
from megaconsa.data.split_documents import SplitDocuments, in_validation
from megaconsa.data.statistics import source_statistics
from megaconsa.data.tokenization import NamedPiece, Settings, tokenize
from megaconsa.data.tokenizer import Tokenizer, train_sentencepiece
from megaconsa.errors import InputError, RunError

TRAINING_CHARACTERS = 20_000_000
"""Size of the text that a tokenizer is trained on."""
TRAINING_BYTES = 200 << 20
"""About how many bytes of files that text is drawn from."""
NAMED_FILES = 5
"""How many skipped files are named."""


def prepare(
    sources: Sequence[str],
    out: Path,
    options: Options,
    *,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
) -> DatasetInfo:
    """Makes the data folder `out` from the sources and returns its description.

    sources: `python`, files or folders, on a disk or in an object store.
    tokenizer: a tokenizer's folder. Give either this or `train_tokenizer`.
    train_tokenizer: the vocabulary size of a tokenizer to train.

    The hash of its content assigns a document to a split, so equal documents are in the same split.
    A finished folder of the same files and settings is left unchanged. Raises InputError for
    everything that cannot work.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise InputError(
            "the tokenizer is not settled, "
            "give one of --tokenizer FOLDER and --train-tokenizer VOCAB"
        )
    options.check()
    found = find_files(sources)
    skipped = [f"{file.path}: {file.reason}" for file in found.skipped[:NAMED_FILES]]
    _say("files that are not read", len(found.skipped), skipped)
    given = Tokenizer.load(tokenizer) if tokenizer else None
    if train_tokenizer:
        _refuse_ids(found, options)
    if options.layout.prompt is not None:
        _refuse_without_fields(found, options)
    source = _describe(sources, found, options, train_tokenizer)
    if (out / INFO).is_file():
        return _same(out, DatasetInfo.load(out), source, options, given)

    pieces = list(cut(found.files))
    try:
        # A single piece is soon tokenized again.
        with preparation(out, keeps_pieces=len(pieces) > 1):
            if given:
                given.copy(out / TOKENIZER)
            else:
                assert train_tokenizer is not None
                sample = _training_sample(pieces, options)
                with progress("training the tokenizer", train_tokenizer, "tokens") as task:
                    train_sentencepiece(sample, out / TOKENIZER, train_tokenizer, task.advance)
            used = given or Tokenizer.load(out / TOKENIZER)
            (out / PIECES).mkdir(exist_ok=True)
            settings = Settings(options.layout, options.skip_bad)
            named = tokenize(pieces, out / PIECES, used, settings, options.workers)
            info = _pack(out, named, used, source, options)
            finish(out, info)
    except OSError as error:
        raise RunError(
            f"{error.filename or out}: cannot be written ({error.strerror}), make room or give "
            "another --out and run the command again"
        ) from error
    return info


def _refuse_ids(found: SourceFiles, options: Options) -> None:
    """Raises InputError for a file of ids, which are of one certain tokenizer."""
    for file in found.files:
        if holds_ids(file, options.layout):
            raise InputError(
                f"{file.path}: its documents are ids already, "
                "give the tokenizer that they are from with --tokenizer"
            )


def _refuse_without_fields(found: SourceFiles, options: Options) -> None:
    """Raises InputError for a file whose documents can have no prompt beside them."""
    for file in found.files:
        if not has_fields(file, options.layout):
            raise InputError(
                f"{file.path}: its documents have no fields, so --prompt-field "
                f"{options.layout.prompt} is not there; prepare it alone and mix both folders"
            )


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


def _describe(
    sources: Sequence[str], found: SourceFiles, options: Options, trained: int | None
) -> SourceInfo:
    """What was asked for. The counts are those of a preparation that has not begun.

    trained: the vocabulary size of a tokenizer to train, or None.
    """
    files = [identity(file) for file in found.files]
    return SourceInfo(
        names=list(sources),
        files=xxhash.xxh3_128_hexdigest(json.dumps(files).encode()),
        digest="",
        documents=0,
        characters=0,
        validation_share=options.validation_share,
        trained_vocabulary=trained,
        field=options.layout.field,
        prompt_field=options.layout.prompt,
        separator=options.layout.separator,
        similarity=options.similarity,
        drop_duplicates=options.drop_duplicates,
    )


def _same(
    out: Path, info: DatasetInfo, source: SourceInfo, options: Options, given: Tokenizer | None
) -> DatasetInfo:
    """Returns the finished folder's description if the folder is what was asked for.

    out: the folder.
    info: its description.
    source, options, given: what was asked for. `given` is the tokenizer, or None where one is to be
        trained.

    Raises InputError, which says how they differ, if not.
    """
    there = info.source
    pairs: dict[str, tuple[object, object]] = {
        "--sequence-length": (info.sequence_length, options.sequence_length),
        "--packing": (info.packing, options.packing),
        "--validation-share": (there.validation_share, source.validation_share),
        "--field": (there.field, source.field),
        "--prompt-field": (there.prompt_field, source.prompt_field),
        "--separator": (there.separator, source.separator),
        "--near-duplicates": (there.similarity, source.similarity),
        "--drop-duplicates": (there.drop_duplicates, source.drop_duplicates),
    }
    if given:
        if not same_tokenizer(info.tokenizer_fingerprint, given.fingerprint):
            pairs["--tokenizer (fingerprint)"] = (info.tokenizer_fingerprint, given.fingerprint)
    else:
        pairs["--train-tokenizer"] = (there.trained_vocabulary, source.trained_vocabulary)
    different = []
    for name, (old, new) in pairs.items():
        if old != new:
            different.append(f"{name} is {old} there and {new} here")
    if there.files != source.files:
        different.append("the source files are others, or have changed")
    if different:
        raise InputError(
            f"--out {out}: it holds other data ({'; '.join(different)}), name another folder"
        )
    console.print(f"{out} already holds this data; nothing to do", markup=False)
    return info


def _training_sample(pieces: Sequence[Piece], options: Options) -> list[str]:
    """Training documents of about TRAINING_CHARACTERS in all, in order, to train a tokenizer on.

    They are those with the smallest hashes of some evenly spaced pieces. So they are drawn evenly
    from what is read, in one pass and with bounded memory.
    """
    size = sum(piece.size for piece in pieces)
    stride = max(1, size // TRAINING_BYTES)
    bad = BadDocuments(options.skip_bad)
    # Largest hash first.
    kept: list[tuple[int, int, Document]] = []
    characters = 0
    number = 0
    with progress("reading", None, "documents") as task:
        for piece in pieces[::stride]:
            for document in read_documents(piece.files, options.layout, bad):
                task.advance()
                number += 1
                if in_validation(document, options.validation_share):
                    continue
                # The seed makes it another hash than the one that chooses the split.
                heapq.heappush(kept, (-document.hash(seed=1), number, document))
                characters += document.characters
                while characters > TRAINING_CHARACTERS and len(kept) > 1:
                    characters -= heapq.heappop(kept)[2].characters
    chosen = [document for _, _, document in sorted(kept, key=lambda entry: entry[1])]
    return [text for document in chosen for text in document.texts]


def _pack(
    out: Path,
    pieces: Sequence[NamedPiece],
    tokenizer: Tokenizer,
    source: SourceInfo,
    options: Options,
) -> DatasetInfo:
    """Writes both splits from the tokenized pieces.

    Raises InputError where a split has no documents, or less than one sequence.
    """
    folder = out / PIECES
    bad = [line for piece in pieces for line in piece.counts.bad]
    _say("bad documents skipped", sum(piece.counts.bad_documents for piece in pieces), bad[:3])
    kinds = find_duplicates(pieces, folder, tokenizer.vocab_size, options.similarity)
    digest = xxhash.xxh3_128()
    characters = 0
    dropped = 0
    for piece, kind in zip(pieces, kinds, strict=True):
        documents = tokenized.documents(folder, piece.name)
        digest.update(documents[["hash", "characters"]].tobytes())
        characters += int(documents["characters"].sum(dtype=np.int64))
        if options.drop_duplicates:
            dropped += int((kind != UNIQUE).sum())
    # Imports torch, so it comes after what is most often refused.
    from megaconsa.data.shards import write_split

    counts = np.zeros(tokenizer.vocab_size, np.int64)
    splits = {}
    for split in [TRAIN, VALIDATION] if options.validation_share else [TRAIN]:
        text = SplitDocuments(split, folder, pieces, kinds, tokenizer, options)
        if not text.documents:
            raise InputError(
                f"none of the {sum(piece.counts.documents for piece in pieces)} documents falls "
                f"into the {split} split, "
                "give more text or change --validation-share (0 for no validation split)"
            )
        sequences, split_counts = write_split(
            out,
            split,
            text.sequences(),
            tokenizer.vocab_size,
            options.sequence_length,
            masked=text.masked,
        )
        if not sequences:
            option = "--validation-share" if split == VALIDATION else "more text"
            raise InputError(
                f"the {split} split has less than one sequence of {options.sequence_length} "
                f"tokens, raise {option}"
            )
        split_counts[tokenizer.end_of_text] -= text.filling
        if not split_counts.any():
            raise InputError(
                f"no token of the {split} split is to be predicted, change the masks or the prompts"
            )
        counts += split_counts
        splits[split] = SplitInfo(
            sequences=sequences, tokens=int(split_counts.sum()), documents=text.documents
        )
    return DatasetInfo(
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_of_text=tokenizer.end_of_text,
        sequence_length=options.sequence_length,
        unigram_entropy=_entropy(counts),
        packing=options.packing,
        loss_mask=any(piece.counts.masked for piece in pieces),
        splits=splits,
        source=source.model_copy(
            update={
                "digest": digest.hexdigest(),
                "documents": sum(piece.counts.documents for piece in pieces),
                "bad_documents": sum(piece.counts.bad_documents for piece in pieces),
                "dropped_documents": dropped,
                "characters": characters,
            }
        ),
        sources=source_statistics(
            pieces,
            kinds,
            folder,
            near_duplicates_counted=options.similarity is not None,
        ),
    )


def _entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution that the counts give, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
