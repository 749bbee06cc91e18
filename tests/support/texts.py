"""The texts of documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megaconsa.data.documents import read_documents
from megaconsa.data.sources import SourceFile


def read_texts(files: Iterable[SourceFile], *options: Any, **named: Any) -> list[str]:
    """The text of each document. The options are those of `read_documents`."""
    return [document.text for document in read_documents(files, *options, **named)]
