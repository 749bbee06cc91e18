"""Needle retrieval: a number is stated somewhere in held-out text and asked for at its end.

    ... text ... The secret number of Alice is 48213. ... text ...
    The secret number of Alice is 48213

Each example has two versions, which differ only in the number that the needle states. The expected
answer is the first version's number in both. The difference of its log-probabilities tells what the
model has retrieved. It is exactly 0 for a model that does not see the needle.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaconsa.data.tokenizer import Tokenizer
from megaconsa.errors import InputError, RunError
from megaconsa.evaluation.held_out import HeldOut
from megaconsa.evaluation.record import NeedleCell, NeedleSettings
from megaconsa.evaluation.scoring import score

# The three parts are tokenized one by one, so that needle and question consist of the same tokens.
PROMPT = "\nThe secret number of {} is"
ANSWER = " {}"
END = ".\n"
NAMES = (
    "Alice",
    "Bruno",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Henry",
    "Irene",
    "Jonas",
    "Laura",
    "Martin",
    "Nora",
    "Oscar",
)
POOL = 512
"""How many numbers there are to draw from."""


@dataclass(frozen=True)
class Example:
    """One needle in its haystack."""

    length: int
    depth: float
    tokens: Tensor
    """(2, length) int64. The needle states the answer in row 0 and another number in row 1. Both
    rows end with the answer."""
    needle_start: int
    """Index of the needle's first token."""


class Needles:
    """Makes examples.

    They depend only on tokenizer, text and seed, so that every model sees the same ones.
    """

    def __init__(self, tokenizer: Tokenizer, held_out: HeldOut, seed: int) -> None:
        self.held_out = held_out
        self.seed = seed
        self._prompts = tokenizer.encode_batch([PROMPT.format(name) for name in NAMES])
        (self._end,) = tokenizer.encode_batch([END])
        drawn = random.Random(seed).sample(range(10_000, 100_000), POOL)
        numbers = [str(number) for number in drawn]
        encoded = tokenizer.encode_batch([ANSWER.format(number) for number in numbers])
        answers = dict(zip(numbers, encoded, strict=True))
        # Only answers of the most common length are used, so that both rows of an example and all
        # examples of a batch have the same length.
        self.answer_tokens: int = Counter(map(len, answers.values())).most_common(1)[0][0]
        self._answers = {
            number: ids for number, ids in answers.items() if len(ids) == self.answer_tokens
        }
        longest = max(map(len, self._prompts))
        self.shortest = 2 * (longest + self.answer_tokens) + len(self._end)
        """Tokens of the longest needle, question and answer. An example of this length may have no
        haystack."""

    def default_lengths(self, limit: int) -> list[int]:
        """Returns an eighth, a quarter, a half and all of `limit`, in tokens.

        Lengths at which less than half of the tokens are haystack are left out.
        """
        lengths = [limit // part for part in (8, 4, 2, 1)]
        return [length for length in lengths if length >= 2 * self.shortest]

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raises InputError if no example of one of the lengths can be made."""
        for length in lengths:
            if length <= self.shortest:
                raise InputError(
                    f"--needle-length {length} leaves no haystack: "
                    f"needle, question and answer take {self.shortest} tokens"
                )
            if length > self.held_out.text_tokens:
                raise InputError(
                    f"--needle-length {length} is more than "
                    f"the {self.held_out.text_tokens} tokens of held-out text"
                )

    def examples(self, settings: NeedleSettings) -> Iterator[Example]:
        """Yields all examples of a length, then those of the next.

        Each needle is put at every depth of the same haystack.
        """
        for length in settings.lengths:
            for number in range(settings.needles):
                rng = random.Random(f"{self.seed}/{length}/{number}")
                yield from self._at_depths(length, settings.depths, rng)

    def _at_depths(
        self, length: int, depths: Sequence[float], rng: random.Random
    ) -> Iterator[Example]:
        """Draws a needle and a haystack, and yields an example for each depth."""
        prompt = rng.choice(self._prompts)
        right = rng.choice(list(self._answers))
        # The wrong number differs in every digit.
        others = [
            number
            for number in self._answers
            if all(a != b for a, b in zip(number, right, strict=True))
        ]
        wrong = rng.choice(others)
        answer = self._answers[right]
        needles = [[*prompt, *self._answers[number], *self._end] for number in (right, wrong)]
        question = [*prompt, *answer]
        room = length - len(needles[0]) - len(question)
        document = rng.randrange(len(self.held_out.starts))
        haystack = self.held_out.text(document, room).tolist()
        for depth in depths:
            start = round(depth * room)
            before = haystack[:start]
            after = haystack[start:]
            rows = [[*before, *needle, *after, *question] for needle in needles]
            yield Example(length, depth, torch.tensor(rows), start)


def measure(
    model: Any,
    needles: Needles,
    settings: NeedleSettings,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda examples: None,
) -> list[NeedleCell]:
    """Measures retrieval for each length and depth.

    One forward pass scores an example. If each token of the answer is the likeliest after the
    tokens before it, greedy decoding gives exactly this answer.

    batch_tokens: tokens of a batch, which holds at least one example (two rows).
    advance: is called with the number of examples.

    Raises RunError if the model's probabilities are not finite.
    """
    found: dict[tuple[int, float], list[tuple[bool, float, float]]] = {}
    for batch in _batches(needles.examples(settings), batch_tokens):
        rows = torch.cat([example.tokens for example in batch])
        # Only the tokens of the answer are scored, which come last.
        first = batch[0].length - 1 - needles.answer_tokens
        likelihoods, likeliest = score(model, rows, first)
        pairs = likelihoods.double().sum(dim=1).view(-1, 2).tolist()
        # The even rows are those whose needle states the answer.
        matches = likeliest.all(dim=1)[::2].tolist()
        for example, (right, wrong), exact in zip(batch, pairs, matches, strict=True):
            if not (math.isfinite(right) and math.isfinite(wrong)):
                raise RunError(
                    f"{model.name_or_path}: probabilities are not finite; "
                    "export an earlier checkpoint, or use --dtype float32"
                )
            cell = found.setdefault((example.length, example.depth), [])
            cell.append((exact, right, right - wrong))
        advance(len(batch))
    return [_cell(length, depth, figures) for (length, depth), figures in found.items()]


def _batches(examples: Iterator[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Groups examples of the same length into batches."""
    batch: list[Example] = []
    for example in examples:
        other_length = bool(batch) and example.length != batch[0].length
        too_many = 2 * (len(batch) + 1) * example.length > batch_tokens
        if batch and (other_length or too_many):
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _cell(length: int, depth: float, figures: list[tuple[bool, float, float]]) -> NeedleCell:
    """Averages the figures of the examples of one length and depth."""
    exact, right, margins = zip(*figures, strict=True)
    error = None
    if len(margins) > 1:
        error = statistics.stdev(margins) / math.sqrt(len(margins))
    return NeedleCell(
        length=length,
        depth=depth,
        exact_match=statistics.mean(map(float, exact)),
        log_probability=statistics.mean(right),
        margin=statistics.mean(margins),
        margin_standard_error=error,
    )
