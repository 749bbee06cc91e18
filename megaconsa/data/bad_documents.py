"""Documents that cannot be read: what is wrong with them, and how many are skipped."""

from __future__ import annotations

from dataclasses import dataclass, field

from megaconsa.errors import InputError

NAMED = 3
"""How many bad documents are named."""
OPTIONS = ("--field", "--prompt-field")
"""The options that name the fields of a document, in the order of the fields."""


@dataclass
class BadDocuments:
    """Counts the documents that cannot be read, and refuses more than the user allows."""

    limit: int = 0
    """How many of them are skipped."""
    count: int = 0
    first: list[str] = field(default_factory=list)
    """What is wrong with the first few, each with its file and place."""

    def add(self, fault: str) -> None:
        """Counts a bad document. Raises InputError if it is one too many."""
        self.count += 1
        if self.count > self.limit:
            if self.limit:
                fault += f"; it is the bad document number {self.count} of at most {self.limit}"
            raise InputError(fault)
        if len(self.first) < NAMED:
            self.first.append(fault)


def fault_of_text(text: object, place: str) -> str | None:
    """What is wrong with a value that should be a text, or None. place: names it."""
    if not isinstance(text, str):
        return f"{place} is {type(text).__name__}, make it a string"
    try:
        # JSON can spell half a surrogate pair, which UTF-8 cannot hold.
        text.encode()
    except UnicodeEncodeError:
        return f"{place} has half a surrogate pair, fix it"
    return None
