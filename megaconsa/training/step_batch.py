"""What a step of a run trains on: its sequences, where they are stored, and their documents.

It reads the run folder and the data, and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.config import Config, load, with_defaults
from megaconsa.data.dataset_info import TRAIN, DatasetInfo
from megaconsa.data.mixture_file import read_info, tokenizer_folder
from megaconsa.data.packing import document_starts
from megaconsa.data.stream import BatchStream
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError
from megaconsa.remote_path import is_remote, with_address
from megaconsa.reporting.metrics import Row, read_metrics
from megaconsa.training.callbacks.rewinds import read_rewinds, rewound
from megaconsa.training.early_checks import check_run_folder
from megaconsa.training.inputs import describe_data, same_data

CHARACTERS = 256
"""Length of a document's beginning."""


@dataclass(frozen=True)
class Document:
    """A document, or the part of it that lies in a sequence."""

    position: int
    """Index of its first token in the sequence.

    With the packing `cut`, the one at 0 usually continues a document of another sequence."""
    tokens: int
    """Its tokens in the sequence, end-of-text included."""
    text: str
    """Its first CHARACTERS characters here, without end-of-text."""


@dataclass(frozen=True)
class Sequence:
    place: int
    """Index in the step's global batch."""
    id: int
    """Index in the training split."""
    file: str
    """The shard that holds it, relative to the data folder."""
    row: int
    """Index in that shard."""
    documents: list[Document]


@dataclass(frozen=True)
class StepBatch:
    """The global batch of a step."""

    run: str
    step: int
    data: str
    """The data folder."""
    first: int
    """Place of its first sequence in the data order."""
    global_batch: int
    """Number of sequences in the step."""
    sequences: list[Sequence]
    """The first of them."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know to trust the rest, one sentence each."""


def step_batch(run: Path, step: int, data: Path | None, count: int) -> StepBatch:
    """Finds the global batch of a step and reads its first sequences.

    run: a run folder. It may be training.
    step: from 1, as in the metrics. It need not have been trained.
    data: the run's data, if they are not where its configuration says.
    count: the number of sequences to read.

    Raises InputError for a step that the run does not have, whose place is not known, or whose data
    are missing or another run's. Raises DataError if the data are damaged.
    """
    config = _config(run)
    steps = config.training.steps
    if step < 1:
        raise InputError(f"step {step} is below 1; steps count from 1, as in metrics.jsonl")
    if step > steps:
        raise InputError(
            f"step {step} is past the end of {run}; give one up to training.steps={steps}"
        )
    checkpoint = _newest_checkpoint(run)
    folder = _checked_data(run, config, data, checkpoint)
    path = run / run_folder.METRICS
    rows = {row["step"]: row for row in read_metrics(path)} if path.exists() else {}
    first = _first_place(run, config, step, rows, checkpoint)
    global_batch = config.training.global_batch
    stream = BatchStream(
        folder,
        TRAIN,
        seed=config.run.seed,
        global_batch=global_batch,
        micro_batch=global_batch,
        shuffle_shards=config.data.shuffle_shards or 0,
        cache=config.data.cache_settings,
    )
    ids = stream.ids(first + np.arange(min(count, global_batch)))
    return StepBatch(
        run=str(run),
        step=step,
        data=str(folder),
        first=first,
        global_batch=global_batch,
        sequences=_sequences(stream, ids),
        notes=_notes(run, step, rows),
    )


def _config(run: Path) -> Config:
    check_run_folder(run)
    return load(run / run_folder.CONFIG)


def _newest_checkpoint(run: Path) -> Checkpoint | None:
    """The run's newest checkpoint whose state can be read, or None."""
    for path in store.committed(run):
        try:
            return store.read(path)
        except InputError:
            continue  # It was removed just now, or is damaged.
    return None


def _checked_data(
    run: Path, config: Config, data: Path | None, checkpoint: Checkpoint | None
) -> Path:
    """The folder of the run's data. Raises InputError if it is missing or holds other data."""
    folder = with_address(data or config.data.path)
    if not is_remote(folder) and not folder.is_dir():
        named = f"--data {data}" if data else f"data.path={folder} of {run}"
        raise InputError(f"{named} is not there; give the folder of the run's data with --data")
    info = read_info(folder, config.data.cache_settings)
    is_same = info.sequence_length == config.training.sequence_length
    if checkpoint is not None:
        theirs = with_defaults(checkpoint.state["data"], DatasetInfo)
        is_same = same_data(theirs, with_defaults(describe_data(info), DatasetInfo))
    if not is_same:
        raise InputError(
            f"data {folder} are not those of {run}; give the folder of the run's data with --data"
        )
    return folder


def _first_place(
    run: Path, config: Config, step: int, rows: dict[int, Row], checkpoint: Checkpoint | None
) -> int:
    """The place in the data order at which a step begins.

    rows: the metrics by step.

    Raises InputError if nothing in the run folder says where it is.
    """
    batch = config.training.global_batch
    row = rows.get(step, {})
    if "sequences" in row:
        return int(row["sequences"]) - batch
    # Earlier versions did not record the place. Steps to come have no row either.
    base_step, base_place = _known_place(run, config, rows, checkpoint)
    if step > base_step:
        base_place, _ = rewound(run, base_step, base_place)
    elif read_rewinds(run):
        raise InputError(
            f"nothing says where step {step} of {run} lies in the data: the run went back after "
            f"spikes, and its row has no field sequences; give a step after {base_step}"
        )
    return base_place + (step - 1 - base_step) * batch


def _known_place(
    run: Path, config: Config, rows: dict[int, Row], checkpoint: Checkpoint | None
) -> tuple[int, int]:
    """Steps done, and sequences taken by then, at the point from which the run would resume."""
    if checkpoint is not None:
        return checkpoint.step, int(checkpoint.state["sequences"])
    if config.model.init_from is None:
        return 0, 0
    # The run continues the data order of another, or does not. Its first row tells.
    first_row = rows.get(1, {})
    if "sequences" not in first_row:
        raise InputError(
            f"nothing says where {run} begins in the data: it starts from "
            f"model.init_from={config.model.init_from} and has no step or checkpoint yet; "
            "train its first step"
        )
    return 0, int(first_row["sequences"]) - config.training.global_batch


def _notes(run: Path, step: int, rows: dict[int, Row]) -> list[str]:
    notes = []
    if step not in rows:
        newest = max(rows, default=0)
        notes.append(
            f"step {step} is not trained yet (the newest is {newest}): this is its batch unless "
            "the run goes back after a spike"
        )
    if rewinds := read_rewinds(run):
        spikes = ", ".join(str(entry["step"]) for entry in rewinds)
        notes.append(
            f"the run went back after spikes in steps {spikes} and passed over the batches up to "
            "them: a step that was trained twice shows its newest batch"
        )
    return notes


def _sequences(stream: BatchStream, ids: np.ndarray) -> list[Sequence]:
    """Reads sequences.

    ids: (B,) indices in the split.
    """
    tokenizer = Tokenizer.load(tokenizer_folder(stream.path))
    # The last id of a row is only a label.
    tokens = stream.shards.rows(ids)[:, :-1]
    starts = document_starts(tokens, stream.info.end_of_text)
    found = []
    for place, index in enumerate(ids):
        file, row = stream.shards.locate(int(index))
        documents = _documents(tokens[place], starts[place], tokenizer)
        # The folders of a mixture may be anywhere.
        name = str(file.relative_to(stream.path) if stream.path.is_dir() else file)
        found.append(Sequence(place, int(index), name, row, documents))
    return found


def _documents(tokens: np.ndarray, starts: np.ndarray, tokenizer: Tokenizer) -> list[Document]:
    """The documents of a sequence.

    An end-of-text token alone is none: it fills the sequence up, or ends a document of another one.

    tokens: (S,) ids.
    starts: (S,) index at which each position's document begins.
    """
    positions, counts = np.unique(starts, return_counts=True)
    found = []
    for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
        # A token has at least one character, with few exceptions.
        beginning = tokens[position : position + min(count, CHARACTERS)]
        beginning = beginning[beginning != tokenizer.end_of_text]
        if not len(beginning):
            continue
        text = tokenizer.decode(beginning)
        found.append(Document(position, count, text[:CHARACTERS]))
    return found
