"""The steps of the journey in their order, and what a person would check after each."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import Any

from tests.journey.configs import LENGTH, STEPS, VOCABULARY, WINDOW, write_configs
from tests.journey.corpus import DOCUMENTS, write_corpus
from tests.journey.walk import Walk
from tests.support import ROOT

UNITS = 16
"""KV heads of the tiny model: 4 in each of its 4 layers."""
QUICKSTART = ROOT / "runs" / "quickstart"
"""What `make quickstart` has made, if it has run here."""


def looks_around(walk: Walk) -> None:
    listed = walk.does("--help").out
    assert "quickstart" in listed
    assert walk.does("--version").out.startswith("megaconsa ")
    walk.refused("did you mean training.steps?", "train", "learn.yaml", "training.stepz=3")
    walk.refused("broken.yaml", "train", "broken.yaml")


def prepares_data(walk: Walk) -> None:
    walk.refused("--train-tokenizer", "prepare-data", "corpus", "--out", "data")
    options = ("--train-tokenizer", VOCABULARY, "--sequence-length", LENGTH)
    share = ("--validation-share", 0.1)
    said = walk.does("prepare-data", "corpus", "--out", "data", *options, *share).out
    info = walk.reads_json("data/dataset.json")
    documents = sum(split["documents"] for split in info["splits"].values())
    assert documents == DOCUMENTS + 1
    assert f"vocabulary {VOCABULARY}" in said
    assert "data" in walk.does("verify-data", "data").out
    shard = next((walk.home / "data" / "train").glob("*.mds"))
    damaged = walk.home / "damaged"
    shutil.copytree(walk.home / "data", damaged)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    (damaged / "train" / shard.name).write_bytes(content)
    assert shard.name in walk.does("verify-data", "damaged", code=1).err


def plans(walk: Walk) -> None:
    said = walk.does("plan", "learn.yaml").out
    plan = json.loads(walk.does("plan", "learn.yaml", "--json").out)
    assert f"{plan['parameters']:,}" in said
    assert plan["tokens"] == STEPS * 4 * LENGTH


def learns(walk: Walk) -> None:
    """Stops learning by Ctrl-C, looks at the young run, and resumes it."""
    metrics = walk.home / "runs" / "learn" / "metrics.jsonl"

    def has_begun(_: str) -> bool:
        return metrics.exists() and len(metrics.read_text().splitlines()) >= 2

    slow = ("training.steps=2000", "checkpoint.every=0")
    stopped = walk.interrupted(has_begun, "train", "learn.yaml", *slow)
    assert stopped.code == 75, stopped.out
    assert "the same command resumes it" in stopped.out
    shutil.rmtree(walk.home / "runs" / "learn" / "checkpoints")
    assert "no checkpoint" in walk.does("checkpoints", "runs/learn").out
    assert "stopped" in walk.does("status", "runs/learn").out
    shutil.rmtree(walk.home / "runs" / "learn")

    said = walk.does("train", "learn.yaml").out
    assert said.count("attention.backend=auto") == 1, said
    assert f"finished at step {STEPS}" in said
    assert "over all ranks" not in said
    assert "clocks" not in said
    rows = walk.rows("runs/learn")
    _check_rows(rows)
    assert rows[-1]["binarized_sparsity"] == 0.5
    state = json.loads(walk.does("status", "runs/learn", "--json").out)
    assert (state["state"], state["step"]) == ("finished", STEPS)
    assert f"step_{STEPS}" in walk.does("checkpoints", "runs/learn").out
    assert "every file as it was written" in walk.does("verify", "runs/learn").out
    assert "documents" in walk.does("show-batch", "runs/learn", 3, "--sequences", 2).out
    assert "is finished" in walk.does("train", "learn.yaml").out
    walk.refused("attention.window", "train", "learn.yaml", "attention.window=8")


def chooses_heads(walk: Walk) -> None:
    walk.does("finalize-masks", "runs/learn", "--out", "runs/allocation.json")
    assert _full(walk, "runs/allocation.json") == UNITS // 2
    shape = ("--layers", 4, "--kv-heads", 4, "--window", WINDOW)
    walk.does("rule-masks", "interleaved", *shape, "--ratio", 1, "--out", "rule.json")
    assert _full(walk, "rule.json") == UNITS // 2


def trains(walk: Walk) -> None:
    """Trains on the learned allocation with copies of checkpoints, and a dense model beside it."""
    said = walk.does("train", "train.yaml", "checkpoint.upload=store").out
    assert "the data order continues" in said
    _check_rows(walk.rows("runs/train"))
    last_loss = walk.rows("runs/learn")[-1]["loss"]
    assert walk.rows("runs/train")[0]["loss"] < last_loss + 0.5
    walk.does("train", "dense.yaml")
    walk.does("fetch-checkpoint", f"store/step_{STEPS}", "runs/fetched")
    walk.does("verify", f"runs/fetched/checkpoints/step_{STEPS}")
    options = ("--sparsity", 0.5, "--sequences", 4, "--window", WINDOW, "--out", "scored.json")
    walk.does("score-units", "runs/dense", "--method", "leave-one-out", *options)
    assert _full(walk, "scored.json") == UNITS // 2


def exports(walk: Walk) -> None:
    said = walk.does("export-hf", "runs/train", "--out", "hf", "--verify", 128).out
    difference = re.search(r"differ from the checkpoint's by (\S+) of", said)
    assert difference is not None, said
    assert float(difference[1]) < 1e-5
    walk.does("export-hf", "runs/dense", "--out", "dense_hf")
    for folder in ("hf", "dense_hf"):
        card = (walk.home / folder / "README.md").read_text()
        script = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace("PATH", folder)
        walk.runs_python(script, f"the model card's example ({folder})")
    prompt = ("--prompt", "The miller", "--max-new-tokens", 8)
    for source in ("hf", "runs/train"):
        assert walk.does("generate", source, *prompt).out.startswith("The miller")
    walk.does("import-hf", "hf", "--out", "import")
    assert (walk.home / "import" / "manifest.json").is_file()


def compares(walk: Walk) -> None:
    models = ("--model", "dense=dense_hf", "--model", "learned=hf")
    size = ("--documents", 4, "--needles", 1)
    out = walk.does("evaluate", *models, "--data", "data", "--out", "evaluation", *size).out
    assert "learned" in out
    assert (walk.home / "evaluation" / "evaluation.png").stat().st_size > 10_000
    _check_finite(walk.reads_json("evaluation/evaluation.json"))
    walk.does("report", "runs", "--out", "report.html")
    page = (walk.home / "report.html").read_text()
    assert page.count("<svg") > 2
    assert ">NaN<" not in page
    for name in ("learn", "train", "dense"):
        assert name in page
    said = walk.does("sweep", "study.yaml", "--out", "study").out
    assert "random" in said
    assert (walk.home / "study" / "study.html").is_file()


def measures_speed(walk: Walk) -> None:
    shape = ("--length", 64, "--window", 16, "--heads", 4, "--kv-heads", 2, "--head-dim", 16)
    cases = ("--case", "dense", "--case", "mixed", "--out", "attention.json")
    walk.does("bench-attention", *shape, *cases)
    _check_finite(walk.reads_json("attention.json"))
    steps = ("--steps", 4, "--skip", 1, "--out", "speed.json")
    assert "tokens/s" in walk.does("bench-training", "dense.yaml", *steps).out
    assert "step" in walk.does("profile", "dense.yaml", "--out", "profile", "--steps", 1).out


def asks_for_a_cluster(walk: Walk) -> None:
    one = ("--gpus-per-node", 1, "--dry-run")
    assert "sbatch" in walk.does("submit", "train", "dense.yaml", *one).out
    assert not (walk.home / "runs" / "chain").exists()
    chain = ("learn.yaml", "train.yaml", "--out", "runs/chain")
    assert "sbatch" in walk.does("submit", "chain", *chain, *one).out
    assert not (walk.home / "runs" / "chain").exists()


def mistypes(walk: Walk) -> None:
    """Gives each command something that it cannot work with."""
    walk.all_refused(
        ("nowhere", "prepare-data", "nowhere", "--out", "x", "--train-tokenizer", "512"),
        ("nowhere", "verify-data", "nowhere"),
        ("nowhere", "status", "nowhere"),
        ("nowhere", "checkpoints", "nowhere"),
        ("nowhere", "report", "nowhere"),
        ("nowhere", "verify", "nowhere"),
        ("nowhere", "plan", "nowhere.yaml"),
        ("nowhere", "evaluate", "--model", "nowhere", "--data", "data", "--out", "x"),
        ("nowhere", "export-hf", "nowhere", "--out", "x"),
        ("finalize-masks", "export-hf", "runs/learn", "--out", "x"),
        ("nowhere", "import-hf", "nowhere", "--out", "x"),
        ("did not learn", "finalize-masks", "runs/train", "--out", "x.json"),
        ("nowhere", "score-units", "nowhere", "--method", "gradient", "--out", "x.json"),
        ("past the end", "show-batch", "runs/learn", "999"),
        ("nowhere", "sweep", "nowhere.yaml", "--out", "x"),
        ("nowhere", "bench-training", "nowhere.yaml"),
        ("nowhere", "profile", "nowhere.yaml", "--out", "x"),
        ("nowhere", "submit", "train", "nowhere.yaml", "--dry-run"),
        ("nowhere", "fetch-checkpoint", "nowhere/step_1", "runs/x"),
        ("dense", "rule-masks", "fairest", "--preset", "tiny", "--window", "8", "--out", "x"),
        ("mixed", "bench-attention", "--case", "fairest"),
    )


def starts_quickstart(walk: Walk) -> None:
    """Stops the quickstart early. If `make quickstart` has run here, finishes a copy of it too."""

    def has_begun(printed: str) -> bool:
        return "reading" in printed

    stopped = walk.interrupted(has_begun, "quickstart", "--folder", "first")
    assert stopped.code not in (0, 2)
    assert "run it again to continue" in stopped.out
    if (QUICKSTART / "report.html").is_file():
        shutil.copytree(QUICKSTART, walk.home / "runs" / "quickstart")
        said = walk.does("quickstart").out
        assert "exported logits differ by" in said


CHAPTERS = (
    looks_around,
    prepares_data,
    plans,
    learns,
    chooses_heads,
    trains,
    exports,
    compares,
    measures_speed,
    asks_for_a_cluster,
    mistypes,
    starts_quickstart,
)


def travel(walk: Walk) -> None:
    """Walks through all chapters. Raises AssertionError at the first step that disappoints."""
    write_corpus(walk.home / "corpus")
    write_configs(walk.home)
    (walk.home / "broken.yaml").write_text("model: {preset: tiny\n")
    for chapter in CHAPTERS:
        chapter(walk)


def _full(walk: Walk, path: str) -> int:
    """The number of full heads in an allocation."""
    return sum(map(sum, walk.reads_json(path)["full"]))


def _check_rows(rows: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    _check_finite(rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["loss"] < math.log(VOCABULARY)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert all("T" in row["time"] for row in rows)


def _check_finite(values: Any) -> None:
    """Fails if a number in a structure from JSON is infinite or not a number."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            _check_finite(value)
    elif isinstance(values, float):
        assert math.isfinite(values)
