"""Continues the prompts of validation.prompts at each validation, and writes samples.jsonl.

While learning, the model has the allocation table that the gates would give now.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from megaconsa import run_folder
from megaconsa.config import Config
from megaconsa.data.mixture_file import tokenizer_folder
from megaconsa.data.stream import Batch
from megaconsa.data.tokenizer import Tokenizer
from megaconsa.model.loss import IGNORED
from megaconsa.parallel.topology import Topology
from megaconsa.training.batches import carries
from megaconsa.training.callbacks.metrics_file import MetricsFile
from megaconsa.training.callbacks.validation import Validation
from megaconsa.training.trainer import Callback, Order, Row, Trainer

NEW_TOKENS = 64
"""Longest continuation. It is shorter if the text or its sequence ends before."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str
    """The continuation, without the prompt."""


class Samples(Callback):
    """Takes the most probable token each time, by the engine's own passes.

    A pass has the shape of a training micro-batch, so it works in every topology. It answers for
    one more token of each prompt. Data ranks do the same work.
    """

    order = Order.MEASURE

    def __init__(
        self,
        config: Config,
        prompts: Sequence[list[int]],
        validation: Validation,
        topology: Topology,
        *,
        is_main: bool,
    ) -> None:
        """prompts: the ids of config.validation.prompts.

        validation: samples are taken in the same steps.
        """
        self.config = config
        self.prompts = prompts
        self.validation = validation
        self.least = topology.least_evaluated
        self.newest: list[Sample] = []
        """Those of the last validation, on the main rank."""
        self.tokenizer = Tokenizer.load(tokenizer_folder(config.data.path))
        self.file: MetricsFile | None = None
        if is_main:
            self.file = MetricsFile(config.run.dir, run_folder.SAMPLES)

    def on_start(self, trainer: Trainer) -> None:
        if self.file is not None:
            self.file.on_start(trainer)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if not self.validation.is_due(trainer):
            return
        with trainer.gates.binarized() if trainer.gates else nullcontext():
            continuations = self._continue(trainer)
        if self.file is None:
            return
        self.newest = []
        for prompt, ids in zip(self.config.validation.prompts, continuations, strict=True):
            self.newest.append(Sample(prompt, self.tokenizer.decode(ids)))
        samples = [{"prompt": sample.prompt, "text": sample.text} for sample in self.newest]
        self.file.on_step(
            trainer, {"step": row["step"], "tokens": row["tokens"], "samples": samples}
        )

    def on_finish(self, trainer: Trainer) -> None:
        if self.file is not None:
            self.file.on_finish(trainer)

    def _continue(self, trainer: Trainer) -> list[list[int]]:
        """The new tokens of each prompt, without the one that ends its text."""
        length = self.config.training.sequence_length
        found: list[list[int]] = [[] for _ in self.prompts]
        growing = set(range(len(self.prompts)))
        for _ in range(NEW_TOKENS):
            texts = [[*prompt, *new] for prompt, new in zip(self.prompts, found, strict=True)]
            batches = self._batches(texts)
            count = len(batches)
            # The normalizer is of a loss, which these passes do not compute.
            own = carries(batches, 1, trainer.mesh) if trainer.mesh.reads_data else []
            tokens = trainer.engine.next_tokens(own, count, len(texts))
            for number in sorted(growing):
                if tokens[number] == self.tokenizer.end_of_text:
                    growing.remove(number)
                    continue
                found[number].append(tokens[number])
                if len(self.prompts[number]) + len(found[number]) == length:
                    growing.remove(number)
            if not growing:
                break
        return found

    def _batches(self, texts: Sequence[list[int]]) -> list[Batch]:
        """The texts as micro-batches, with a mark at the end of each."""
        size = self.config.training.micro_batch
        length = self.config.training.sequence_length
        count = max(self.least, -(-len(texts) // size))
        # What follows a text in its row cannot be seen from the text.
        tokens = torch.zeros(count * size, length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        numbers = torch.zeros(count * size, dtype=torch.int64)
        for number, ids in enumerate(texts):
            tokens[number, : len(ids)] = torch.tensor(ids)
            labels[number, len(ids) - 1] = 0
            numbers[number] = number
        documents = torch.zeros(count * size, length, dtype=torch.int32)
        batches = []
        for begin in range(0, count * size, size):
            rows = slice(begin, begin + size)
            batches.append(Batch(tokens[rows], labels[rows], documents[rows], numbers[rows]))
        return batches
