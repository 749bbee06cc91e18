"""evaluation.json: what was measured on which models, and with which settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megaconsa.errors import InputError
from megaconsa.files import replace_text

FILE = "evaluation.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSettings(_Record):
    folder: str
    digest: str
    """Of dataset.json, by which the data is known wherever it lies."""


class PerplexitySettings(_Record):
    length: int
    documents: int


class NeedleSettings(_Record):
    lengths: list[int]
    depths: list[float]
    needles: int
    """Examples of each length and depth."""
    seed: int


class HarnessSettings(_Record):
    tasks: list[str]
    task_files: str
    """Digest of the task folder: names, sizes, times; empty for lm-eval's own tasks."""
    lm_eval: str
    """Version of the library."""


class Settings(_Record):
    data: DataSettings
    dtype: str
    perplexity: PerplexitySettings | None = None
    needle: NeedleSettings | None = None
    harness: HarnessSettings | None = None


class Overall(_Record):
    """Of all positions together."""

    tokens: int
    loss: float
    standard_error: float | None
    perplexity: float


class Perplexity(_Record):
    """Losses in nats a token, by buckets of the position that predicts: bucket b holds the positions edges[b] to edges[b + 1] - 1."""

    edges: list[int]
    tokens: list[int]
    documents: list[int]
    loss: list[float]
    standard_error: list[float | None]
    """Of the loss, over documents; None for a single one."""
    perplexity: list[float]
    """exp(loss)"""
    overall: Overall
    document_tokens: list[int]
    """Predicted tokens of each document."""
    document_losses: list[list[float]]
    """(documents, buckets) sums of losses, 0 where a document does not reach a bucket."""


class Difference(_Record):
    """How much more a model loses than the first one, nats a token in each bucket, on the same tokens."""

    loss: list[float]
    standard_error: list[float | None]
    """Of the difference, paired by document."""
    overall_loss: float
    overall_standard_error: float | None


class NeedleCell(_Record):
    """The examples of one length and depth."""

    length: int
    depth: float
    exact_match: float
    """Share of answers that greedy decoding gives."""
    log_probability: float
    """Of the whole answer, nats; mean over examples."""
    margin: float
    """Mean by which that is more than where the needle states another number, nats."""
    margin_standard_error: float | None


class Metric(_Record):
    value: float | None
    """None where it is not finite."""
    standard_error: float | None


class ModelRecord(_Record):
    """One model: None is not measured yet."""

    folder: str
    digest: str
    sparsity: float
    window: int | None
    """Of windowed heads, in tokens; None for a dense model."""
    device: str
    perplexity: Perplexity | None = None
    needle: list[NeedleCell] | None = None
    harness: dict[str, dict[str, Metric]] | None = None
    """Task -> metric."""


class Evaluation(_Record):
    """The content of evaluation.json."""

    version: Literal[1] = 1
    settings: Settings
    models: dict[str, ModelRecord] = {}
    """By label, in the order in which they came; the others are compared with the first."""
    differences: dict[str, Difference] = {}

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Reads the file; InputError where it is none of ours."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(
                f"{path}: {field}: {first['msg']}; choose another --out or remove it"
            ) from None

    def save(self, path: Path) -> None:
        """Writes the file in one piece, each list of numbers on one line."""
        text = json.dumps(self.model_dump(), indent=1, allow_nan=False)
        numbers = re.compile(
            r"\[\n([-+.\w\s,]*?)\n\s*\]"
        )  # a line break never stands in a JSON string
        text = numbers.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)
        replace_text(path, text + "\n")
