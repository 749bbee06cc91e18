"""What several test modules share: cases, slow references, and processes that train."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the repository."""
