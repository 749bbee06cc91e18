"""What both kinds of shards have in common."""

from __future__ import annotations

HASH = "xxh3_64"
COLUMN = "tokens"
