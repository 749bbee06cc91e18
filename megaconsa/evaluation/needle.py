"""Needle retrieval: a number is stated somewhere in held-out text and asked for at its end.

    ... text ... The secret number of Alice is 48213. ... text ... The secret number of Alice is 48213

Each example comes twice, alike but for the number in the needle. The answer is the first one's number both times: what its probability
loses when the needle states another number is what the model has retrieved. A model that does not see the needle loses exactly nothing.
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

PROMPT, ANSWER, END = "\nThe secret number of {} is", " {}", ".\n"
"""Tokenized one by one, so that needle and question are made of the same tokens."""
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
"""Numbers to draw from."""


@dataclass(frozen=True)
class Example:
    """One needle in its haystack."""

    length: int
    depth: float
    tokens: Tensor
    """(2, length) int64: the needle states the answer in row 0 and another number in row 1; the answer stands at the end of both."""
    needle_start: int
    """Index of the needle's first token."""


class Needles:
    """Makes examples: a function of tokenizer, text and seed alone, so that every model sees the same ones."""

    def __init__(self, tokenizer: Tokenizer, held_out: HeldOut, seed: int) -> None:
        self.held_out, self.seed = held_out, seed
        self._prompts = tokenizer.encode_batch([PROMPT.format(name) for name in NAMES])
        (self._end,) = tokenizer.encode_batch([END])
        numbers = [
            str(number) for number in random.Random(seed).sample(range(10_000, 100_000), POOL)
        ]
        answers = dict(
            zip(
                numbers,
                tokenizer.encode_batch([ANSWER.format(number) for number in numbers]),
                strict=True,
            )
        )
        # Of one length, so that both rows of an example and all examples of a batch are.
        self.answer_tokens: int = Counter(map(len, answers.values())).most_common(1)[0][0]
        self._answers = {
            number: ids for number, ids in answers.items() if len(ids) == self.answer_tokens
        }
        longest = max(map(len, self._prompts))
        self.shortest = 2 * (longest + self.answer_tokens) + len(self._end)
        """Tokens of needle, question and answer: an example of this length may have no haystack."""

    def default_lengths(self, limit: int) -> list[int]:
        """An eighth, a quarter, half and all of `limit`, as far as half of the tokens are haystack."""
        return [limit // part for part in (8, 4, 2, 1) if limit // part >= 2 * self.shortest]

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raises InputError where an example of a length cannot be made."""
        for length in lengths:
            if length <= self.shortest:
                raise InputError(
                    f"--needle-length {length} leaves no haystack: needle, question and answer take {self.shortest} tokens"
                )
            if length > self.held_out.text_tokens:
                raise InputError(
                    f"--needle-length {length} is more than the {self.held_out.text_tokens} tokens of held-out text"
                )

    def examples(self, settings: NeedleSettings) -> Iterator[Example]:
        """Length by length, then needle by needle, which is put at each depth of the same haystack."""
        for length in settings.lengths:
            for number in range(settings.needles):
                yield from self._at_depths(
                    length, settings.depths, random.Random(f"{self.seed}/{length}/{number}")
                )

    def _at_depths(
        self, length: int, depths: Sequence[float], rng: random.Random
    ) -> Iterator[Example]:
        prompt = rng.choice(self._prompts)
        right = rng.choice(list(self._answers))
        wrong = rng.choice(
            [
                number
                for number in self._answers
                if all(a != b for a, b in zip(number, right, strict=True))
            ]
        )
        answer = self._answers[right]
        needles = [[*prompt, *self._answers[number], *self._end] for number in (right, wrong)]
        question = [*prompt, *answer]
        room = length - len(needles[0]) - len(question)
        haystack = self.held_out.text(rng.randrange(len(self.held_out.starts)), room).tolist()
        for depth in depths:
            start = round(depth * room)
            rows = [
                [*haystack[:start], *needle, *haystack[start:], *question] for needle in needles
            ]
            yield Example(length, depth, torch.tensor(rows), start)


def measure(
    model: Any,
    needles: Needles,
    settings: NeedleSettings,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda examples: None,
) -> list[NeedleCell]:
    """Figures of each length and depth.

    One forward pass scores an example: if each token of the answer is the likeliest after those before it, greedy decoding gives the
    answer, token for token. A batch holds `batch_tokens`, and one example (two rows) at least. `advance` is told of examples.
    RunError where the model's probabilities are not finite.
    """
    found: dict[tuple[int, float], list[tuple[bool, float, float]]] = {}
    for batch in _batches(needles.examples(settings), batch_tokens):
        likelihoods, likeliest = score(
            model,
            torch.cat([example.tokens for example in batch]),
            first=batch[0].length - 1 - needles.answer_tokens,
        )
        pairs = likelihoods.double().sum(dim=1).view(-1, 2).tolist()
        for example, (right, wrong), exact in zip(
            batch, pairs, likeliest.all(dim=1)[::2].tolist(), strict=True
        ):
            if not (math.isfinite(right) and math.isfinite(wrong)):
                raise RunError(
                    f"{model.name_or_path}: probabilities are not finite; export an earlier checkpoint, or use --dtype float32"
                )
            found.setdefault((example.length, example.depth), []).append(
                (exact, right, right - wrong)
            )
        advance(len(batch))
    return [_cell(*place, figures) for place, figures in found.items()]


def _batches(examples: Iterator[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Examples of one length together."""
    batch: list[Example] = []
    for example in examples:
        if batch and (
            example.length != batch[0].length
            or 2 * (len(batch) + 1) * example.length > batch_tokens
        ):
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _cell(length: int, depth: float, figures: list[tuple[bool, float, float]]) -> NeedleCell:
    exact, right, margins = zip(*figures, strict=True)
    return NeedleCell(
        length=length,
        depth=depth,
        exact_match=statistics.mean(map(float, exact)),
        log_probability=statistics.mean(right),
        margin=statistics.mean(margins),
        margin_standard_error=statistics.stdev(margins) / math.sqrt(len(margins))
        if len(margins) > 1
        else None,
    )
