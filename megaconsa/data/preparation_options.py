"""How text becomes a data folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from megaconsa.data.dataset_info import Packing
from megaconsa.data.documents import Layout
from megaconsa.data.tokenization import default_workers
from megaconsa.errors import InputError


def packing_named(name: str) -> Packing:
    """The kind of packing of that name. Raises InputError where there is none."""
    for packing in get_args(Packing):
        if name == packing:
            return packing
    raise InputError(f"--packing {name}: choose one of {', '.join(get_args(Packing))}")


@dataclass(frozen=True)
class Options:
    """How the text becomes data."""

    sequence_length: int
    """In tokens."""
    validation_share: float = 0.02
    """Share of the documents in the validation split, in [0, 1)."""
    layout: Layout = field(default_factory=Layout)
    """Where the documents are in their files."""
    skip_bad: int = 0
    """Number of documents that may be skipped because they cannot be read."""
    packing: Packing = "cut"
    similarity: float | None = None
    """The least similarity of near duplicates, in (0, 1]. None: they are not looked for."""
    drop_duplicates: bool = False
    """Whether exact duplicates within a source, and near ones if looked for, are left out."""
    workers: int = field(default_factory=default_workers)
    """Number of processes. The data do not depend on it."""

    def check(self) -> None:
        """Raises InputError for an option that cannot work."""
        if self.sequence_length < 1:
            raise InputError(
                f"--sequence-length {self.sequence_length} is not positive, "
                "give the number of tokens a sequence, such as 512"
            )
        if not 0 <= self.validation_share < 1:
            raise InputError(
                f"--validation-share {self.validation_share} is outside [0, 1), "
                "give a share such as 0.02"
            )
        if self.layout.separator == "":
            raise InputError("--separator is empty, give the text between two documents")
        if self.layout.prompt == self.layout.field:
            raise InputError(
                f"--prompt-field {self.layout.prompt} is the field of the documents too, "
                "name the field of what stands before them"
            )
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise InputError(
                f"--near-duplicates {self.similarity} is outside (0, 1], "
                "give a similarity such as 0.8"
            )
        if self.workers < 1:
            raise InputError(f"--workers {self.workers} is not positive, give 1 or more")
