"""What both kinds of shards have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from megaconsa.errors import DataError

logger = logging.getLogger(__name__)

HASH = "xxh3_64"
COLUMN = "tokens"
LOSS_MASK = "loss_mask"
"""The column, in folders that have it, that says which ids are to be predicted.

Its name sorts before the others, as in the file.
"""

Result = TypeVar("Result")


def twice(read: Callable[..., Result], *arguments: Any) -> Result:
    """Calls `read`, and once more if it finds damage. Returns its result.

    Memory and networks flip bits too, and a second read then finds none. Raises DataError where the
    second read finds damage as well.
    """
    try:
        return read(*arguments)
    except DataError as error:
        return again(error, read, *arguments)


def again(error: DataError, read: Callable[..., Result], *arguments: Any) -> Result:
    """Calls `read` and returns its result, after a read that found damage.

    error: what the first read raised.
    """
    logger.warning("%s; reading it again", error)
    return read(*arguments)
