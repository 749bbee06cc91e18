"""An evaluation with made-up figures, for tests of pictures and pages."""

from __future__ import annotations

import math

from megaconsa.evaluation.record import (
    DataSettings,
    Difference,
    Evaluation,
    Metric,
    ModelRecord,
    NeedleCell,
    Overall,
    Perplexity,
    Settings,
)

EDGES = [0, 128, 256, 512, 1024, 2048, 4096]
LOSSES = [3.4, 3.1, 2.95, 2.85, 2.8, 2.78]


def made_evaluation() -> Evaluation:
    """A dense model and two others, one of which is misled by some needles."""
    models = {}
    differences = {}
    for number, label in enumerate(("dense", "learned", "random")):
        losses = [loss + 0.004 * number * place for place, loss in enumerate(LOSSES)]
        models[label] = ModelRecord(
            folder=label,
            digest=label,
            sparsity=0.0 if number == 0 else 0.5,
            window=None if number == 0 else 256,
            device="cpu",
            perplexity=_perplexity(losses),
            needle=_needles(number),
            harness={"copy": {"acc": Metric(value=0.8 - 0.2 * number, standard_error=0.05)}},
        )
        if number:
            differences[label] = Difference(
                loss=[one - other for one, other in zip(losses, LOSSES, strict=True)],
                standard_error=[0.002] * len(LOSSES),
                overall_loss=0.008 * number,
                overall_standard_error=0.001,
            )
    settings = Settings(data=DataSettings(folder="data", digest="0"), dtype="float32")
    return Evaluation(settings=settings, models=models, differences=differences)


def _perplexity(losses: list[float]) -> Perplexity:
    buckets = len(losses)
    return Perplexity(
        edges=EDGES,
        tokens=[1000] * buckets,
        documents=[40] * buckets,
        loss=losses,
        standard_error=[0.02] * buckets,
        perplexity=[math.exp(loss) for loss in losses],
        overall=Overall(
            tokens=6000, loss=losses[2], standard_error=0.02, perplexity=math.exp(losses[2])
        ),
        document_tokens=[4096],
        document_losses=[losses],
    )


def _needles(number: int) -> list[NeedleCell]:
    """The larger the number, the less is found far from the end."""
    cells = []
    for column, length in enumerate((1024, 2048, 4096)):
        for row, depth in enumerate((0.0, 0.5, 1.0)):
            cell = NeedleCell(
                length=length,
                depth=depth,
                exact_match=max(0.0, 1 - 0.3 * number * (column + 1 - row / 2)),
                log_probability=-4.0,
                margin=9.0 - number * (3.0 * column + 2.5 * (2 - row)),
                margin_standard_error=0.4,
            )
            cells.append(cell)
    return cells
