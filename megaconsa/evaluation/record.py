"""The content of evaluation.json: the models, the settings and the results of an evaluation."""

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
    """Digest of dataset.json, which identifies the data even if the folder moves."""


class PerplexitySettings(_Record):
    length: int
    documents: int


class NeedleSettings(_Record):
    lengths: list[int]
    depths: list[float]
    needles: int
    """Examples per length and depth."""
    seed: int


class HarnessSettings(_Record):
    tasks: list[str]
    task_files: str
    """Digest of the task folder: names, sizes, times. Empty for lm-eval's own tasks."""
    lm_eval: str
    """Version of lm-eval."""


class Settings(_Record):
    data: DataSettings
    dtype: str
    perplexity: PerplexitySettings | None = None
    needle: NeedleSettings | None = None
    harness: HarnessSettings | None = None


class Overall(_Record):
    """Figures over all positions together. Losses are in nats per token."""

    tokens: int
    loss: float
    standard_error: float | None
    perplexity: float


class Perplexity(_Record):
    """Losses in nats per token, by buckets of the position that predicts.

    Bucket b holds the positions edges[b] to edges[b + 1] - 1.
    """

    edges: list[int]
    tokens: list[int]
    documents: list[int]
    loss: list[float]
    standard_error: list[float | None]
    """Standard error of the loss, over documents. None for a single document."""
    perplexity: list[float]
    """exp(loss)"""
    overall: Overall
    document_tokens: list[int]
    """Predicted tokens of each document."""
    document_losses: list[list[float]]
    """(documents, buckets) sums of losses, 0 where a document does not reach a bucket."""


class Difference(_Record):
    """Loss of a model minus that of the first model, on the same tokens.

    Values are in nats per token, for each bucket.
    """

    loss: list[float]
    standard_error: list[float | None]
    """Standard error of the difference, paired by document."""
    overall_loss: float
    overall_standard_error: float | None


class NeedleCell(_Record):
    """The examples of one length and depth."""

    length: int
    depth: float
    exact_match: float
    """Share of examples whose answer greedy decoding gives."""
    log_probability: float
    """Log-probability of the whole answer in nats, mean over examples."""
    margin: float
    """How much this log-probability falls if the needle states another number, in nats, mean over
    examples."""
    margin_standard_error: float | None


class Metric(_Record):
    value: float | None
    """None if it is not finite."""
    standard_error: float | None


class ModelRecord(_Record):
    """The results of one model. A part that is None has not been measured yet."""

    folder: str
    digest: str
    sparsity: float
    window: int | None
    """Window of the sliding heads, in tokens. None for a dense model."""
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
    """Label -> results, in the order in which models were added. The others are compared with the
    first one."""
    differences: dict[str, Difference] = {}
    """Label -> loss compared with the first model."""

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Reads the file. Raises InputError if it is not an evaluation."""
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
        # A JSON string contains no line break, so this pattern matches only lists.
        numbers = re.compile(r"\[\n([-+.\w\s,]*?)\n\s*\]")
        text = numbers.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)
        replace_text(path, text + "\n")
