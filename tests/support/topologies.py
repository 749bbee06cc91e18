"""What the tests of topologies train, how it is divided, and the resulting runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaconsa.consa.allocation import Allocation
from tests.support.forked_ranks import launch

STEPS = 5
CLIPPING = 0.05
"""Smaller than any gradient norm of these runs, so that every step is clipped."""
TABLE = Allocation(
    8,
    (
        # All full heads are on one side. In the model's own order, the second tensor rank would
        # have none.
        (True, True, False, False),
        (False, False, True, True),
        (True, False, False, False),
        (True, True, False, True),
    ),
)


@dataclass(frozen=True)
class Case:
    """What is trained, in any topology."""

    name: str
    sections: dict[str, dict[str, Any]]
    initialised_from: str | None = None
    """The case whose end, in one process, is the start of this one.

    Weights and moments are loaded instead of initialized.
    """


LEARN = {"allocation": {"source": "learn"}}
TRAIN = {"allocation": {"source": "file"}}
RECOMPUTED = {"training": {"activation_checkpointing": True}}
UNTIED = {"tie_word_embeddings": False}
PADDED = {"vocab_size": 515}
"""This size is not a multiple of two tensor ranks."""
LEARN_TIED = Case("learn-tied", LEARN)
TRAIN_UNTIED = Case("train-untied", TRAIN | {"model": UNTIED})
RECOMPUTED_TIED = Case("train-tied-recomputed", TRAIN | RECOMPUTED | {"model": PADDED})
HEAD_ALONE = Case(
    "head-alone",
    LEARN
    | {
        # The vocabulary costs more than the layers. The last of two stages then holds only the
        # final norm and the head.
        "model": {
            "num_hidden_layers": 2,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "training": {"gradient_clipping": 0.0},
    },
)
CASES = (
    LEARN_TIED,
    Case(
        "learn-untied-recomputed",
        LEARN | RECOMPUTED | {"model": UNTIED | PADDED, "gates": {"controller": "paper"}},
    ),
    RECOMPUTED_TIED,
    TRAIN_UNTIED,
    Case("train-after-learn", TRAIN, initialised_from="learn-tied"),
)


@dataclass(frozen=True)
class Job:
    """A run of a topology: a case, a deliberate fault or change, and where it stops.

    See topology_worker.py.
    """

    name: str
    case: Case
    precision: str = "fp32"
    fault: str | None = None
    kernels: bool = False
    """Whether blocks run by the kernels of a GPU. Triton's interpreter runs them."""
    steps: int = STEPS
    stop: int | None = None
    """The step after which the job stops. It resumes when it is launched again by the same name."""
    every: int = 1
    """Steps between two checkpoints. There is also one where the job stops or ends."""


@dataclass(frozen=True)
class Layout:
    """A topology and its section of the configuration."""

    name: str
    processes: int
    parallel: dict[str, Any] = field(default_factory=dict)


ONE = Layout("one", 1)
DP2 = Layout("dp2", 2)
DP2_GRADIENTS = Layout("dp2-gradients", 2, {"shard": "gradients"})
TP2 = Layout("tp2", 2, {"tensor": 2, "sequence": False})
TP2_SEQUENCE = Layout("tp2-sequence", 2, {"tensor": 2, "sequence": True})
PP2 = Layout("pp2", 2, {"pipeline": 2})
PP2_DUALPIPEV = Layout("pp2-dualpipev", 2, {"pipeline": 2, "schedule": "dualpipev"})
PP2_INTERLEAVED = Layout("pp2-interleaved", 2, {"pipeline": 2, "schedule": "interleaved"})
CP2 = Layout("cp2", 2, {"context": 2})
CP4 = Layout("cp4", 4, {"context": 4})
CP2_TP2 = Layout("cp2-tp2", 4, {"context": 2, "tensor": 2})
PP2_DP2_GRADIENTS = Layout("pp2-dp2-gradients", 4, {"pipeline": 2, "shard": "gradients"})
TP2_PP2 = Layout("tp2-pp2", 4, {"tensor": 2, "pipeline": 2})
PP2_DP2 = Layout("pp2-dp2", 4, {"pipeline": 2})
TP2_DP2 = Layout("tp2-dp2", 4, {"tensor": 2})
COMBINATIONS = (
    TP2_DP2,
    Layout("tp4", 4, {"tensor": 4}),
    Layout("cp2-dp2", 4, {"context": 2}),
    Layout("cp2-pp2", 4, {"context": 2, "pipeline": 2}),
    Layout("cp2-pp2-dualpipev", 4, {"context": 2, "pipeline": 2, "schedule": "dualpipev"}),
    Layout("cp2-tp2-dp2", 8, {"context": 2, "tensor": 2}),
    Layout("pp4", 4, {"pipeline": 4}),
    Layout("tp2-pp2-dualpipev", 4, {"tensor": 2, "pipeline": 2, "schedule": "dualpipev"}),
    Layout("tp2-pp2-interleaved", 4, {"tensor": 2, "pipeline": 2, "schedule": "interleaved"}),
    Layout("cp2-pp2-interleaved", 4, {"context": 2, "pipeline": 2, "schedule": "interleaved"}),
    Layout("pp2-dp2-interleaved", 4, {"pipeline": 2, "schedule": "interleaved"}),
    Layout("tp2-pp2-dp2", 8, {"tensor": 2, "pipeline": 2}),
)


class Runs:
    """Makes the configurations of all cases, and trains each in this process once."""

    def __init__(
        self, folder: Path, make_config: Callable[..., dict[str, Any]], train: Callable[..., Any]
    ) -> None:
        self.folder = folder
        self.make_config = make_config
        self.train = train

    def values(
        self,
        case: Case,
        run: Path,
        precision: str = "fp32",
        parallel: dict[str, Any] | None = None,
        steps: int = STEPS,
        every: int = 1,
    ) -> dict[str, Any]:
        """Returns the plain values of the run of a case."""
        values = self.make_config(
            run={"dir": str(run)},
            # Weights are large enough for attention and gates to affect the loss from the start.
            model={"initializer_range": 0.15},
            gates={"initial": 0.5, "learning_rate": 1.0},
            parallel=parallel or {},
            training={
                "steps": steps,
                "micro_batch": 2,
                "global_batch": 8,
                "gradient_clipping": CLIPPING,
                # Adam's first step moves every weight by the learning rate, even where the gradient
                # is nothing but rounding (1e-10 beside 1e-4). Only these few weights add to the
                # difference, through this and the next gradients.
                "learning_rate": 3e-4,
                "precision": precision,
                # The runs in other precisions are only checked for change, and this change must
                # come from gradients.
                "weight_decay": 0.1 if precision == "fp32" else 0.0,
            },
            data={"path": str(self.folder / "data")},
            checkpoint={"every": every, "keep": STEPS},
        )
        for section, fields in case.sections.items():
            values[section] |= fields
        if values["allocation"]["source"] == "file":
            path = self.folder / "allocation.json"
            TABLE.save(path)
            values["allocation"]["file"] = str(path)
        if case.initialised_from:
            (origin,) = (other for other in CASES if other.name == case.initialised_from)
            values["model"]["init_from"] = str(self.reference(origin, precision))
        return values

    def reference(self, case: Case, precision: str = "fp32") -> Path:
        """Returns the finished run of one process."""
        run = self.folder / f"one-{case.name}-{precision}"
        if not run.exists():
            self.train(self.values(case, run, precision))
        return run

    def run_of(self, layout: Layout, job: Job) -> Path:
        kind = "-kernels" if job.kernels else ""
        return self.folder / f"{layout.name}-{job.name}-{job.precision}{kind}"

    def launch(self, layout: Layout, jobs: Sequence[Job]) -> dict[str, Path]:
        """Trains all jobs in one launch of the layout.

        Returns the run of each name.
        """
        done = {job.name: self.run_of(layout, job) for job in jobs}
        listed = [
            {
                "config": self.values(
                    job.case,
                    self.run_of(layout, job),
                    job.precision,
                    layout.parallel,
                    job.steps,
                    job.every,
                ),
                "fault": job.fault,
                "kernels": job.kernels,
                "stop": job.stop,
            }
            for job in jobs
        ]
        launch(layout.processes, listed)
        return done
