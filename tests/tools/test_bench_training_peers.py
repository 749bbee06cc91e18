"""`megaconsa bench-training --peer`: other trainers on the same shape and the same batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from megaconsa.benchmarks import short_run
from megaconsa.benchmarks.training import peer_rank, peers
from megaconsa.benchmarks.training.peers import PeerModel, installed_version, obstacle
from megaconsa.config import build
from megaconsa.data.stream import Batch
from megaconsa.errors import InputError, RunError
from megaconsa.model.qwen3 import Qwen3
from megaconsa.tools import bench_training
from megaconsa.training.inputs import check_inputs

DENSE = {"source": "rule", "rule": "dense"}
ONE_DOCUMENT = {"separate_documents": False}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def dense(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A configuration that peers can train anywhere."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(allocation=DENSE, attention=ONE_DOCUMENT)))
    return path


def report(losses: list[float], seconds: float) -> dict[str, Any]:
    """What a trainer's process writes."""
    rows = [
        {"tokens": 256 * (step + 1), "loss": loss, "step_seconds": seconds, "mfu": 0.1 / seconds}
        for step, loss in enumerate(losses)
    ]
    return {"rows": rows, "memory_gib": 2.0, "device": "cuda"}


def test_peers_stand_below_the_topologies(
    dense: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    def ours(
        module: str, config: Path, out: Path, fields: list[str], processes: int
    ) -> dict[str, Any]:
        started.append((module.rpartition(".")[2], str(processes)))
        return report([4.0, 2.0], 1.0)

    def theirs(module: str, config: Path, out: Path, arguments: list[str]) -> dict[str, Any]:
        started.append((module.rpartition(".")[2], arguments[0]))
        if arguments[0] == "liger":
            raise RunError("CUDA out of memory, planted")
        return report([4.0, 3.0], 0.5)

    monkeypatch.setattr(short_run, "run_processes", ours)
    monkeypatch.setattr(short_run, "run_alone", theirs)
    monkeypatch.setattr(peers, "version", {"liger-kernel": "0.8", "torchtitan": "0.2.2"}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "bench.json"
    bench_training.main(
        dense, topology=["data=2"], peer=["liger", "torchtitan"], steps=2, skip=1, out=out
    )
    assert started == [
        ("rank", "1"),
        ("rank", "2"),
        ("peer_rank", "liger"),
        ("peer_rank", "torchtitan"),
    ]
    content = json.loads(out.read_text())
    assert content["peer_versions"] == {"liger": "0.8", "torchtitan": "0.2.2"}
    assert content["not_measured"] == {"liger": "CUDA out of memory, planted"}
    one, two, torchtitan = content["measurements"]
    assert (one["peer"], two["peer"], torchtitan["peer"]) == (None, None, "torchtitan")
    assert (torchtitan["speedup"], torchtitan["tokens_per_second"]) == (2, 512)
    assert (torchtitan["mfu"], torchtitan["memory_gib"]) == (0.2, 2)
    assert torchtitan["loss_deviation"] == 0.5
    printed = capsys.readouterr().out
    assert "torchtitan " in printed.partition("loss off by")[2]
    assert "not measured: transformers + Liger: CUDA out of memory, planted" in printed


def test_peers_that_are_not_there_are_refused_before_anything_runs(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(short_run, "run_processes", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr(peers, "version", missing)
    with pytest.raises(InputError, match="not installed; install it with pip install liger-kernel"):
        bench_training.main(dense, peer=["liger"])
    with pytest.raises(InputError, match=r"pip install torchtitan==0\.2\.2"):
        bench_training.main(dense, peer=["torchtitan"])
    with pytest.raises(InputError, match="use liger or torchtitan"):
        bench_training.main(dense, peer=["nanochat"])
    monkeypatch.setattr(peers, "version", lambda package: "0.3.0")
    assert installed_version("liger") == "0.3.0"
    with pytest.raises(InputError, match=r"needs torchtitan 0\.2\.2, but 0\.3\.0 is installed"):
        installed_version("torchtitan")


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_what_a_peer_cannot_train_is_said(
    gpu: bool,
    separate: bool,
    make_config: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = build(make_config(attention={"separate_documents": separate}))
    assert (obstacle("liger", config) is None) == (gpu and not separate)
    assert (obstacle("torchtitan", config) is None) == (gpu or not separate)
    continued = config.model_copy(
        update={"model": config.model.model_copy(update={"init_from": Path("run")})}
    )
    assert "model.init_from=null" in str(obstacle("torchtitan", continued))


@pytest.mark.parametrize("separate", [False, True])
def test_a_peer_trains_as_we_do(
    separate: bool,
    make_config: Callable[..., dict[str, Any]],
    train: Callable[[dict[str, Any]], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """With our own model as the peer, the losses of all steps are the trainer's."""
    values = make_config(allocation=DENSE, attention={"separate_documents": separate})
    expected = [row["loss"] for row in train(values)]
    inputs = check_inputs(build(values | {"run": {"dir": str(tmp_path / "peer")}}))
    assert inputs.allocation is not None
    model = Qwen3(inputs.model_config, inputs.allocation, separate=separate)
    model.load_state_dict(peer_rank.starting_weights(inputs), strict=False)

    def loss(batch: Batch, labelled: int) -> Tensor:
        logits = model(batch.tokens, batch.documents).flatten(0, 1)
        return cross_entropy(logits, batch.labels.flatten(), reduction="sum") / labelled

    rows = list(peer_rank.train(inputs, PeerModel(model, loss), torch.device("cpu")))
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [row["tokens"] for row in rows] == [256, 512, 768, 1024, 1280, 1536]


@pytest.mark.slow
def test_torchtitan_has_our_losses(dense: Path, tmp_path: Path) -> None:
    """torchtitan is not among the packages for development, because it needs many others."""
    pytest.importorskip("torchtitan")
    out = tmp_path / "bench.json"
    bench_training.main(dense, peer=["torchtitan"], steps=3, skip=1, out=out)
    ours, theirs = json.loads(out.read_text())["measurements"]
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    assert theirs["losses"][0] == pytest.approx(math.log(512), abs=0.1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("name", "separate"), [("liger", False), ("torchtitan", True)])
def test_a_peer_follows_our_losses_in_bf16(
    name: str, separate: bool, make_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip(peers.REQUIREMENTS[name].partition("==")[0].replace("-", "_"))
    # FlexAttention's kernels need at least 16 dimensions in a head.
    values = make_config(
        allocation=DENSE, attention={"separate_documents": separate}, model={"head_dim": 32}
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    out = tmp_path / "bench.json"
    bench_training.main(path, peer=[name], steps=6, skip=1, out=out)
    content = json.loads(out.read_text())
    assert content["not_measured"] == {}
    assert content["measurements"][1]["loss_deviation"] < 0.01
